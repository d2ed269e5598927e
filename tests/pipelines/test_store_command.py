"""`ldm store` as a user meets it: what it prints, what it leaves, and how it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from command_line import assert_mistake, files_under
from store_faults import (
    add_sample,
    change_manifest,
    change_rows,
    data_files,
    reject,
    sound_store,
)

from ldm_core.latents.lock import StoreLock
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import StoreVersion
from pipelines import store_actions


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    return sound_store(tmp_path / "my latents", count=20)


def cells(output: str, title: str) -> list[list[str]]:
    """The lines of a plain table, as words."""
    lines = output.split(f"{title}\n")[1].split("\n\n")[0].splitlines()
    return [line.split() for line in lines]


class TestList:
    def test_versions_and_what_is_in_the_newest(self, ldm, version):
        add_sample(version.store, "new.png", "a new caption")
        result = ldm("store", "my latents")
        assert result.exit_code == 0, result.output
        out, uri = result.stdout, version.store.uri
        head, *rows = cells(out, f"versions of {uri}")
        assert head == ["version", "created", "(UTC)", "rows", "size", "samples", "rejects",
                        "captions", "content"]  # fmt: skip
        assert [row[0] for row in rows] == ["1", "2", "3"]
        assert [(row[3], *row[6:9]) for row in rows[1:]] == [
            ("22", "20", "2", "4"), ("23", "21", "2", "5")
        ]  # fmt: skip
        assert [row[-1] for row in rows] == [
            version.store.open_version(n).manifest.content for n in (1, 2, 3)
        ]
        assert cells(out, "buckets of version 3")[1:] == [["4x4x1", "21"]]
        assert cells(out, "encoders of version 3")[1:] == [
            ["autoencoder", "identity", "identity"], ["t5", "t", "t5"], ["clip", "c", "clip"]
        ]  # fmt: skip
        assert cells(out, "rejects of version 3")[1:] == [["not", "an", "image", "2"]]
        sizes = cells(out, "bytes of a caption in version 3")[1:]
        # 5 captions of 1, 3, 4, 2 and 4 tokens of 5 values, and a pooled vector of 3
        assert sizes[1:] == [
            ["in", "16", "bits,", "at", "its", "own", "length", str((14 * 10 + 5 * 6) // 5)],
            ["in", "16", "bits,", "padded", "to", "128", "tokens", "1,286"],
        ]
        assert out.splitlines()[-1] == "next: ldm store 'my latents' --version 3 --verify"

    def test_another_version(self, ldm, version):
        add_sample(version.store, "new.png")
        out = ldm("store", "my latents", "--version", 2).stdout
        assert cells(out, "buckets of version 2")[1:] == [["4x4x1", "20"]]

    def test_a_version_of_another_format_is_listed(self, ldm, version, tmp_path):
        first = tmp_path / "my latents" / "versions" / "00000001.json"
        first.write_text('{"format": 1}')
        out = ldm("store", "my latents").stdout
        assert "1        in another format" in out

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ("nowhere", ("nowhere has no published version", "ldm encode")),
            ("latents --version 7", ("no version 7, only [1, 2]",)),
            ("latents --diff 1 7", ("no version 7",)),
            ("latents --verify --vacuum", ("--verify and --vacuum", "one at a time")),
            ("latents --diff 1 2 --compact", ("--diff and --compact",)),
            ("latents --keep 2", ("--keep goes with --vacuum",)),
            ("latents --verify --dry-run", ("--dry-run goes with --vacuum",)),
            ("latents --older-than 0", ("--older-than goes with --vacuum",)),
            ("latents --vacuum --target-mb 5", ("--target-mb goes with --compact",)),
            ("latents --preview a.png", ("--preview goes with --verify",)),
            ("latents --version 1 --vacuum", ("--version 1", "--verify")),
            ("latents --verify --preview a.gif", ("a.gif", ".png")),
            ("latents --vacuum --keep 0", ("keep 0 versions",)),
            ("latents --compact --target-mb 0", ("--target-mb 0",)),
            ("latents --diff 1", ("--diff", "2 arguments")),
        ],
    )
    def test_a_mistake_is_one_line_and_changes_nothing(self, ldm, tmp_path, words, named):
        sound_store(tmp_path / "latents")
        before = files_under(tmp_path)
        assert_mistake(ldm("store", *words.split()), *named)
        assert files_under(tmp_path) == before

    def test_help(self, ldm):
        result = ldm("store", "--help")
        assert result.exit_code == 0
        assert "ldm store" in result.stdout.split("Example:")[1]


class TestVerify:
    def test_a_version_that_holds(self, ldm, version):
        add_sample(version.store, "new.png")
        result = ldm("store", "my latents", "--version", 2, "--verify")
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert "good                 20  latents are finite" in lines
        assert sum(line.startswith("good") for line in lines) == 19
        assert lines[-2] == f"version 2 of {version.store.uri} holds: all of it was read"
        assert lines[-1] == "next: ldm store 'my latents' --vacuum --dry-run"

    def test_what_does_not_hold_is_named_with_the_remedy(self, ldm, version):
        def change(rows):
            for row in rows[:8]:
                row["latent_mean"] = bytes(96)

        changed = change_rows(version, "samples", change)
        data_files(version, "texts")[0].unlink()
        result = ldm("store", "my latents", "--verify")
        assert result.exit_code == 1
        out, (error,) = result.stdout, result.stderr.splitlines()
        assert "FAILED          8 of 20  a row's digest is that of its latents" in out
        assert "  000.png: it is " in out
        assert "    and 3 more\n" in out
        assert "texts/" in out
        assert ": it is missing\n" in out
        assert f"checks failed for version {changed.number} of {version.store.uri}" in error
        assert "use another version if it holds (1, 2)" in error
        assert "`ldm encode` into an empty --root" in error
        assert "next:" not in out

    def test_an_autoencoder_that_is_gone_is_said_and_one_that_changed_fails(self, ldm, version):
        entry = version.manifest.autoencoder
        gone = entry.model_copy(update={"uri": "/nowhere/vae"})
        change_manifest(version, autoencoder=gone)
        result = ldm("store", "my latents", "--verify")
        assert result.exit_code == 0, result.output
        assert "(not checked: no autoencoder at /nowhere/vae)" in result.stdout
        result = ldm("store", "my latents", "--verify", "--preview", "a.png")
        assert_mistake(result, "no autoencoder at /nowhere/vae")
        other = entry.model_copy(update={"digest": "0123"})
        change_manifest(version, autoencoder=other)
        result = ldm("store", "my latents", "--verify", "--preview", "a.png")
        assert result.exit_code == 1
        assert "identity: digest identity, the manifest says digest 0123" in result.stdout
        assert not Path("a.png").exists()


class TestDifference:
    def test_counts_and_first_names(self, ldm, version):
        store = version.store
        add_sample(store, "new.png", "a new caption")
        delete_rows(store, "samples", pa.table({"id": [f"{k:03d}.png" for k in range(7)]}))
        add_sample(store, "other.png")
        result = ldm("store", "my latents", "--diff", 2, 4)
        assert result.exit_code == 0, result.output
        out = result.stdout
        rows = cells(out, f"version 4 of {store.uri} against version 2")[1:]
        assert rows == [
            ["samples", "2", "7", "0"], ["-", "latents", "0", "0", "0"],
            ["-", "captions", "0", "0", "0"], ["caption", "embeddings", "2", "0", "0"],
            ["rejects", "0", "0", "0"],
        ]  # fmt: skip
        assert "samples added: new.png, other.png\n" in out
        assert "samples removed: 000.png, 001.png, 002.png, 003.png, 004.png, and 2 more\n" in out
        assert "caption embeddings added: clip: a new caption, t5: a new caption\n" in out
        assert out.splitlines()[-1] == "next: ldm store 'my latents' --version 4 --verify"
        assert "the two hold the same\n" in ldm("store", "my latents", "--diff", 4, 4).stdout


class TestVacuum:
    def test_dry_run_says_it_and_the_next_line_does_it(self, ldm, version, tmp_path):
        store = version.store
        delete_rows(store, "samples", pa.table({"id": ["001.png"]}))
        add_sample(store, "new.png")
        (tmp_path / "my latents" / "texts" / "young.parquet").write_bytes(b"PAR1")
        before = files_under(tmp_path)
        result = ldm("store", "my latents", "--vacuum", "--keep", 1, "--dry-run")
        assert result.exit_code == 0, result.output
        assert files_under(tmp_path) == before
        out = result.stdout
        rows = cells(out, f"what would go of {store.uri}")[1:]
        assert [row[-3:] for row in rows] == [["versions", "2"], ["1", *rows[1][-2:]], rows[2][-3:]]
        assert "versions: 1, 2\n" in out
        assert "versions kept: 3\n" in out
        assert "1 uncommitted files stay, younger than 24 hours" in out
        next_line = out.splitlines()[-1]
        assert next_line == "next: ldm store 'my latents' --vacuum --keep 1 --older-than 24"
        result = ldm("store", "my latents", *next_line.split("' ")[1].split())
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == "next: ldm store 'my latents' --verify"
        assert store.versions() == [3]
        after = {name for name in files_under(tmp_path) if "/locks/" not in name}
        assert len(before) - len(after) == 3  # two versions and a file
        assert ldm("store", "my latents", "--verify").exit_code == 0
        ldm("store", "my latents", "--vacuum", "--older-than", 0)
        assert not (tmp_path / "my latents" / "texts" / "young.parquet").exists()

    def test_what_is_committed_before_it_has_the_lock_stays(self, ldm, version, monkeypatch):
        """By a job that ends while this one waits to begin."""
        store, table = version.store, "rejects"
        row = pa.Table.from_pylist([reject("late.png")], schema=TABLES[table])
        part, lock = store.write_part(table, row, "late"), store_actions.locked

        @contextmanager
        def after_another(uri: str) -> Iterator[StoreLock]:
            store.commit(table, [part], "late")
            with lock(uri) as held:
                yield held

        monkeypatch.setattr(store_actions, "locked", after_another)
        result = ldm("store", "my latents", "--vacuum", "--older-than", 0)
        assert result.exit_code == 0, result.output
        assert "late.png" in store.table(table)["id"].to_pylist()

    def test_by_default_three_versions_stay(self, ldm, version):
        for k in range(4):
            add_sample(version.store, f"{k}.png")
        ldm("store", "my latents", "--vacuum")
        assert version.store.versions() == [4, 5, 6]


class TestCompact:
    def test_publishes_a_version_of_fewer_files(self, ldm, version):
        result = ldm("store", "my latents", "--compact")
        assert result.exit_code == 0, result.output
        out, newest = result.stdout, version.store.open_version()
        rows = cells(out, f"files of {version.store.uri}")[1:]
        assert [row[:3] for row in rows] == [
            ["samples", "3", "1"], ["texts", "1", "1"], ["rejects", "1", "1"]
        ]  # fmt: skip
        assert "version 3: the rows of version 2 in these files\n" in out
        assert out.splitlines()[-1] == "next: ldm store 'my latents' --vacuum --keep 1 --dry-run"
        assert (newest.number, len(data_files(newest, "samples"))) == (3, 1)
        again = ldm("store", "my latents", "--compact").stdout
        assert "nothing new to publish: version 3 has these files\n" in again

    def test_leaves_unpublished_rows_to_their_writer(self, ldm, version):
        delete_rows(version.store, "samples", pa.table({"id": ["001.png"]}))
        out = ldm("store", "my latents", "--compact").stdout
        assert "the tables hold other rows than version 2: `ldm encode` will publish them" in out
        assert version.store.versions() == [1, 2]
