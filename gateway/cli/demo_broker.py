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
_MQTT_5 = b"\x00\x04MQTT\x05"
# CONNACK of MQTT 5.0: Unsupported Protocol Version.
_UNSUPPORTED = b"\x20\x03\x00\x84\x00"


class _Again:
    """Reads `head`, and then what comes next."""

    def __init__(self, head: bytes, reader: asyncio.StreamReader) -> None:
        self._head = head
        self._reader = reader
        self.feed_eof = reader.feed_eof

    async def readexactly(self, size: int) -> bytes:
        """See `asyncio.StreamReader`."""
        head, self._head = self._head[:size], self._head[size:]
        return head + await self._reader.readexactly(size - len(head))

    async def read(self, size: int = -1) -> bytes:
        """See `asyncio.StreamReader`."""
        head, self._head = self._head, b""
        return head or await self._reader.read(size)


async def _head_of_connect(reader: asyncio.StreamReader) -> bytes:
    """Read up to and including the protocol version of MQTT 3.1.1 and 5.0."""
    head = await reader.readexactly(2)
    while head[-1] & 0x80:
        head += await reader.readexactly(1)
    return head + await reader.readexactly(len(_MQTT_5))


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
        try:
            head = await _head_of_connect(reader)
        except asyncio.IncompleteReadError:
            writer.close()
            return
        if head.endswith(_MQTT_5):
            # amqtt would take the properties for the Client Identifier, and wait for its end.
            writer.write(_UNSUPPORTED)
            writer.close()
            return
        await broker.stream_connected(_Again(head, reader), writer, _LISTENER)

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
