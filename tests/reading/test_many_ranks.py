"""How often an object is asked for, and what is held: by a few readers and by sixty-four."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from bucket_store import SQUARE, WIDE, bucket_store
from many_ranks import read_in_processes, requests_counted

from ldm_core.latents.store import StoreVersion
from ldm_core.reading.index import StoreIndex, index_store
from ldm_core.reading.row_groups import Place, TableFiles
from ldm_core.reading.stream import StreamReader
from ldm_core.training.prefetch import prefetch

COUNTS = {SQUARE: 640, WIDE: 320}  # 120 row groups of 8


class Reads:
    """Row groups read, and how many decoded ones were alive at a time."""

    def __init__(self) -> None:
        self.made: Counter[tuple[str, int]] = Counter()
        self.alive = self.most = 0
        self.lock = threading.Lock()

    def count(self, files: TableFiles, place: Place, table: object) -> None:
        with self.lock:
            self.made[f"{files.uri}/{place.path}", place.number] += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(table, self.gone)

    def gone(self) -> None:
        with self.lock:
            self.alive -= 1

    def of(self, table: str) -> Counter[tuple[str, int]]:
        return Counter({key: n for key, n in self.made.items() if f"/{table}/" in key[0]})


@pytest.fixture
def reads(monkeypatch) -> Iterator[Reads]:
    found, read = Reads(), TableFiles.read

    def counting(self: TableFiles, place: Place, columns: object) -> object:
        table = read(self, place, columns)
        found.count(self, place, table)
        return table

    monkeypatch.setattr(TableFiles, "read", counting)
    return found


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> StoreVersion:
    captions = [f"the dog number {k}" for k in range(300)]
    return bucket_store(tmp_path_factory.mktemp("s"), COUNTS, captions=captions, texts_of=40)


@pytest.fixture(scope="module")
def index(version) -> StoreIndex:
    return index_store(version)


def reader_of(index: StoreIndex, lanes: int, **options) -> StreamReader:
    settings = {"seed": 0, "budget": 64, "tokens": lambda _: 16, "window_bytes": 20_000}
    return StreamReader([index], lanes=lanes, **(settings | options))


def run(reader: StreamReader, rank: int, world: int, epochs: int = 1) -> int:
    """Samples that a rank reads in some epochs; the step across the last one's end is left out."""
    end = reader.order.steps(epochs).start
    steps = prefetch(lambda step: reader.batches(step, rank, world), 0, end, ahead=2)
    return sum(len(batch) for _, batches in steps for batch in batches)


class TestRequests:
    @pytest.mark.parametrize(("lanes", "world"), [(1, 1), (4, 1), (4, 2), (6, 3)])
    def test_a_row_group_is_read_once_by_one_lane_or_by_two_at_their_border(
        self, index, reads, lanes, world
    ):
        ranks = [reader_of(index, lanes) for _ in range(world)]
        groups = len(index.samples.groups)
        total = sum(run(reader, rank, world) for rank, reader in enumerate(ranks))
        assert total > 900
        for reader in ranks:
            reader.close()
        made = reads.of("samples")
        epochs = 2  # the next one's first windows are read ahead
        assert max(made.values()) <= 2 * epochs
        first = {key for key, n in made.items() if n}
        assert len(first) == groups
        ahead = lanes * 2 * 8  # windows of the next epoch, of so many row groups at most
        assert sum(made.values()) <= groups + 2 * (lanes - 1) + ahead

    def test_texts_are_read_once_if_they_fit(self, index, reads):
        with reader_of(index, 2) as reader:
            run(reader, 0, 1, epochs=2)
        made = reads.of("texts")
        assert len(made) == len(index.texts.groups)
        assert set(made.values()) == {1}

    def test_texts_that_do_not_fit_are_read_again_and_not_kept(self, index, reads):
        with reader_of(index, 2, text_bytes=3000) as reader:
            for step in range(40):
                reader.batches(step)
                assert reader._loader.texts.bytes <= 3000
        assert max(reads.of("texts").values()) > 1


class TestMemory:
    def test_decoded_row_groups_live_no_longer_than_they_are_copied(self, index, reads):
        with reader_of(index, 2, threads=3, text_bytes=3000) as reader:
            run(reader, 0, 1)
        assert 1 <= reads.most <= 3 + 2  # threads, and what their last tasks hold until the next

    def test_windows_are_within_their_bytes_however_long_the_run(self, index):
        """Two windows a lane and bucket, and the row groups that stick out at their ends."""
        lanes, window = 3, 20_000
        group = 8 * (128 + 60 + 8 * 5)  # latents, text and numbers of a row group
        bound = 2 * window + 2 * 2 * 2 * group
        with reader_of(index, lanes, text_bytes=1, window_bytes=window) as reader:
            most = 0
            for step in range(reader.order.steps(2).start):
                reader.batches(step)
                most = max(most, reader.bytes)
        assert window < most <= lanes * bound

    def test_steps_out_of_order_are_right_and_bounded_as_well(self, index):
        with reader_of(index, 2) as reader, reader_of(index, 2) as other:
            steps = [40, 3, 39, 4, 80, 0, 41]
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(reader.batches, steps))
            for step, batches in zip(steps, found, strict=True):
                expected = [batch.ids.tolist() for batch in other.batches(step)]
                assert [batch.ids.tolist() for batch in batches] == expected
            assert all(len(held._windows) <= 3 for held in reader._held.values())


class TestSixtyFourRanks:
    """As many readers as a job of 64 workers has, in threads, against one store."""

    RANKS = 64

    def test_no_object_is_hot_and_nobody_holds_much(self, index, reads):
        begin = time.perf_counter()
        first: list[float] = []
        held: list[int] = []

        def rank(number: int) -> list[int]:
            keys: list[int] = []
            with reader_of(index, self.RANKS, threads=1) as reader:
                for step in range(reader.order.steps(1).start):
                    for batch in reader.batches(step, number, self.RANKS, epoch=0):
                        keys += batch.ids.tolist()
                        first.append(time.perf_counter() - begin)
                    held.append(reader.bytes - reader._loader.texts.bytes)
            return keys

        with ThreadPoolExecutor(self.RANKS) as pool:
            keys = [key for found in pool.map(rank, range(self.RANKS)) for key in found]
        assert (
            len(keys) == len(set(keys)) > 700
        )  # the rest is in the step across the epochs' border
        per_object = Counter()
        for (path, _), count in reads.of("samples").items():
            per_object[path] += count
        lanes_per_group = 8 / (sum(COUNTS.values()) / self.RANKS / 2) + 1  # of each bucket
        assert max(per_object.values()) <= 2 * (lanes_per_group + 2)  # and the epoch to come
        assert sum(per_object.values()) <= 2 * (len(index.samples.groups) + 2 * self.RANKS)
        assert max(held) < 40_000  # of 400 kB
        print(f"first batch after {min(first):.2f} s, all of {len(keys)} after {max(first):.2f} s")

    def test_on_s3_each_row_group_is_one_request(self, s3, reads, monkeypatch):
        made: Counter[str] = Counter()
        fetch = TableFiles.fetch

        def counting(self: TableFiles, path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
            made[f"{self.uri}/{path}"] += len(ranges)
            return fetch(self, path, ranges)

        index = index_store(bucket_store(f"{s3}/ranks", {SQUARE: 256}, group=16))
        monkeypatch.setattr(TableFiles, "fetch", counting)
        reads.made.clear()  # what the index read

        def rank(number: int) -> int:
            with reader_of(index, self.RANKS, threads=1) as reader:
                return sum(len(batch) for batch in reader.batches(0, number, self.RANKS))

        with ThreadPoolExecutor(self.RANKS) as pool:
            assert sum(pool.map(rank, range(self.RANKS))) == 256  # an epoch in one step
        samples = {key: n for key, n in made.items() if "/samples/" in key}
        assert len(samples) == 16
        groups = reads.of("samples")
        assert sum(samples.values()) == sum(groups.values())  # one request for each read
        # 4 samples for each lane: a row group is for 4 or 5 of them, of this epoch and of the next
        assert max(samples.values()) <= 10


@pytest.mark.slow
class TestSixtyFourRanksInProcesses:
    """Eight processes of eight ranks, whose requests are counted on their way to the bucket."""

    RANKS, PROCESSES, BATCH, GROUP = 64, 8, 8, 32
    LATENT = (4, 32, 32)  # 16 KiB for mean and log-variance

    def test_no_object_is_hot_and_nobody_holds_much(self, s3):
        """However long the run: of three times the samples a rank holds as much."""
        short, long = (self.grown(s3, count) for count in (4096, 12288))
        assert long < 1.2 * short
        assert long < 12  # two windows of 16 samples, texts, row groups decoded, a client's buffers

    def grown(self, s3: str, count: int) -> float:
        """MiB by which a rank grows that reads its share of a store."""
        bucket = "32x32x1"
        version = bucket_store(
            f"{s3}/processes-{count}",
            {bucket: count},
            self.GROUP,
            statistics=None,
            shapes={bucket: self.LATENT},
        )
        index = index_store(version)
        options = {"budget": self.BATCH, "window_bytes": 1 << 18, "text_bytes": 1 << 18}
        with requests_counted() as asked:
            found = read_in_processes(index, self.RANKS, self.PROCESSES, 1000, options)
        ranks = [rank for process in found for rank in process.ranks]
        assert sorted(rank.number for rank in ranks) == [*range(self.RANKS)]
        ids = [id for rank in ranks for id in rank.ids]
        assert len(ids) == len(set(ids))
        assert count - len(ids) < self.RANKS * self.BATCH  # in the step across the epochs

        samples = Counter({path: n for path, n in asked.items() if "/samples/" in path})
        assert len(samples) == len(index.samples.groups.paths) == count // self.GROUP
        # a lane's samples are so many row groups, or parts of one more; and of the epoch to come
        lane, warm = count // self.RANKS // self.GROUP + 1, self.PROCESSES
        assert sum(samples.values()) <= 2 * self.RANKS * lane + warm
        most = samples.most_common(1)[0][1]
        assert most <= 2 * 3 + warm  # lanes that meet in it, in two epochs
        grown = max(process.grown / len(process.ranks) for process in found) / 2**20
        size = count * 4 * 4 * 32 * 32 / 2**20
        print(f"{max(rank.first_s for rank in ranks):.2f} s to the last rank's first batch")
        print(f"{sum(samples.values())} requests for {len(samples)} objects, at most {most} each")
        print(f"{grown:.1f} MiB a rank, of a store of {size:.0f} MiB")
        return grown
