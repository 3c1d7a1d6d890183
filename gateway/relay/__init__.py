"""The two sides of a session: the device in plain MQTT, the upstream in TLS."""
