"""`mqtts-gateway demo`: from a plain-MQTT sensor to a TLS broker, on this machine alone.

In: the command line.  Out: an exit status.  The demos are in `gateway.cli.demo_show`, `gateway.cli.demo_identities` and
`gateway.cli.demo_outage`, which need the extra `demo`.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

_EXTRA = {"amqtt": "amqtt", "paho.mqtt.client": "paho-mqtt", "trustme": "trustme"}  # module: package
_INSTALL = f"pip install {' '.join(_EXTRA.values())}, or '.[demo]' in a clone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `demo`."""
    parser.add_argument(
        "--listen",
        type=_port,
        default=0,
        metavar="PORT",
        help="accept plain MQTT on this port of 127.0.0.1 (default: a free one)",
    )
    parser.add_argument(
        "--profile",
        choices=("plain", "aws-like", "outage"),
        default="plain",
        help="aws-like: a broker that requires a certificate per device; outage: a sensor whose messages are stored "
        "while the broker is unreachable (default: plain)",
    )
    parser.add_argument("--once", action="store_true", help="exit after the demo, without waiting for clients")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; return 0 if it succeeded, otherwise 1."""
    for name, package in _EXTRA.items():
        try:
            import_module(name)
        except ImportError:
            print(f"mqtts-gateway demo: {package} is missing: {_INSTALL}", file=sys.stderr)
            return 1
    # Imported late: these modules need the extra, and a reactor.
    from twisted.internet import reactor

    from gateway.cli.demo_identities import IdentitiesShow
    from gateway.cli.demo_outage import OutageShow
    from gateway.cli.demo_show import Show

    shows = {"plain": Show, "aws-like": IdentitiesShow, "outage": OutageShow}
    return shows[arguments.profile](reactor, port=arguments.listen, once=arguments.once).run()


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: use 0 to 65535, 0 for a free one")
    return int(text)
