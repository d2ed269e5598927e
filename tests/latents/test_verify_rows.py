"""Rows and manifests that are not what they should be, each named by the rule it breaks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_faults import (
    FACTS,
    add_rows,
    change_manifest,
    change_rows,
    failures,
    only,
    reject,
    sound_store,
)

from ldm_core.latents.manifest import LatentStatistics, RoundingError
from ldm_core.latents.schema import captions_digest, sample_digest
from ldm_core.latents.store import StoreVersion
from ldm_core.latents.tally import SHOWN
from ldm_core.latents.verify import verify

NAN, INFINITY = (np.array([value], "<f2").tobytes() for value in (np.nan, np.inf))


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    return sound_store(tmp_path / "a store")


def renew_digest(row: dict) -> None:
    """What an encode job with a fault of its own would have written."""
    row["captions_digest"] = captions_digest(row["captions"])
    latents = row["latent_mean"], row["latent_logvar"]
    row["digest"] = sample_digest(row["id"], *latents, row["captions"], row["encoder_digest"])


def flip(row: dict, column: str, value: bytes = b"\0\0") -> None:
    assert row[column][:2] != value
    row[column] = value + row[column][2:]


class TestRows:
    @pytest.mark.parametrize("column", ["latent_mean", "latent_logvar"])
    def test_latents_that_are_others_than_their_digest_says(self, version, column):
        changed = change_rows(version, "samples", lambda rows: flip(rows[3], column))
        check = failures(changed)["a row's digest is that of its latents and captions"]
        assert (check.failed, check.checked) == (1, 12)
        assert check.first[0].startswith("003.png: it is ")

    @pytest.mark.parametrize("value", [NAN, INFINITY])
    @pytest.mark.parametrize("column", ["latent_mean", "latent_logvar"])
    def test_latents_that_are_no_numbers(self, version, column, value):
        def change(rows):
            flip(rows[7], column, value)
            renew_digest(rows[7])

        found = failures(change_rows(version, "samples", change))
        finite, *_ = only(found, "latents are finite", "content", "statistics")
        assert finite.first == ("007.png: 1 values are NaN or infinite",)

    @pytest.mark.parametrize(
        ("update", "problem"),
        [
            ({"latent_shape": [3, 4, 5]}, "its bytes are not [3, 4, 5] of float16"),
            ({"latent_shape": [-1, 4, 4]}, "its bytes are not"),
            ({"latent_shape": None}, "its bytes are not"),
            ({"latent_mean": None}, "its bytes are not"),
            ({"latent_dtype": "float32"}, "its bytes are not [3, 4, 4] of float32"),
            ({"latent_shape": [3, 2, 8]}, "shape [3, 2, 8], the first of 4x4x1 is [3, 4, 4]"),
            ({"latent_shape": [6, 4, 2]}, "6 channels, the manifest says 3"),
        ],
    )
    def test_latents_of_another_shape_or_dtype(self, version, update, problem):
        found = failures(change_rows(version, "samples", lambda rows: rows[9].update(update)))
        check = found["latents have their shape and dtype"]
        assert (check.failed, check.first[0][:9]) == (1, "009.png: ")
        assert problem in check.first[0]

    def test_an_id_that_is_there_twice(self, version):
        changed = change_rows(version, "samples", lambda rows: rows.append(rows[4]))
        found = failures(changed)
        twice, *_ = only(found, "one row", "parts", "counts", "content", "statistics")
        assert twice.first == ("004.png: 2 rows in samples",)

    def test_an_id_in_samples_and_rejects(self, version):
        changed = change_rows(version, "rejects", lambda rows: rows[0].update(id="002.png"))
        (check,) = only(failures(changed), "an id has one row")
        assert check.first == ("002.png: 2 rows in samples and rejects",)

    @pytest.mark.parametrize(
        ("parts", "problem"),
        [
            ([(0, 3), (1, 3), (3, 3)], "3 parts in 3 rows, up to part 3; they say 3"),
            ([(0, 3), (2, 3)], "2 parts in 2 rows, up to part 2; they say 3"),
            ([(0, 2), (1, 3)], "2 parts in 2 rows, up to part 1; they say 2 to 3"),
            ([(0, 2), (0, 2)], "1 parts in 2 rows, up to part 0; they say 2"),
            ([(-1, 2), (1, 2)], "part below 0"),
            ([(None, None)], "0 parts in 1 rows, up to part None; they say None"),
        ],
    )
    def test_a_file_whose_parts_are_not_all_there(self, version, parts, problem):
        def change(rows):
            for row, (part, of) in zip(rows, parts, strict=False):
                row.update(source_id="clip.mp4", part=part, parts=of)

        (check,) = only(failures(change_rows(version, "samples", change)), "parts are all there")
        assert check.first == (f"clip.mp4: {problem}",)

    def test_parts_that_became_samples_and_rejects_make_a_file(self, version):
        def change(rows):
            for k, row in enumerate(rows):
                row.update(source_id="clip.mp4", part=k + first, parts=14)

        first = 0
        changed = change_rows(version, "samples", change)
        first = 12
        assert failures(change_rows(changed, "rejects", change)) == {}

    def test_captions_that_are_others_than_their_digest_says(self, version):
        def change(rows):
            rows[0]["captions"][0]["caption"] = "a cow"

        digest, caption = only(
            failures(change_rows(version, "samples", change)), "row's digest", "captions are"
        )
        assert digest.first[0].startswith("000.png: ")
        assert caption.first[0].startswith("000.png: 'a cow' has not the digest")

    @pytest.mark.parametrize(
        ("captions", "problem"),
        [([], "no captions"), (None, "no captions"), ([0.5, 0.6], "weights"), ([0, 1], "weights")],
    )
    def test_captions_without_weights_that_sum_to_one(self, version, captions, problem):
        def change(rows):
            old = rows[1]["captions"]
            pairs = zip(old, captions or [], strict=False)
            rows[1]["captions"] = captions and [{**one, "weight": w} for one, w in pairs]
            rows[1]["captions_digest"] = captions_digest(rows[1]["captions"] or [])

        found = failures(change_rows(version, "samples", change))
        check = found["captions are embedded by every encoder"]
        assert check.first[0].startswith(f"001.png: {problem}")

    def test_latents_of_another_autoencoder(self, version):
        def change(rows):
            rows[2]["encoder_digest"] = "other"
            renew_digest(rows[2])

        made, _ = only(failures(change_rows(version, "samples", change)), "latents are", "content")
        assert made.first == ("002.png: other, the manifest says identity",)

    def test_of_many_failures_the_first_are_named(self, version):
        def change(rows):
            for row in rows:
                row["digest"] = "0" * 32

        check = failures(change_rows(version, "samples", change))[
            "a row's digest is that of its latents and captions"
        ]
        assert (check.failed, len(check.first)) == (12, SHOWN)


class TestTexts:
    """Sorted rows: "" by clip and t5, then "a dog", "a red cat", "cat"."""

    def test_a_caption_that_an_encoder_has_not_embedded(self, version):
        changed = change_rows(version, "texts", lambda rows: rows.pop(6))
        captions, *_ = only(failures(changed), "captions are embedded", "counts")
        assert captions.failed == 6
        assert "001.png: 'cat' is not embedded by clip" in captions.first

    def test_no_empty_caption(self, version):
        changed = change_rows(version, "texts", lambda rows: rows.pop(1))
        empty, _ = only(failures(changed), "the empty caption", "counts")
        assert empty.first == ("t5: it is not",)

    def test_a_caption_that_is_there_twice(self, version):
        changed = change_rows(version, "texts", lambda rows: rows.append(rows[2]))
        keys, _ = only(failures(changed), "one row for each encoder", "counts")
        assert keys.first == ("clip 'a dog': there twice",)

    @pytest.mark.parametrize(
        ("place", "update", "rule", "problem"),
        [
            (2, {"caption": "a cow"}, "a caption has its digest", "clip 'a cow': its digest"),
            (2, {"encoder_digest": "x"}, "manifest's encoders", "x, the manifest says c"),
            (2, {"encoder": "blip"}, "manifest's encoders", "c, the manifest says None"),
            (2, {"pooled": NAN + b"\0" * 4}, "embeddings are finite", "1 values are NaN"),
            (3, {"tokens": INFINITY + b"\0" * 28}, "embeddings are finite", "1 values are NaN"),
            (2, {"pooled": b"\0" * 8}, "shape and dtype", "of pooled do not agree"),
            (2, {"pooled": b"\0" * 8, "pooled_size": 4}, "shape", "widths {'pooled': 4}, of the"),
            (3, {"tokens_shape": [3, 4]}, "shape and dtype", "of tokens do not agree"),
            (3, {"tokens_shape": [15]}, "shape and dtype", "tokens of shape (15,)"),
            (3, {"tokens_shape": None}, "shape and dtype", "of tokens do not agree"),
            (3, {"dtype": "float64"}, "shape and dtype", "of tokens do not agree"),
            (3, {"tokens": None}, "shape and dtype", "neither tokens nor a pooled vector"),
        ],
    )
    def test_a_spoilt_row_is_named(self, version, place, update, rule, problem):
        found = failures(change_rows(version, "texts", lambda rows: rows[place].update(update)))
        (check,) = (check for name, check in found.items() if rule in name)
        assert check.failed == 1
        assert problem in check.first[0]


class TestManifest:
    @pytest.mark.parametrize(
        ("update", "rule", "problem"),
        [
            ({"bytes": 5}, "counts", "bytes of all files"),
            ({"buckets": {"4x4x1": 11, "8x8x1": 1}}, "counts", "4x4x1: 12, the manifest says 11"),
            ({"rejects": {"truncated": 2}}, "counts", "rejects not an image: 2, the manifest"),
            ({"counts": {"samples": 12, "texts": 8, "rejects": 3}}, "counts", "2, the manifest"),
            ({"content": "0123"}, "content", "the manifest says 0123"),
            ({"channels": 4}, "shape and dtype", "3 channels, the manifest says 4"),
        ],
    )
    def test_that_says_something_else_is_named(self, version, update, rule, problem):
        found = failures(change_manifest(version, **update))
        check = next(check for name, check in found.items() if rule in name)
        assert problem in "; ".join(check.first)

    def test_rounding_is_what_the_rows_say(self, version):
        def change(rows):
            rows[1].update(relative_error=0.25)  # of t5: exact in 32 bits

        found = {"t5": RoundingError(captions=1, mean=0.25, largest=0.25)}
        changed = change_rows(version, "texts", change)
        (check,) = only(failures(changed), "rounding")
        assert check.first[0].startswith("t5: captions=1 mean=0.25")
        assert failures(change_manifest(changed, rounding=found)) == {}

    def test_statistics_are_those_measured(self, version):
        stated = version.manifest.statistics
        off = stated.model_copy(update={"std": (*stated.std[:2], stated.std[2] * 1.0001)})
        (check,) = only(failures(change_manifest(version, statistics=off)), "statistics")
        assert check.first[0].startswith("std of channel 2: ")

    def test_statistics_may_be_the_autoencoders_own(self, version):
        own = LatentStatistics(mean=(0.0, 0.1, 0.2), std=(1.0, 2.0, 3.0))
        changed = change_manifest(version, statistics=own)
        has = replace(FACTS, latents_mean=own.mean, latents_std=own.std)
        assert failures(changed, has) == {}
        assert failures(version, has) == {}  # measured, when the autoencoder had none yet
        other = replace(has, latents_mean=(0.0, 0.1, 0.3))
        (check,) = only(failures(changed, other), "statistics")
        assert check.first[0].startswith("mean of channel 0: ")

    def test_statistics_of_an_autoencoder_that_is_gone_cannot_be_told(self, version):
        own = LatentStatistics(mean=(0.0, 0.1, 0.2), std=(1.0, 2.0, 3.0))
        checks = verify(change_manifest(version, statistics=own), None)
        assert [check for check in checks if check.failed] == []
        notes = [check.note for check in checks if not check.checked]
        assert [note.split(":")[0] for note in notes] == ["not checked"] * 2
        assert "no autoencoder at identity" in notes[0]

    def test_another_autoencoder_at_its_place_is_named(self, version):
        found = failures(version, replace(FACTS, digest="new"))
        (check,) = only(found, "the autoencoder at its URI")
        assert check.first == ("identity: digest new, the manifest says digest identity",)


def test_rejects_of_the_same_file_twice(version):
    add_rows(version.store, "rejects", [reject("a.txt")], "again")
    tables = version.manifest.tables | {"rejects": version.store.open("rejects").version()}
    found = failures(change_manifest(version, tables=tables))
    assert found["an id has one row, in samples or in rejects"].first[0].startswith("a.txt: 2 rows")
