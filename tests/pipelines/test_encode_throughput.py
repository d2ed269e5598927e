"""What is told of an encode's speed adds up."""

from pathlib import Path

import pytest
from picture_folder import picture, write_captions
from test_encode_media import project
from tiny_runs import encode_here

from pipelines.encode_throughput import (
    COMMIT,
    DECODE,
    ENCODE,
    READ,
    TEXT,
    WRITE,
    Throughput,
    Work,
)
from pipelines.recipes.sections import Workers
from pipelines.tracking import Run


def told(**kinds: tuple[int, int, float]) -> str:
    throughput = Throughput()
    throughput.kinds = {kind: Work(*values) for kind, values in kinds.items()}
    return throughput.tell()


def test_work_of_several_workers_adds_up():
    throughput = Throughput()
    throughput.add(told(decode=(10, 5_000_000, 2.0), encode=(10, 0, 4.0)))
    throughput.add(told(decode=(6, 3_000_000, 2.0), encode=(6, 0, 4.0)))
    throughput.add("")
    metrics = throughput.metrics()
    assert metrics["throughput/decode_per_second"] == 4.0
    assert metrics["throughput/decode_bytes_per_second"] == 2e6
    assert metrics["throughput/encode_per_second"] == 2.0
    assert metrics["throughput/encode_seconds"] == 8.0
    assert "throughput/encode_bytes_per_second" not in metrics


def test_waiting_is_the_share_of_the_workers_time_without_work():
    throughput = Throughput()
    throughput.add(
        told(read=(4, 0, 1.0), decode=(4, 0, 3.0), encode=(4, 0, 6.0), write=(4, 0, 2.0))
    )
    throughput.add(told(commit=(4, 0, 50.0)))  # the driver's, not theirs
    assert throughput.waiting(10.0, 2, decoding=True) == pytest.approx(0.4)
    assert throughput.waiting(10.0, 2, decoding=False) == pytest.approx(0.6)
    assert throughput.waiting(1.0, 1, decoding=True) == 0.0  # clocks of several machines


def test_what_is_timed_is_counted_also_when_it_fails():
    throughput = Throughput()

    def fail() -> None:
        with throughput.timed(DECODE, 3, 100):
            raise ValueError

    with pytest.raises(ValueError, match="^$"):
        fail()
    assert list(throughput.each(READ, "abc")) == ["a", "b", "c"]
    assert (throughput.kinds[DECODE].items, throughput.kinds[DECODE].bytes) == (3, 100)
    assert throughput.kinds[READ].items == 3


def test_the_table_has_a_line_for_each_stage(capsys):
    throughput = Throughput()
    throughput.add(told(commit=(8, 4000, 1.0), decode=(8, 0, 1.0), encode=(8, 0, 2.0)))
    throughput.print(0.25)
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "throughput of one worker"
    assert [line.split()[0] for line in lines[:3]] == [DECODE, ENCODE, COMMIT]
    assert lines[1].split() == ["encode", "8", "4.0", "50", "%"]
    assert lines[-1] == "[encode] workers waited 25 % of their time"


def test_a_run_tells_its_figures(tmp_path: Path, monkeypatch):
    """A file that the listing refuses, one that cannot be decoded, and four that are encoded."""
    (tmp_path / "data").mkdir()
    for k in range(4):
        picture(k).save(tmp_path / "data" / f"{k}.png")
    (tmp_path / "data" / "bad.png").write_bytes(b"no picture")
    names = [*(f"{k}.png" for k in range(4)), "bad.png", "gone.png"]
    write_captions(tmp_path / "data", dict.fromkeys(names, "x"))
    logged, asked = {}, []
    monkeypatch.setattr(Run, "metrics", lambda _, told, *rest: logged.update(told))
    waiting = Throughput.waiting

    def watched(self, seconds: float, workers: int, decoding: bool) -> float:
        asked.append((workers, {kind: work.items for kind, work in self.kinds.items()}))
        return waiting(self, seconds, workers, decoding)

    monkeypatch.setattr(Throughput, "waiting", watched)
    recipe = project(tmp_path, 16, max_aspect=1, upscale=True, workers=Workers(count=64))
    encode_here(recipe)
    [(workers, items)] = asked
    assert workers == 3  # as many as shards: one of pictures, one of each encoder's captions
    assert (items[READ], items[DECODE], items[ENCODE]) == (5, 5, 4)
    assert (items[TEXT], items[WRITE]) == (4, 5 + 4)
    assert items[COMMIT] == 2 * 1 + 5 + 4  # what the driver writes, it commits as well
    kinds = (READ, DECODE, ENCODE, TEXT, WRITE, COMMIT)
    assert {f"throughput/{kind}_per_second" for kind in kinds} < logged.keys()
    assert 0 <= logged["throughput/waiting_share"] <= 1
