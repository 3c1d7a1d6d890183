"""A gateway that gives every plain-MQTT device a verified TLS connection of its own to the broker."""

from datetime import UTC, datetime

__version__ = "1.0.0"
MADE = datetime(2026, 11, 1, tzinfo=UTC)
"""A day in the month before this version's release: a clock that shows an earlier one is wrong."""
