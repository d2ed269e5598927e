"""What can happen to a request on its way to a server, and which requests it is to happen to."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

_XML = [("Content-Type", "application/xml")]
_ERROR = "<?xml version='1.0'?><Error><Code>{name}</Code><Message>{name}</Message></Error>"
_NAMES = {
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass(frozen=True)
class Request:
    """What a client asks: `path` without escapes and without the query."""

    method: str
    path: str


@dataclass(frozen=True)
class Answer:
    """What it is told; with `sent` below 1 the connection ends on the way."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    sent: float = 1.0


Match = Callable[[Request], bool]
Forward = Callable[[], Answer]  # asks the server itself
Fault = Callable[[Forward], Answer | None]  # None: the connection just ends


def to(method: str, part: str = "") -> Match:
    """Requests of a method, "" being any, whose path has this part."""
    return lambda request: request.method.startswith(method) and part in request.path


def after(first: Match, match: Match) -> Match:
    """Requests that match once another has been made."""
    seen: list[Request] = []

    def late(request: Request) -> bool:
        if first(request):
            seen.append(request)
        return bool(seen) and match(request)

    return late


def lost_answer(forward: Forward) -> None:
    """The server does what it was asked; nobody is told."""
    forward()


def broken_off(forward: Forward) -> Answer:
    """The connection ends in the middle of the answer."""
    return replace(forward(), sent=0.5)


def fails(status: int) -> Fault:
    """The server answers with an error and does nothing."""
    error = Answer(status, _XML, _ERROR.format(name=_NAMES[status]).encode())
    return named(str(status), lambda forward: error)


def slow(seconds: float) -> Fault:
    """The answer is right but late."""

    def late(forward: Forward) -> Answer:
        time.sleep(seconds)
        return forward()

    return named("slow", late)


def before(action: Callable[[], object], name: str) -> Fault:
    """Something happens just before the server is asked."""

    def acted(forward: Forward) -> Answer:
        action()
        return forward()

    return named(name, acted)


def by_lot(seed: int, share: float, match: Match) -> Match:
    """A share of the requests that match."""
    lots = random.Random(seed)
    return lambda request: match(request) and lots.random() < share


def named(name: str, fault: Fault) -> Fault:
    """The fault under the name by which it is counted."""
    fault.__name__ = name
    return fault
