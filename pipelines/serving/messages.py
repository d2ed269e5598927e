"""What the ingress and the samplers say to each other; free of torch, as the ingress is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """A valid request with nothing left to a default: one picture for each seed."""

    prompt: str
    seeds: tuple[int, ...]
    steps: int
    guidance: float


@dataclass(frozen=True)
class Picture:
    """A finished picture and how it was made."""

    png: bytes
    digest: str
    batch_size: int
    sampling_s: float


@dataclass(frozen=True)
class Refused:
    """What the model says to an order it cannot do: an answer, not a failure of the replica."""

    message: str
