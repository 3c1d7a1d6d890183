"""Brokers that speak MQTT over WebSocket: amqtt, nginx in front of it, and a scripted one with wsproto's server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Pong, Request

from tests.balancers import Program
from tests.harness import BrokerConnection
from tests.ports import free_port
from tests.proxies import wait_for_port
from tests.tools import require_tool

_AMQTT = """\
import asyncio, logging, sys
from amqtt.broker import Broker

async def serve(configuration):
    broker = Broker(configuration)
    await broker.start()
    await asyncio.Event().wait()

logging.basicConfig(level=logging.WARNING)
port, chain, key = sys.argv[1:]
tls = {"ssl": True, "certfile": chain, "keyfile": key} if chain else {}
asyncio.run(serve({
    "listeners": {"default": {"type": "ws", "bind": f"127.0.0.1:{port}", "max_connections": 1000, **tls}},
    "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
}))
"""


class WebSocketBroker(Program):
    """amqtt with a WebSocket listener, over TLS if it has a certificate."""

    def __init__(self, directory: Path, chain: Path | None = None, key: Path | None = None) -> None:
        self.port = free_port()
        command = [sys.executable, "-c", _AMQTT, str(self.port), str(chain or ""), str(key or "")]
        super().__init__(command, directory / "amqtt.log")
        wait_for_port(self, self.port)


class WebSocketNginx(Program):
    """nginx that ends TLS and passes WebSockets at `/broker` on to a port; on a free one unless told otherwise."""

    def __init__(self, directory: Path, behind: int, chain: Path, key: Path, port: int = 0) -> None:
        self.port = port or free_port()
        path = directory / "nginx.conf"
        path.write_text(f"""\
daemon off; master_process off; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 1000; }}
http {{
  access_log off; client_body_temp_path {directory}/a; proxy_temp_path {directory}/b; fastcgi_temp_path {directory}/c;
  uwsgi_temp_path {directory}/d; scgi_temp_path {directory}/e;
  server {{
    listen 127.0.0.1:{self.port} ssl; ssl_certificate {chain}; ssl_certificate_key {key};
    location /broker {{
      proxy_pass http://127.0.0.1:{behind}; proxy_http_version 1.1; proxy_read_timeout 600;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;
    }}
    location / {{ return 404; }}
  }}
}}
""")
        super().__init__([require_tool("nginx"), "-c", str(path), "-p", str(directory)], directory / "nginx.log")
        wait_for_port(self, self.port)


class WebSocketConnection:
    """A connection at the scripted broker, once its WebSocket is open: MQTT bytes in and out, in frames of wsproto's.

    `request` is what the gateway asked for, `closed` the code of its Close, `ponged` the payloads of its Pongs.
    """

    def __init__(self, connection: BrokerConnection, accept: Callable[[Request], Event] | None = None) -> None:
        self.connection = connection
        self.mqtt = bytearray()
        self.closed: int | None = None
        self.ponged: list[bytes] = []
        self._server = WSConnection(ConnectionType.SERVER)
        self.request = self._read_request()
        answer = accept(self.request) if accept is not None else AcceptConnection(subprotocol="mqtt")
        self.send_event(answer)

    def _read_request(self) -> Request:
        while True:
            self._server.receive_data(self.connection.read())
            for event in self._server.events():
                assert isinstance(event, Request)
                return event

    def send_event(self, event: Event) -> None:
        """Send one of wsproto's events."""
        self.connection.send(self._server.send(event))

    def send(self, data: bytes) -> None:
        """Send MQTT bytes in one frame."""
        self.send_event(BytesMessage(data))

    def read(self) -> bytes:
        """Read some MQTT bytes; empty at the end."""
        while self.closed is None:
            data = self.connection.read()
            if not data:
                return b""
            self._server.receive_data(data)
            found = b""
            for event in self._server.events():
                if isinstance(event, BytesMessage):
                    found += event.data
                elif isinstance(event, CloseConnection):
                    self.closed = event.code
                elif isinstance(event, Pong):
                    self.ponged.append(bytes(event.payload))
                elif isinstance(event, Ping):
                    self.send_event(event.response())
            if found:
                self.mqtt += found
                return found
        return b""

    def read_packet(self) -> bytes:
        """Read one control packet of less than 128 bytes, which comes in one frame or several."""
        data = self.read()
        while data and len(data) < 2 + data[1]:
            data += self.read()
        return data
