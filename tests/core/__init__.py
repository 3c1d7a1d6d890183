"""The compiled core under sanitizers: `python -m tests.core --help`."""
