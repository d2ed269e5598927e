"""Workers that do something together: what fails for one fails for all, in the same words."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """This worker among those that share a checkpoint; as it stands, the only one.

    Attributes:
        rank, world: of this worker, and how many there are.
        exchange: what each worker gives -> what all gave, by rank. Every worker is to call it, in
            the same order; one thread at a time.
    """

    rank: int = 0
    world: int = 1
    exchange: Callable[[Any], list[Any]] = _alone

    @classmethod
    def together(cls, timeout: timedelta = timedelta(hours=1)) -> "Ranks":
        """All workers of the default process group, or the only one where there is none.

        They talk in a gloo group of their own, so that a thread in the background can.

        Args:
            timeout: how long one waits for another, whose storage may be slower.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        group = dist.new_group(backend="gloo", timeout=timeout)
        world = dist.get_world_size()

        def exchange(value: Any) -> list[Any]:
            values: list[Any] = [None] * world
            dist.all_gather_object(values, value, group=group)
            return values

        return cls(dist.get_rank(), world, exchange)

    def each(self, action: Callable[[], T]) -> list[T]:
        """What `action` returned on every worker; the first one's error if any failed."""
        return [_value(outcome) for outcome in self.exchange(_outcome(action))]

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returned, or the error it raised, on the first worker alone."""
        mine = _outcome(action) if self.rank == 0 else None
        return cast(T, _value(self.exchange(mine)[0]))


@dataclass(frozen=True)
class _Failed:
    error: Exception


def _outcome(action: Callable[[], T]) -> T | _Failed:
    try:
        return action()
    except Exception as error:  # for the others to hear of; every one of them raises it
        return _Failed(_portable(error))


def _value(outcome: T | _Failed) -> T:
    if isinstance(outcome, _Failed):
        raise outcome.error
    return outcome


def _portable(error: Exception) -> Exception:
    """The error, or its words where other processes could not rebuild it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does on the way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
