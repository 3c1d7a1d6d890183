"""A gateway that gives every plain-MQTT device a verified TLS connection of its own to the broker."""

__version__ = "0.1.0"
