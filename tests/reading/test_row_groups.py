import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket_store import SQUARE, bucket_store

from ldm_core.files import read_bytes, write_bytes
from ldm_core.latents.store import StoreVersion
from ldm_core.reading import row_groups
from ldm_core.reading.byte_cache import ByteCache
from ldm_core.reading.index import index_store
from ldm_core.reading.row_groups import Place, TableFiles, coalesced
from ldm_core.reading.sample_index import COLUMNS


@pytest.fixture
def requests(monkeypatch) -> list[tuple[str, int, int]]:
    """Ranges asked of object stores."""
    made: list[tuple[str, int, int]] = []
    fetch = TableFiles.fetch

    def counting(self, path, ranges):
        made.extend((path, start, end) for start, end in ranges)
        return fetch(self, path, ranges)

    monkeypatch.setattr(TableFiles, "fetch", counting)
    return made


@pytest.fixture
def remote(s3, tmp_path) -> StoreVersion:
    return bucket_store(f"{s3}/groups/{tmp_path.name}", {SQUARE: 16})


def test_ranges_close_together_are_one():
    assert coalesced([(90, 95), (0, 10), (12, 20), (40, 50)], gap=5) == [
        (0, 20),
        (40, 50),
        (90, 95),
    ]
    assert coalesced([(0, 10), (2, 5)], gap=0) == [(0, 10)]


def test_remote_and_local_rows_are_the_same(remote, tmp_path):
    local = index_store(bucket_store(tmp_path / "local", {SQUARE: 16})).samples
    there = index_store(remote).samples
    for unit in range(2):
        one, other = (
            TableFiles(each.groups.uri).read(each.groups.place(int(each.group[unit])), COLUMNS)
            for each in (local, there)
        )
        assert one.equals(other)
        assert set(one.column_names) == set(COLUMNS)


def test_a_small_file_is_one_request(remote, requests):
    groups = index_store(remote).samples.groups
    requests.clear()
    TableFiles(groups.uri).read(groups.place(0), COLUMNS)
    assert len(requests) == 1


def big_file(uri: str, groups: int) -> tuple[str, int]:
    """Row groups with wide columns on both sides of the two that are wanted."""
    rows = 10 * groups
    noise = np.random.default_rng(0)
    wide = [noise.bytes(60_000) for _ in range(rows)]
    table = pa.table(
        {"a": range(rows), "left": wide, "b": [b"x" * 500] * rows, "right": wide, "c": range(rows)}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10)
    data = sink.getvalue().to_pybytes()
    write_bytes(f"{uri}/file.parquet", data)
    return "file.parquet", len(data)


class TestLargeFile:
    def test_only_what_is_wanted_travels(self, s3, requests):
        path, size = big_file(f"{s3}/large", 3)
        files = TableFiles(f"{s3}/large")
        found = files.read(Place(path, size, 1), ("a", "b"))
        assert found["a"].to_pylist() == list(range(10, 20))
        assert found.num_columns == 2
        assert sum(end - start for _, start, end in requests) < 80_000 < size / 20
        assert len(requests) == 3  # the footer, and columns that lie far apart

    def test_its_footer_is_read_once(self, s3, requests):
        path, size = big_file(f"{s3}/large", 3)
        files = TableFiles(f"{s3}/large")
        for number in (0, 1, 2, 0):
            files.read(Place(path, size, number), ("b",))
        assert len(requests) == 1 + 4

    def test_a_footer_longer_than_guessed(self, s3, requests, monkeypatch):
        path, size = big_file(f"{s3}/large", 3)
        monkeypatch.setattr(row_groups, "_TAIL", 100)
        found = TableFiles(f"{s3}/large").read(Place(path, size, 2), ("a",))
        assert found["a"].to_pylist() == list(range(20, 30))

    def test_a_hint_makes_the_first_read_one_trip(self, s3, requests):
        path, size = big_file(f"{s3}/large", 3)
        footer = TableFiles(f"{s3}/large").footer(path, size)
        begin = size - footer.serialized_size - 8
        (span,) = row_groups.column_ranges(footer, 1, ("b",))
        requests.clear()
        found = TableFiles(f"{s3}/large").read(Place(path, size, 1, span, begin), ("b",))
        assert found.num_rows == 10
        assert Counter(requests) == {(path, *span): 1, (path, begin, size): 1}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_flipped_byte_is_noticed(where, tmp_path, request):
    root = tmp_path / "flip" if where == "local" else f"{request.getfixturevalue('s3')}/flip"
    version = bucket_store(root, {SQUARE: 8})
    groups = index_store(version).samples.groups
    place = groups.place(0)
    uri = f"{groups.uri}/{place.path}"
    data = bytearray(read_bytes(uri))
    footer = pq.read_metadata(pa.BufferReader(bytes(data)))
    (chunk,) = row_groups.column_ranges(footer, 0, ("latent_logvar",))
    data[chunk[1] - 3] ^= 4
    write_bytes(uri, bytes(data))
    with pytest.raises(OSError, match="(?i)crc|checksum|zstd"):
        TableFiles(groups.uri).read(place, COLUMNS)


def test_a_missing_file_is_an_os_error(tmp_path):
    groups = index_store(bucket_store(tmp_path, {SQUARE: 8})).samples.groups
    place = groups.place(0)
    Path(groups.uri, place.path).unlink()
    with pytest.raises(FileNotFoundError):
        TableFiles(groups.uri).read(place, COLUMNS)


class TestByteCache:
    def test_the_least_recently_used_goes(self):
        cache: ByteCache[str] = ByteCache(10)
        for key in "abc":
            cache.get(key, lambda key=key: (key, 4))
        assert (cache.peek("a"), cache.peek("b"), cache.bytes) == (None, "b", 8)
        cache.get("d", lambda: ("d", 4))
        assert (cache.peek("b"), cache.peek("c")) == ("b", None)

    def test_what_is_larger_than_all_is_given_but_not_kept(self):
        cache: ByteCache[str] = ByteCache(10)
        assert cache.get("a", lambda: ("a", 11)) == "a"
        assert (cache.peek("a"), cache.bytes) == (None, 0)

    def test_an_error_is_not_kept(self):
        cache: ByteCache[str] = ByteCache(10)

        def fail() -> tuple[str, int]:
            raise OSError("away")

        with pytest.raises(OSError, match="away"):
            cache.get("a", fail)
        assert cache.get("a", lambda: ("a", 1)) == "a"

    def test_two_who_ask_at_a_time_load_once(self):
        cache: ByteCache[int] = ByteCache(10)
        gate = threading.Event()

        def slow() -> tuple[int, int]:
            gate.wait(10)
            return 7, 1

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(cache.get, "a", slow) for _ in range(4)]
            gate.set()
            assert [future.result() for future in futures] == [7] * 4
        assert cache.loads == 1
