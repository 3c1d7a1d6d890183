"""Sockets: listening, connecting, names and addresses."""
