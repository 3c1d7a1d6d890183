"""The configuration: one frozen `Config`, whether it comes from a TOML file or from flags.

In: a file, flags or a mapping.  Out: `Config`, or `gateway.errors.ConfigError` with every problem.
"""

from gateway.config.changes import changed_keys
from gateway.config.devices import DeviceRule, Devices
from gateway.config.load import from_flags, from_mapping, load_file, template_text
from gateway.config.names import normalise_name
from gateway.config.schema import (
    LARGEST_PACKET,
    TLS,
    Admission,
    Config,
    Drain,
    Failover,
    Limits,
    Listener,
    Log,
    Pacing,
    Proxy,
    Status,
    StoreConfig,
    Timeouts,
    Upstream,
    weak_ciphers,
)
from gateway.config.validators import Network

__all__ = [
    "LARGEST_PACKET",
    "TLS",
    "Admission",
    "Config",
    "DeviceRule",
    "Devices",
    "Drain",
    "Failover",
    "Limits",
    "Listener",
    "Log",
    "Network",
    "Pacing",
    "Proxy",
    "Status",
    "StoreConfig",
    "Timeouts",
    "Upstream",
    "changed_keys",
    "from_flags",
    "from_mapping",
    "load_file",
    "normalise_name",
    "template_text",
    "weak_ciphers",
]
