"""The verified channel to the broker: trust, identity, and TLS without sockets."""
