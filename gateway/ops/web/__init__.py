"""The status page and its neighbours over HTTP."""
