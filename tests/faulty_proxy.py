"""A proxy before an S3 server that does to its clients what networks and servers do.

It speaks HTTP/1.1 on a real socket. Rules say which requests meet which fault; every fault is
counted, so that a test can show that it happened.

```
with FaultyProxy("http://127.0.0.1:5000") as proxy:
    proxy.rule(to("PUT", "/_delta_log/"), lose_answer)
    proxy.rule(to("PUT"), gone(8), times=1)
    ...                                # clients talk to proxy.url
    assert proxy.counts["lose_answer"] > 0
```
"""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "expect"))
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
_NAMES = {500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Request:
    """What a client asks: `path` without escapes and without the query."""

    method: str
    path: str


@dataclass(frozen=True)
class Answer:
    """What it is told."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""


Forward = Callable[[], Answer]  # ask the server itself
Fault = Callable[["FaultyProxy", Forward], Answer | None]  # None: the connection just ends
Match = Callable[[Request], bool]


@dataclass
class Rule:
    """The requests that match meet the fault, so many of them, or a share chosen by lot."""

    match: Match
    fault: Fault
    times: float
    share: float


def to(method: str, part: str = "") -> Match:
    """Requests of a method ("" is any) whose path has this part."""
    return lambda request: request.method.startswith(method) and part in request.path


def nth(number: int, match: Match) -> Match:
    """The number-th request that matches, from 1, and no other."""
    seen: list[Request] = []

    def at(request: Request) -> bool:
        if match(request):
            seen.append(request)
        return match(request) and len(seen) == number

    return at


def lose_answer(proxy: "FaultyProxy", forward: Forward) -> None:
    """The server does what it was asked; nobody is told."""
    forward()


def fails(status: int) -> Fault:
    """The server answers with an error and does nothing."""
    name = _NAMES[status]
    error = Answer(
        status, [("Content-Type", "application/xml")], _ERROR.format(name, name).encode()
    )
    return _named(f"{status}", lambda proxy, forward: error)


def slow(seconds: float) -> Fault:
    """The answer is right but late."""

    def late(proxy: "FaultyProxy", forward: Forward) -> Answer:
        time.sleep(seconds)
        return forward()

    return _named("slow", late)


def gone(seconds: float) -> Fault:
    """The server vanishes, this request unheard, every connection cut, new ones refused."""
    return _named("gone", lambda proxy, forward: proxy.vanish(seconds))


def first(action: Callable[[], object], name: str) -> Fault:
    """Something happens before the server is asked."""

    def acted(proxy: "FaultyProxy", forward: Forward) -> Answer:
        action()
        return forward()

    return _named(name, acted)


def _named(name: str, fault: Fault) -> Fault:
    fault.__name__ = name
    return fault


class FaultyProxy:
    """The proxy; a context manager.

    Attributes:
        url: where it listens.
        counts: faults by name; "requests", and "cut": connections ended by a `gone`.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.counts: Counter[str] = Counter()
        self._rules: list[Rule] = []
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._clients: set[socket.socket] = set()
        # Never listens; keeps the port ours while nobody listens, so that clients are refused.
        self._holder = _bound(0)
        self.port = self._holder.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._ended = threading.Event()

    def __enter__(self) -> "FaultyProxy":
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._cut()
        self._holder.close()

    def rule(
        self, match: Match, fault: Fault, times: float = float("inf"), share: float = 1.0
    ) -> None:
        """Let requests that match meet the fault; of several rules the first decides."""
        self._rules.append(Rule(match, fault, times, share))

    def forgive(self) -> None:
        """Drop all rules."""
        with self._lock:
            self._rules.clear()

    def vanish(self, seconds: float) -> None:
        """Refuse and cut everything for a while, beginning now."""
        self._cut()
        timer = threading.Timer(seconds, self._listen)
        timer.daemon = True
        timer.start()

    def answer(self, request: Request, forward: Forward) -> Answer | None:
        """What becomes of a request; None ends its connection."""
        fault = self._fault(request)
        return fault(self, forward) if fault else forward()

    def _fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.counts["requests"] += 1
            for rule in self._rules:
                if rule.times > 0 and rule.match(request) and self._random.random() < rule.share:
                    rule.times -= 1
                    self.counts[rule.fault.__name__] += 1
                    return rule.fault
        return None

    def _listen(self) -> None:
        if not self._ended.is_set():
            self._listener = _bound(self.port)
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
            _Handler(client, self)
        with self._lock:
            self._clients.discard(client)
        client.close()

    def _cut(self) -> None:
        _end(self._listener)
        self._listener.close()
        with self._lock:
            clients = list(self._clients)
            self.counts["cut"] += len(clients)
        for client in clients:
            _end(client)


class _Handler(BaseHTTPRequestHandler):
    """One client's connection, request by request."""

    protocol_version = "HTTP/1.1"

    def __init__(self, client: socket.socket, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        self.server_side = HTTPConnection(proxy.upstream, timeout=60)
        try:
            super().__init__(client, client.getpeername(), proxy)  # type: ignore[arg-type]
        finally:
            self.server_side.close()

    def any(self) -> None:
        """Handle a request of whatever method."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, unquote(urlsplit(self.path).path))
        answer = self.proxy.answer(request, lambda: self._forward(body))
        if answer is None:
            self.close_connection = True
            _reset(self.connection)
        else:
            self._reply(answer)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = any

    def _forward(self, body: bytes) -> Answer:
        """Ask the server word by word as the client did: its signature covers the host's name."""
        server = self.server_side
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP:
                server.putheader(name, value)
        server.endheaders(body)
        answer = server.getresponse()
        headers = [pair for pair in answer.getheaders() if pair[0].lower() not in _HOP]
        return Answer(answer.status, headers, answer.read())

    def _reply(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else answer.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    made.bind(("127.0.0.1", port))
    return made


def _end(connection: socket.socket) -> None:
    """Wake whoever waits on it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    """Let the coming close be a reset, as when a server dies."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
