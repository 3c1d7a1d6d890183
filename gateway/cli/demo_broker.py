"""The demo's broker: amqtt behind TLS on loopback, in a process of its own since it runs on asyncio.

In: the paths of a certificate chain and its key (PEM), as arguments; the end of standard input means stop.
Out: `ready PORT` on standard output; complaints on standard error.

It lives no longer than whoever holds its standard input, however that one ends.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import sys

from amqtt.broker import Broker

_LISTENER = "default"


async def serve(chain: str, key: str) -> None:
    """Serve MQTT 3.1.1 over TLS on a free port of 127.0.0.1 until standard input ends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    # "external": the listener below is ours. amqtt's own could take port 0, but not tell which one it got.
    broker = Broker(
        {
            "listeners": {_LISTENER: {"type": "external"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await broker.stream_connected(reader, writer, _LISTENER)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    server.close()
    await broker.shutdown()


if __name__ == "__main__":
    # Ctrl-C reaches every process of the terminal; the demo ends this one when its sessions are closed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve(*sys.argv[1:]))
