"""The state machine of a session, without I/O."""
