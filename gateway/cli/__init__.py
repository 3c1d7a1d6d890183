"""The command line: `mqtts-gateway check`, `init` and `demo`."""
