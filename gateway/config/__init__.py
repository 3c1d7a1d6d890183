"""The configuration: one frozen `Config`, whether it comes from a TOML file or from flags.

In: a file, flags or a mapping.  Out: `Config`, or `gateway.errors.ConfigError` with everything that is wrong.
"""

from gateway.config.names import normalise_name
from gateway.config.schema import TLS, Admission, Config, Limits, Listener, Network, Timeouts, Upstream

__all__ = [
    "TLS",
    "Admission",
    "Config",
    "Limits",
    "Listener",
    "Network",
    "Timeouts",
    "Upstream",
    "normalise_name",
]
