"""Finding a broker: which one, when, and the way to it."""
