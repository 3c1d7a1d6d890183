"""Whom the gateway lets in."""
