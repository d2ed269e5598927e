"""The reader of training: a global step -> its batches, the same whatever the number of workers."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from fractions import Fraction
from functools import cached_property, partial
from types import TracebackType

import numpy as np
import pyarrow as pa
import torch

from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.reader import LatentBatch
from ldm_core.latents.schema import caption_digest
from ldm_core.reading.account import Account, account
from ldm_core.reading.batching import batch_of, joined
from ldm_core.reading.held import Held
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.lanes import Slot
from ldm_core.reading.listing import Listing
from ldm_core.reading.loading import Loader, Window
from ldm_core.reading.mixture import Mixture
from ldm_core.reading.order import Key, Order, Stretch, batch_sizes, window_samples
from ldm_core.reading.row_groups import PATIENCE_S
from ldm_core.reading.sources import (
    bytes_per_sample,
    check_alike,
    mixed_statistics,
    shapes_of,
    units_of,
)
from ldm_core.reading.text_index import hash_of
from ldm_core.reading.windows import Part

MIB = 2**20


class StreamReader:
    """Batches of one or several stores in a global order; memory is that of a few windows.

    A step has `lanes` micro-batches of at most `budget` tokens, each of one bucket. Rank r of n
    takes the lanes r, r + n, …, so that what a step holds does not depend on n, and the state of a
    run is its step. All that is drawn for a sample depends on (seed, pass, id).

    Memory: at most 2 x `window_bytes` for each of the process's lanes (three times that, when steps
    are asked for out of order, and a row group more for each lane and bucket), `text_bytes`, and
    the row groups that `threads` decode.

    Attributes:
        shapes: of each bucket's latents, (C, h, w) or (C, T, h, w).
        statistics: by which the latents are normalised: a model keeps them.
        mean, std: (C,) float32, of these statistics.
        order: which samples each step has.
        digest: 16 hex digits of all that decides the order; a run that goes on where another has
            stopped compares it.
    """

    def __init__(
        self,
        indexes: Sequence[StoreIndex],
        *,
        seed: int,
        lanes: int,
        budget: int,
        tokens: Callable[[str], int],
        weights: Sequence[float | Fraction] | None = None,
        statistics: LatentStatistics | None = None,
        window_bytes: int = 256 * MIB,
        text_bytes: int = 1024 * MIB,
        threads: int = 4,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Read stores.

        Args:
            indexes: of the stores' versions, by `index_store`.
            seed: of the run.
            lanes: micro-batches of a step, over all workers: the recipe's, not the cluster's.
            budget: tokens of a micro-batch; a sample that has more is alone in its own.
            tokens: of one sample of a bucket "HxWxT".
            weights: how often each store is gone through in an epoch; once, if not given.
            statistics: other ones than the stores', such as those of a model to go on with.
            window_bytes: of a lane's windows, latents and texts; they decide the order, too.
            text_bytes: of decoded row groups of texts that are kept.
            threads: that read.
            patience_s: that an object store may be away; a warning tells of it.

        Raises:
            UserError: a setting out of range, or stores of different encoders.
        """
        check_alike(indexes)
        self.indexes, self.seed = tuple(indexes), seed
        self.shapes = shapes_of(indexes)
        self._mixture = Mixture(
            [units_of(index) for index in indexes],
            [1] * len(indexes) if weights is None else list(weights),
            seed,
        )
        sizes = batch_sizes(self.shapes, budget, tokens)
        each = bytes_per_sample(indexes, self.shapes)
        windows = window_samples(self._mixture, each, window_bytes)
        self.order = Order(self._mixture, lanes, sizes, windows, seed)
        self.digest = _digest(indexes, self._mixture, (seed, lanes, sizes, windows))
        self.statistics = statistics or mixed_statistics(indexes, self._mixture.weights)
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32)
            for values in (self.statistics.mean, self.statistics.std)
        )
        self._loader = Loader(indexes, seed, text_bytes, threads, patience_s)
        self._listing = Listing(indexes, self.order, seed)
        self._held: defaultdict[tuple[int, str], Held] = defaultdict(Held)

    def __enter__(self) -> "StreamReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._loader.close()

    @property
    def lanes(self) -> int:
        """M, micro-batches of a step."""
        return self.order.lanes

    @property
    def token_width(self) -> int:
        """D, width of the token embeddings."""
        return int(self.null_condition().tokens.shape[-1])

    @property
    def pooled_width(self) -> int:
        """P, width of the pooled embeddings."""
        return int(self.null_condition().pooled.shape[-1])

    @property
    def bytes(self) -> int:
        """Of the windows in memory and the texts kept."""
        return self._loader.texts.bytes + sum(held.bytes for held in list(self._held.values()))

    def null_condition(self) -> TextCondition:
        """The stored embedding of the empty caption, a batch of one."""
        return self._null

    @cached_property
    def _null(self) -> TextCondition:
        texts = self._loader.text(0, hash_of(pa.array([caption_digest("")])))
        return texts.condition(torch.zeros(1, dtype=torch.int64))

    def count_at(self, step: int) -> int:
        """Samples of a global step, all workers together."""
        slots = ((lane, self.order.slot(step, lane)) for lane in range(self.lanes))
        return sum(self.order.size(slot, lane) for lane, slot in slots)

    def batches(
        self, step: int, rank: int = 0, world: int = 1, epoch: int | None = None
    ) -> list[LatentBatch]:
        """What a worker computes at a step: one batch for each of its lanes.

        Args:
            step: global.
            rank, world: of the worker and of all; at most one worker for a lane.
            epoch: leave out the batches of others: the first and the last step of an epoch may have
                some.

        Raises:
            UserError: more workers than lanes, or rows that cannot be used.
            OSError: the store cannot be reached for as long as the reader is patient.
        """
        return [
            self._batch(lane, slot)
            for lane, slot in self._slots(step, rank, world)
            if epoch is None or slot.epoch == epoch
        ]

    def samples_at(self, step: int) -> list[list[str]]:
        """The sample ids of each of a step's micro-batches; no latents are read."""
        return [
            self._listing.ids(self._listing.rows(self.order.stretches(slot, lane)))
            for lane, slot in self._slots(step, 0, 1)
        ]

    def account(self, epochs: range) -> list[Account]:
        """How often each sample of each store is seen in some epochs; nothing is read."""
        return account(self.indexes, self.order, self._mixture, self.seed, epochs)

    def first(self, count: int, bucket: str | None = None) -> LatentBatch:
        """Up to `count` samples of the first row group of a bucket, whatever the lanes.

        For pictures that are drawn again and again: the same ones as long as the seed and the
        store's version are.

        Args:
            count: at most.
            bucket: of the first store that has it; None is that of most samples in the first store.

        Raises:
            UserError: no store has the bucket.
        """
        name = bucket or self.indexes[0].samples.main
        having = [k for k, index in enumerate(self.indexes) if name in index.samples.buckets]
        if not having:
            raise UserError(
                f"no store has the bucket {name}: choose one of {', '.join(self.shapes)}"
            )
        samples = self.indexes[having[0]].samples
        unit = int(samples.units(name)[0])
        count = min(count, int(samples.count[unit]))
        part = Part(source=having[0], unit=unit, turn=0, first=0, count=count, offset=0)
        window = self._loader.load([part], np.arange(count), self.shapes[name])
        return replace(batch_of(window, 0, count, self.seed, self.mean, self.std), bucket=name)

    def _slots(self, step: int, rank: int, world: int) -> Iterator[tuple[int, Slot]]:
        if not 0 <= rank < world <= self.lanes:
            raise UserError(
                f"worker {rank} of {world} at {self.lanes} lanes: a step has {self.lanes} "
                "micro-batches, so use at most as many workers, or a recipe of more lanes"
            )
        for lane in range(rank, self.lanes, world):
            yield lane, self.order.slot(step, lane)

    def _batch(self, lane: int, slot: Slot) -> LatentBatch:
        parts = [self._part(stretch) for stretch in self.order.stretches(slot, lane)]
        return replace(joined(parts), bucket=self.order.name(slot), epoch=slot.epoch)

    def _part(self, stretch: Stretch) -> LatentBatch:
        key = stretch.key
        _, bucket, lane, _ = key
        held = self._held[lane, bucket]
        window = held.get(key, partial(self._submit, key))
        if (following := self.order.next(key)) is not None:
            held.begin(following, partial(self._submit, following))
        batch = batch_of(window, stretch.start, stretch.end, self.seed, self.mean, self.std)
        held.took(key, stretch.end - stretch.start, len(window))
        return batch

    def _submit(self, key: Key) -> Future[Window]:
        return self._loader.submit(partial(self._load, key))

    def _load(self, key: Key) -> Window:
        parts = self.order.parts(key)
        return self._loader.load(parts, self.order.shuffle(key), self.shapes[key[1]])


def _digest(indexes: Sequence[StoreIndex], mixture: Mixture, settings: object) -> str:
    weights = [str(weight) for weight in mixture.weights]
    told = [[index.samples.digest for index in indexes], weights, settings]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
