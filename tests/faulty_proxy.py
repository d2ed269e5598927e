"""A proxy before an S3 server that does to its clients what networks and servers do.

It speaks HTTP/1.1 on real sockets, a thread for each connection. Rules say which requests meet
which fault of `proxy_faults`; every fault is counted, so that a test can show that it happened.

```
with FaultyProxy("http://127.0.0.1:5000") as proxy:
    proxy.rule(to("PUT", "/versions/"), lost_answer)
    proxy.rule(to("PUT"), proxy.gone(8), times=1)
    ...                                # clients talk to proxy.url
    assert proxy.counts["lost_answer"] > 0
```
"""

import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from proxy_faults import Answer, Fault, Forward, Match, Request, named

_OF_THE_CONNECTION = frozenset(("connection", "keep-alive", "transfer-encoding", "expect"))


@dataclass
class _Rule:
    match: Match
    fault: Fault
    times: float


class FaultyProxy:
    """The proxy; a context manager.

    Attributes:
        url: where it listens.
        counts: faults by name, and "requests".
    """

    def __init__(self, server: str) -> None:
        self.server = urlsplit(server).netloc
        self.counts: Counter[str] = Counter()
        self._rules: list[_Rule] = []
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()
        # Never listens: it keeps the port ours while nobody does, so that clients are refused.
        self._holder = _bound(0)
        self._port = self._holder.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._ended = False

    def __enter__(self) -> "FaultyProxy":
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._cut()
        self._holder.close()

    def rule(self, match: Match, fault: Fault, times: float = float("inf")) -> None:
        """Let so many of the requests that match meet the fault; the first rule decides."""
        with self._lock:
            self._rules.append(_Rule(match, fault, times))

    def forgive(self) -> None:
        """Drop all rules."""
        with self._lock:
            self._rules.clear()

    def gone(self, seconds: float) -> Fault:
        """The server vanishes: the request unheard, all connections cut, new ones refused."""

        def vanish(_: Forward) -> None:
            self._cut()
            timer = threading.Timer(seconds, self._listen)
            timer.daemon = True
            timer.start()

        return named("gone", vanish)

    def answer(self, request: Request, forward: Forward) -> Answer | None:
        """What becomes of a request; None ends its connection."""
        fault = self._fault(request)
        return fault(forward) if fault else forward()

    def _fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.counts["requests"] += 1
            for rule in self._rules:
                if rule.times > 0 and rule.match(request):
                    rule.times -= 1
                    self.counts[rule.fault.__name__] += 1
                    return rule.fault
        return None

    def _listen(self) -> None:
        if not self._ended:
            self._listener = _bound(self._port)
            self._listener.listen(64)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was closed
            while True:
                client, _ = listener.accept()
                with self._lock:
                    self._clients.add(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, HTTPException):  # either side has gone
            _Connection(client, self)
        with self._lock:
            self._clients.discard(client)
        client.close()

    def _cut(self) -> None:
        _wake(self._listener)
        self._listener.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            _wake(client)


class _Connection(BaseHTTPRequestHandler):
    """A client's connection, request by request."""

    protocol_version = "HTTP/1.1"

    def __init__(self, client: socket.socket, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        self.server_side = HTTPConnection(proxy.server, timeout=60)
        try:
            super().__init__(client, client.getpeername(), None)  # type: ignore[arg-type]
        finally:
            self.server_side.close()

    def one(self) -> None:
        """Handle a request of whatever method."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, unquote(urlsplit(self.path).path))
        answer = self.proxy.answer(request, lambda: self._forward(body))
        if answer:
            self._reply(answer)
        if not answer or answer.sent < 1:
            self.close_connection = True
            _reset(self.connection)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = one

    def _forward(self, body: bytes) -> Answer:
        """Ask the server in the client's very words: its signature covers the host's name."""
        server = self.server_side
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _OF_THE_CONNECTION:
                server.putheader(name, value)
        server.endheaders(body)
        told = server.getresponse()
        headers = [pair for pair in told.getheaders() if pair[0].lower() not in _OF_THE_CONNECTION]
        return Answer(told.status, headers, told.read())

    def _reply(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        self.wfile.write(body[: int(answer.sent * len(body))])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    made.bind(("127.0.0.1", port))
    return made


def _wake(connection: socket.socket) -> None:
    """End a connection under the hands of whoever waits on it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    """Let the coming close be a reset, as when a server dies."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
