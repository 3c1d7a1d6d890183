"""Cloud profiles: default values for the requirements of well-known cloud brokers.

In: a mapping as parsed from TOML, which may name a profile.  Out: the mapping with the profile's values filled in, also
in rules for devices, which may come from files of their own.

The figures are from the providers' documentation: AWS IoT Core endpoints and quotas; Azure IoT Hub,
"Communicate with an IoT hub using MQTT"; Azure Event Grid, "MQTT features supported"; EMQX Cloud, "Serverless".  Where
a provider documents none, its profile sets none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from attrs import field, frozen

Name: TypeAlias = Literal["", "aws-iot", "azure-iot-hub", "azure-event-grid", "hivemq-cloud", "emqx-cloud"]

_TLS_PORT, _HTTPS_PORT = 8883, 443


@frozen
class _Profile:
    """Values for `[[upstream]]` (over TLS, over WebSocket), `[tls]` on port 443, rules, and rules with a SAS key.

    `{host}` in a template is the first broker's host.
    """

    upstream: Mapping[str, Any] = field(factory=lambda: {"port": _TLS_PORT})
    websocket: Mapping[str, Any] = field(factory=lambda: {"port": _HTTPS_PORT, "path": "/mqtt"})
    tls_on_443: Mapping[str, Any] = field(factory=dict)
    device: Mapping[str, Any] = field(factory=dict)
    with_sas_key: Mapping[str, Any] = field(factory=dict)


_PROFILES: Mapping[str, _Profile] = {
    "aws-iot": _Profile(
        # Without ALPN, port 443 is HTTPS there.
        tls_on_443={"alpn": ["x-amzn-mqtt-ca"]},
        device={
            "keep_alive_min": 30,
            "keep_alive_max": 1200,
            "max_qos": 1,
            "max_packet_size": 131_072,
            "packets_per_second": 100,
            "bytes_per_second": 524_288,
        },
    ),
    "azure-iot-hub": _Profile(
        websocket={"port": _HTTPS_PORT, "path": "/$iothub/websocket?iothub-no-client-cert=true"},
        device={
            "username": "{host}/{client_id}/?api-version=2021-04-12",
            "upgrade_3_1": True,
            "keep_alive_max": 1177,
            "max_qos": 1,
            "max_packet_size": 262_144,
        },
        with_sas_key={"sas_resource": "{host}/devices/{client_id}"},
    ),
    "azure-event-grid": _Profile(
        device={"upgrade_3_1": True, "keep_alive_max": 1160, "max_qos": 1, "max_packet_size": 524_288}
    ),
    "hivemq-cloud": _Profile(websocket={"port": 8884, "path": "/mqtt"}),
    "emqx-cloud": _Profile(
        websocket={"port": 8084, "path": "/mqtt"}, device={"max_packet_size": 1_048_576, "packets_per_second": 10}
    ),
}


def profiled(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `mapping` with the values of its profile for keys that it leaves out.

    Values of a wrong type and unknown profiles are left for the validation that follows.
    """
    profile = _PROFILES.get(_named(mapping))
    if profile is None:
        return mapping
    filled = dict(mapping)
    upstreams = _tables(mapping, "upstream")
    if upstreams:
        filled["upstream"] = [
            {**(profile.websocket if table.get("transport") == "websocket" else profile.upstream), **table}
            for table in upstreams
        ]
        tls = mapping.get("tls", {})
        on_443 = all(
            table["port"] == _HTTPS_PORT and table.get("transport") != "websocket" for table in filled["upstream"]
        )
        if on_443 and profile.tls_on_443 and isinstance(tls, Mapping):
            filled["tls"] = {**profile.tls_on_443, **tls}
    if rules := _tables(mapping, "device"):
        host = _host(upstreams)
        filled["device"] = [with_profile(_named(mapping), host, table) for table in rules]
    return filled


def with_profile(name: str, host: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rule's table with the values of the profile `name` for keys that it leaves out.

    `host` is the first broker's.  Raises nothing: an unknown profile has no values.
    """
    profile = _PROFILES.get(name)
    if profile is None:
        return dict(table)
    values = dict(profile.device)
    if "client_cert" in table:
        # The certificate is the identity; the device's own password must not reach the cloud.
        values["credentials"] = "drop"
    if "sas_key_file" in table:
        values |= profile.with_sas_key
    return {key: _at(host, value) for key, value in values.items()} | dict(table)


def _named(mapping: Mapping[str, Any]) -> str:
    devices = mapping.get("devices") if isinstance(mapping, Mapping) else None
    name = devices.get("profile", "") if isinstance(devices, Mapping) else ""
    return name if isinstance(name, str) else ""


def _tables(mapping: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return a list of tables, or an empty list if the value is anything else."""
    tables = mapping.get(key)
    if isinstance(tables, list) and all(isinstance(table, Mapping) for table in tables):
        return tables
    return []


def _host(upstreams: list[Mapping[str, Any]]) -> str:
    host = upstreams[0].get("host", "") if upstreams else ""
    return host if isinstance(host, str) else ""


def _at(host: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    # An invalid host is reported elsewhere; a brace in it must not become a placeholder here.
    return value.replace("{host}", host.replace("{", "{{").replace("}", "}}"))
