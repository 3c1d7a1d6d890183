"""Messages on disk: what the gateway has acknowledged in an outage, until the broker has it."""
