"""What is to do, file by file."""

from ldm_core.latents.ledger import StoredRow, Todo, compare_files

CAPTIONS = {"a": "c", "v": "c"}


def row(id: str, source: str, parts: int = 1, mark: str = "f", captions: str | None = "c"):
    return StoredRow(id, source, parts, mark, captions)


def todo(*rows: StoredRow, wanted: dict[str, str] | None = None) -> Todo:
    return compare_files(wanted or {"a": "f", "v": "f"}, CAPTIONS, rows)


def clips(*numbers: int, of: int = 3, **told: str) -> list[StoredRow]:
    return [row(f"v#{k}", "v", of, **told) for k in numbers]


def test_nothing_there():
    assert todo() == Todo(["a", "v"])


def test_all_there():
    found = todo(row("a", "a"), *clips(0, 1, 2))
    assert (found.missing, found.kept) == ([], {"a", "v#0", "v#1", "v#2"})


def test_a_video_is_done_when_all_its_clips_are_and_keeps_those_it_has():
    found = todo(row("a", "a"), *clips(0, 2))
    assert (found.missing, found.kept) == (["v"], {"a", "v#0", "v#2"})


def test_a_rejected_clip_is_there_too():
    found = todo(row("a", "a"), *clips(0, 1), row("v#2", "v", 3, captions=None))
    assert (found.missing, found.rejects) == ([], 1)


def test_places_are_those_of_the_samples_that_stay():
    rows = [StoredRow(f"v#{k}", "v", 2, "f", "c", bucket) for k, bucket in enumerate("xy")]
    gone = StoredRow("b", "b", 1, "f", "c", "x")
    rejected = row("a", "a", captions=None)
    assert todo(*rows, gone, rejected).places == {("x", "v"), ("y", "v")}


def test_clips_of_another_cut_are_stale():
    found = todo(row("a", "a"), *clips(0, 1, 2, mark="before"), *clips(5, of=4))
    assert (found.missing, found.stale) == (["v"], ["v#0", "v#1", "v#2"])
    assert found.kept == {"a", "v#5"}


def test_a_vanished_file_and_a_row_that_is_there_twice_go():
    found = todo(row("a", "a"), row("a", "a"), row("x", "x"), *clips(0, 1, 2))
    assert (found.missing, found.stale) == (["a"], ["a", "x"])


def test_other_captions_rename_and_encode_nothing():
    found = todo(row("a", "a", captions="before"), *clips(0, 1, 2))
    assert (found.missing, found.stale, found.renamed) == ([], [], ["a"])


def test_rows_that_disagree_on_how_many_they_are_all_go():
    """A job was ended after two of three clips, and then the video could not be looked into."""
    found = todo(row("a", "a"), *clips(0, 1), row("v", "v", captions=None))
    assert (found.missing, found.stale) == (["v"], ["v", "v#0", "v#1"])
    assert (found.kept, found.rejects) == ({"a"}, 0)
    again = todo(row("a", "a"), row("v", "v", captions=None))
    assert (again.missing, again.stale, again.rejects) == ([], [], 1)
