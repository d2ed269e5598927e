"""Whoever writes while files are merged, and whenever that is killed: no row is lost or doubled."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from child_processes import PROCESSES
from store_faults import add_rows, sound_store
from table_contents import holds, ids_of, live, rows_of

from ldm_core.latents import commit
from ldm_core.latents import compact as compact_module
from ldm_core.latents.compact import TRANSACTION, compact, publish_compacted
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.vacuum import plan_vacuum

MB = 2**20


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(commit, "FIRST_PAUSE_S", 0.0)


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    return sound_store(tmp_path / "a store", count=40, parts=10)


class TestTransactions:
    def test_a_shard_is_still_known_to_be_in(self, version):
        """Beyond a checkpoint too, which keeps only the last of each transaction."""
        store = version.store
        compact(store, "samples", MB)
        store.open("samples").create_checkpoint()
        log = store.open("samples")
        assert [log.transaction_version(f"s{k}") for k in range(10)] == [1] * 10
        add_rows(store, "samples", store.table("samples").to_pylist()[:4], "s3")  # repeated
        assert store.dataset("samples").count_rows() == 40

    def test_a_lost_acknowledgement_does_not_repeat_it(self, version, monkeypatch):
        store, replace, lost = version.store, compact_module._replace, []

        def late(*args: object) -> None:
            replace(*args)
            lost.append(1)
            raise OSError("connection reset before the response")

        monkeypatch.setattr(compact_module, "_replace", late)
        before = rows_of(store, "samples")
        compact(store, "samples", MB)
        assert lost == [1]
        assert rows_of(store, "samples") == before

    def test_the_second_of_two_that_meet_is_refused(self, version, monkeypatch):
        """delta-rs' own compaction would let both in, and every row would be there twice."""
        store, merged, met = version.store, compact_module._merged, []

        def slow(*args: object) -> object:
            if not met:
                met.append(1)
                compact(LatentStore(store.uri), "samples", MB)  # another process is faster
            return merged(*args)

        monkeypatch.setattr(compact_module, "_merged", slow)
        before = rows_of(store, "samples")
        compact(store, "samples", MB)
        assert met
        assert rows_of(store, "samples") == before
        assert store.open("samples").transaction_version(TRANSACTION) == 1

    def test_a_deletion_in_between_makes_it_start_anew(self, version, monkeypatch):
        store, merged, met = version.store, compact_module._merged, []

        def slow(*args: object) -> object:
            if not met:
                met.append(1)
                delete_rows(store, "samples", pa.table({"id": ["001.png", "007.png"]}))
            return merged(*args)

        monkeypatch.setattr(compact_module, "_merged", slow)
        compact(store, "samples", MB)
        assert ids_of(store) == [f"{k:03d}.png" for k in range(40) if k not in (1, 7)]
        assert live(store).num_rows == 1

    def test_a_compaction_during_a_deletion_makes_the_deletion_start_anew(
        self, version, monkeypatch
    ):
        store, opened, met = version.store, LatentStore.open, []

        def open_table(self: LatentStore, *args: object) -> object:
            log = opened(self, *args)
            if not met:
                met.append(1)
                compact(LatentStore(store.uri), "samples", MB)
            return log

        monkeypatch.setattr(LatentStore, "open", open_table)
        delete_rows(store, "samples", pa.table({"id": ["001.png", "007.png"]}))
        assert ids_of(store) == [f"{k:03d}.png" for k in range(40) if k not in (1, 7)]


def compact_and_die(uri: str, committed: bool) -> None:
    """Compact until the new file is written, or until it is committed as well."""
    replace, merged = compact_module._replace, compact_module._merged

    def die_after(step: Callable[..., object]) -> Callable[..., None]:
        def run(*args: object) -> None:
            step(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        return run

    compact_module._replace = die_after(replace) if committed else replace
    compact_module._merged = merged if committed else die_after(merged)
    compact(LatentStore(uri), "samples", MB)


class TestKilled:
    @pytest.mark.parametrize("committed", [False, True])
    def test_it_is_done_or_not_and_can_be_repeated(self, version, committed):
        store, before = version.store, rows_of(version.store, "samples")
        process = PROCESSES.Process(target=compact_and_die, args=(store.uri, committed))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert rows_of(store, "samples") == before
        assert live(store).num_rows == (1 if committed else 10)
        left = plan_vacuum(store, older_than_hours=0).abandoned
        assert len(left) == (0 if committed else 1)
        compact(store, "samples", MB)
        assert live(store).num_rows == 1
        assert rows_of(store, "samples") == before
        assert publish_compacted(store) == version.number + 1
        assert holds(store.open_version())


class TestWritersMeanwhile:
    def test_eight_writers_and_two_compactions_at_a_time(self, version):
        store, writers, rounds = version.store, 8, 2
        gate = PROCESSES.Barrier(writers + 2)
        each = [
            PROCESSES.Process(target=append, args=(store.uri, w, rounds, gate))
            for w in range(writers)
        ]
        other = [PROCESSES.Process(target=compact_often, args=(store.uri, gate)) for _ in range(2)]
        for process in each + other:
            process.start()
        for process in each + other:
            process.join()
        assert [process.exitcode for process in each + other] == [0] * (writers + 2)
        expected = [f"{k:03d}.png" for k in range(40)]
        expected += [f"{w}-{k}.png" for w in range(writers) for k in range(rounds)]
        assert ids_of(store) == sorted(expected)
        log = store.open("samples")
        assert log.transaction_version(TRANSACTION) > 1
        assert all(
            log.transaction_version(f"w{w}-{k}") for w in range(writers) for k in range(rounds)
        )
        compact(store, "samples", MB)
        assert ids_of(store) == sorted(expected)
        assert live(store).num_rows == 1
        assert holds(version)


def append(uri: str, writer: int, rounds: int, gate: object) -> None:
    """What an encode job does, one sample a shard."""
    store = LatentStore(uri)
    row = store.table("samples").to_pylist()[0]
    gate.wait()
    for k in range(rounds):
        add_rows(store, "samples", [row | {"id": f"{writer}-{k}.png"}], f"w{writer}-{k}")


def compact_often(uri: str, gate: object) -> None:
    gate.wait()
    for _ in range(4):
        compact(LatentStore(uri), "samples", MB)
