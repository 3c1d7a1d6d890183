"""The demo's broker: amqtt with TLS on loopback, in a separate process because it uses asyncio.

In: the paths of a certificate chain and its key (PEM), as arguments; it stops at the end of standard input.
Out: `ready PORT` on standard output; errors on standard error.

It ends with its parent process, however that one ends.
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
    # "external": the listener below.  amqtt's own cannot tell which port it got for port 0.
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
    # Ctrl-C reaches all processes of the terminal; the demo stops this one after its sessions have closed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve(*sys.argv[1:]))
