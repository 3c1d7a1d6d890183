"""Measures the gateway beside the relays that people use today: `python -m benchmarks`."""
