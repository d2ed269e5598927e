"""Where text encoders are: a URI, or two of CLIPs side by side. No torch here."""

from collections.abc import Callable

AND = " + "  # between the URIs of two CLIPs whose embeddings are laid side by side


def each_uri(uri: str) -> list[str]:
    """The URIs of one or of two."""
    return uri.split(AND)


def placed(uri: str, place: Callable[[str], str]) -> str:
    """The same with `place` applied to each, e.g. `absolute`."""
    return AND.join(map(place, each_uri(uri)))
