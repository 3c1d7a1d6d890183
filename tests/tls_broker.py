"""A TLS broker in a process of its own, for many sessions: `python -m tests.tls_broker CHAIN KEY`.

In: a certificate chain and a key (PEM files).  Out: its port, as the first line of standard output; then sessions, each
of which gets a PUBLISH for each that it sends, with what `answer_to` makes of its Client Identifier and the payload.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import ssl
import sys
from hashlib import sha256

from tests import mqtt_packets as packets

CONNECT, PUBLISH, DISCONNECT = 1, 3, 14


def answer_to(client_identifier: bytes, payload: bytes) -> bytes:
    """Return what the broker answers: nobody else's answer is the same."""
    return sha256(client_identifier + b"\0" + payload).hexdigest().encode()


async def read_packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return the type of a control packet, and what follows its fixed header; `IncompleteReadError` at the end."""
    first = (await reader.readexactly(1))[0]
    size = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return first >> 4, await reader.readexactly(size)


def field(body: bytes, start: int) -> tuple[bytes, int]:
    """Return a field with a length before it, and where it ends."""
    end = start + 2 + int.from_bytes(body[start : start + 2], "big")
    return body[start + 2 : end], end


def publish_fields(body: bytes, version: int) -> tuple[bytes, bytes]:
    """Return topic and payload of a PUBLISH of QoS 0; its properties, if it is of 5.0, must be empty."""
    topic, end = field(body, 0)
    return topic, body[end + (version == 5) :]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Have one session."""
    with contextlib.suppress(asyncio.IncompleteReadError, OSError, ssl.SSLError):
        type_, body = await read_packet(reader)
        assert type_ == CONNECT
        version = body[6]
        client_identifier, _ = field(body, 10 + (version == 5))
        writer.write(packets.connack(version=version))
        while type_ != DISCONNECT:
            type_, body = await read_packet(reader)
            if type_ == PUBLISH:
                topic, payload = publish_fields(body, version)
                answer = answer_to(client_identifier, payload)
                writer.write(packets.publish(topic.decode(), answer, version=version))
            await writer.drain()
    writer.close()


async def main(chain: str, key: str) -> None:
    """Serve until the process is ended."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context, backlog=4096, ssl_handshake_timeout=300)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
