"""The storage misbehaves; the tables must hold every row once."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, SchemaMismatchError
from test_store import add, ids_of

from ldm_core.latents import commit
from ldm_core.latents.commit import CommitFailed, put_if_absent, retry
from ldm_core.latents.store import LatentStore

WRITE = DeltaTable.create_write_transaction


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(commit, "FIRST_PAUSE_S", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    store = LatentStore(str(tmp_path))
    store.create()
    return store


def faulty(monkeypatch, fault: Callable[[Callable[[], None]], None]) -> None:
    """Let `fault` decide what becomes of each commit it is given."""

    def write(self: DeltaTable, *args: object, **options: object) -> None:
        fault(lambda: WRITE(self, *args, **options))

    monkeypatch.setattr(DeltaTable, "create_write_transaction", write)


def test_lost_acknowledgements_over_twenty_rounds(store, monkeypatch):
    rng, lost = random.Random(0), []

    def fault(write: Callable[[], None]) -> None:
        write()
        if rng.random() < 0.6:
            lost.append(1)
            raise OSError("Generic S3 error: connection reset before the response")

    faulty(monkeypatch, fault)
    for k in range(20):
        add(store, f"shard{k}", f"{k}a", f"{k}b")
    assert ids_of(store) == sorted(f"{k}{end}" for k in range(20) for end in "ab")
    assert len(lost) > 5
    assert store.open("samples").version() == 20


def test_errors_before_the_commit_are_retried(store, monkeypatch):
    kinds = [OSError("connection refused"), CommitFailedError("transaction: 15"), TimeoutError()]

    def fault(write: Callable[[], None]) -> None:
        if kinds:
            raise kinds.pop()
        write()

    faulty(monkeypatch, fault)
    add(store, "s", "a")
    assert ids_of(store) == ["a"]
    assert kinds == []


def test_reading_the_log_may_fail_as_well(store, monkeypatch):
    part_of = LatentStore.open
    failures = [OSError("down"), OSError("down")]

    def open_table(self: LatentStore, *args: object) -> DeltaTable:
        if failures:
            raise failures.pop()
        return part_of(self, *args)

    monkeypatch.setattr(LatentStore, "open", open_table)
    add(store, "s", "a")
    assert ids_of(store) == ["a"]


def test_a_repeated_shard_of_another_process_is_not_added_again(store):
    add(store, "s", "a", "b")
    add(LatentStore(store.uri), "s", "a", "b")
    assert ids_of(store) == ["a", "b"]


def test_giving_up_is_bounded_and_says_what_to_do(store, monkeypatch):
    calls = []

    def fault(write: Callable[[], None]) -> None:
        calls.append(1)
        raise OSError("connection refused")

    faulty(monkeypatch, fault)
    with pytest.raises(CommitFailed, match=r"shard s.*connection refused.*run the same command"):
        add(store, "s", "a")
    assert len(calls) == commit.ATTEMPTS
    assert ids_of(store) == []


@pytest.mark.parametrize("error", [SchemaMismatchError("int for string"), PermissionError("403")])
def test_what_will_not_mend_itself_is_not_retried(store, monkeypatch, error):
    calls = []

    def fault(write: Callable[[], None]) -> None:
        calls.append(1)
        raise error

    faulty(monkeypatch, fault)
    with pytest.raises(type(error)):
        add(store, "s", "a")
    assert len(calls) == 1


def test_our_own_bugs_are_not_retried():
    calls = []

    def bug() -> None:
        calls.append(1)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        retry("do it", bug)
    assert len(calls) == 1


def test_put_if_absent_leaves_the_first(tmp_path):
    uri = f"{tmp_path}/folder/file"
    put_if_absent(uri, b"first")
    with pytest.raises(FileExistsError):
        put_if_absent(uri, b"second")
    assert Path(uri).read_bytes() == b"first"
    assert [path.name for path in Path(uri).parent.iterdir()] == ["file"]


def test_put_if_absent_on_s3(s3):
    put_if_absent(f"{s3}/put/file", b"first")
    with pytest.raises(FileExistsError):
        put_if_absent(f"{s3}/put/file", b"second")


def test_a_store_on_s3(s3, monkeypatch):
    store = LatentStore(f"{s3}/commit faults")
    store.create()
    first = []

    def fault(write: Callable[[], None]) -> None:
        write()
        if not first:
            first.append(1)
            raise OSError("lost")

    faulty(monkeypatch, fault)
    add(store, "s", "a", "b")
    add(store, "t", "c")
    assert ids_of(store) == ["a", "b", "c"]
    assert store.versions() == []
