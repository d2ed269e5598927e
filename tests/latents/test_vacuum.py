"""What goes and what stays; the process is killed for real, at any of its removals."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
from child_processes import PROCESSES
from store_faults import add_sample, data_files, reject, sound_store
from written_stores import laid_down

from ldm_core.errors import UserError
from ldm_core.latents import vacuum as vacuum_module
from ldm_core.latents.compact import compact, publish_compacted
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.vacuum import DataFile, plan_vacuum, vacuum
from ldm_core.latents.verify import verify

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    """Versions 1 (without rejects) to 5: of rows added, removed, and in other files."""
    return laid_down(tmp_path / "a store", five_versions).store


def five_versions(uri: str) -> None:
    store = sound_store(uri).store
    add_sample(store, "new.png", "a new caption")
    delete_rows(store, "samples", pa.table({"id": ["001.png", "new.png"]}))
    add_sample(store, "other.png")
    compact(store, "samples", 2**20)
    publish_compacted(store)
    assert store.versions() == [1, 2, 3, 4, 5]


def holds(version: StoreVersion) -> bool:
    return not any(check.failed for check in verify(version, None))


def files(store: LatentStore) -> set[str]:
    paths = Path(store.uri).glob("*/*.parquet")
    return {path.relative_to(store.uri).as_posix() for path in paths}


def needed(store: LatentStore, *versions: int) -> set[str]:
    """By the Delta logs, of versions and the present state."""
    pinned = [store.open_version(number).manifest.tables for number in versions]
    return {
        f"{table}/{path}"
        for tables in (*pinned, dict.fromkeys(TABLES))
        for table, at in tables.items()
        for path in pa.table(store.open(table, at).get_add_actions())["path"].to_pylist()
    }


def names(found: tuple[DataFile, ...]) -> set[str]:
    return {f"{file.table}/{file.path}" for file in found}


def age(path: Path, hours: float) -> None:
    then = time.time() - hours * HOUR
    os.utime(path, (then, then))


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 9])
def test_what_kept_versions_and_the_present_need_stays_byte_for_byte(store, keep):
    kept = store.versions()[-keep:]
    before = {n: {t: store.open_version(n).table(t) for t in TABLES} for n in kept}
    contents = {path: Path(store.uri, path).read_bytes() for path in needed(store, *kept)}
    log = {p: p.read_bytes() for p in Path(store.uri).glob("*/_delta_log/*")}
    vacuum(store, plan_vacuum(store, keep))
    assert store.versions() == kept
    assert files(store) == needed(store, *kept) == contents.keys()
    assert {path: Path(store.uri, path).read_bytes() for path in contents} == contents
    assert {p: p.read_bytes() for p in Path(store.uri).glob("*/_delta_log/*")} == log
    for number in kept:
        version = store.open_version(number)
        assert holds(version)
        assert {table: version.table(table) for table in TABLES} == before[number]


def test_the_present_state_stays_though_no_version_has_it(store):
    delete_rows(store, "samples", pa.table({"id": ["002.png"]}))
    vacuum(store, plan_vacuum(store, 1))
    assert store.dataset("samples").count_rows() == 11
    assert holds(store.open_version())
    assert len(store.open_version().table("samples")) == 12


def test_a_plan_removes_nothing_and_tells_all(store):
    before, size = files(store), sum(p.stat().st_size for p in Path(store.uri).glob("*/*.parquet"))
    plan = plan_vacuum(store, 1)
    assert (plan.kept, plan.versions) == ((5,), (1, 2, 3, 4))
    assert files(store) == before
    assert before - names(plan.files) == needed(store, 5)
    left = sum(Path(store.uri, path).stat().st_size for path in needed(store, 5))
    assert sum(file.bytes for file in plan.files) == size - left
    assert plan.abandoned == plan.young == ()


def test_uncommitted_files_stay_while_they_are_young(store):
    row = pa.Table.from_pylist([reject("c.txt")], schema=TABLES["rejects"])
    young, old = (store.write_part("rejects", row, shard) for shard in ("young", "old"))
    half = Path(store.uri, "samples", ".part-killed")  # a kill while a file is written
    half.write_bytes(b"PAR1")
    for path in (half, Path(store.uri, "rejects", old.path)):
        age(path, 25)
    age(Path(store.uri, "rejects", young.path), 23)
    for file in Path(store.uri).glob("samples/s?-*.parquet"):
        age(file, 1000)  # what is needed stays, however old
    plan = plan_vacuum(store, 5)
    assert names(plan.abandoned) == {f"rejects/{old.path}", "samples/.part-killed"}
    assert names(plan.young) == {f"rejects/{young.path}"}
    assert plan.superseded == ()
    vacuum(store, plan)
    store.commit("rejects", [young], "young")  # what the running job does next
    assert store.dataset("rejects").count_rows() == 3
    assert not half.exists()
    assert names(plan_vacuum(store, 5, older_than_hours=22).abandoned) == set()


def test_superseded_files_go_however_young(store):
    assert names(plan_vacuum(store, 1).superseded) == files(store) - needed(store, 5)


def test_a_version_published_in_between_stops_it(store):
    plan, before = plan_vacuum(store, 1), files(store)
    add_sample(store, "late.png")
    with pytest.raises(UserError, match=r"new version \[6\].*again when it has ended"):
        vacuum(store, plan)
    assert before <= files(store)
    assert len(store.versions()) == 6


def test_another_vacuum_at_the_same_time_is_no_harm(store):
    plans = [plan_vacuum(store, keep) for keep in (2, 1)]
    for plan in plans:
        vacuum(store, plan)
    assert store.versions() == [5]
    assert files(store) == needed(store, 5)


@pytest.mark.parametrize(("keep", "hours"), [(0, 24), (-1, 24), (1, -2)])
def test_numbers_out_of_range_are_refused(store, keep, hours):
    with pytest.raises(UserError, match=f"keep {keep} versions and files of {hours} hours"):
        plan_vacuum(store, keep, hours)


def test_without_a_version_there_is_nothing_to_keep(tmp_path):
    LatentStore(str(tmp_path)).create()
    with pytest.raises(UserError, match="no published version"):
        plan_vacuum(LatentStore(str(tmp_path)))


def with_an_uncommitted_file(uri: str) -> None:
    store = sound_store(uri).store
    add_sample(store, "new.png")
    delete_rows(store, "samples", pa.table({"id": ["001.png"]}))
    row = pa.Table.from_pylist([reject("c.txt")], schema=TABLES["rejects"])
    store.write_part("rejects", row, "young")
    add_sample(store, "other.png")


def test_on_s3(s3):
    store = laid_down(f"{s3}/vacuum/a store", with_an_uncommitted_file).store
    plan = plan_vacuum(store, 1)
    assert (len(plan.superseded), len(plan.young)) == (1, 1)
    vacuum(store, plan)
    assert store.versions() == [4]
    assert holds(store.open_version())
    assert len(plan_vacuum(store, 1, older_than_hours=0).abandoned) == 1


# Killed, and killed again


def vacuum_and_die(uri: str, keep: int, removals: int, after: bool) -> None:
    """Vacuum until so many removals are done; the last of them, half of the time, not quite."""
    remove, done = vacuum_module.remove, []

    def die_at_last(path: str) -> None:
        done.append(path)
        if after:
            remove(path)
        if len(done) >= removals:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            remove(path)

    vacuum_module.remove = die_at_last
    store = LatentStore(uri)
    vacuum(store, plan_vacuum(store, keep, older_than_hours=0))


def test_whenever_it_is_killed_every_listed_version_has_all_its_files(store):
    rng = random.Random(0)
    for round in range(6):
        gone = rng.choice(store.table("samples", columns=["id"])["id"].to_pylist())
        delete_rows(store, "samples", pa.table({"id": [gone]}))
        for k in range(2):
            add_sample(store, f"{round}-{k}.png", rng.choice(["a dog", f"caption {round}"]))
        keep = rng.randint(1, 3)
        plan = plan_vacuum(store, keep, older_than_hours=0)
        removals = rng.randint(1, len(plan.versions) + len(plan.files))
        arguments = (store.uri, keep, removals, rng.random() < 0.5)
        process = PROCESSES.Process(target=vacuum_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert set(store.versions()) >= set(plan.kept)
        assert all(holds(store.open_version(number)) for number in store.versions())
    vacuum(store, plan_vacuum(store, 1, older_than_hours=0))
    assert files(store) == needed(store, *store.versions())
    assert holds(store.open_version())


def test_a_version_unpublished_after_its_files_would_not_hold(store):
    """The order is what the above rests on: the other way round is found out."""
    broken = LatentStore(shutil.copytree(store.uri, f"{store.uri} copy"))
    for file in plan_vacuum(broken, 1).files[:1]:
        Path(broken.uri, file.table, file.path).unlink()
    assert not all(holds(broken.open_version(number)) for number in broken.versions())
    assert data_files(broken.open_version(), "samples")
