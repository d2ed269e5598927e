import pytest
from store_faults import add_sample, change_rows, reject, sound_store

from ldm_core.latents.difference import Changes, difference
from ldm_core.latents.schema import caption_rows, captions_digest, latent_digest
from ldm_core.latents.store import StoreVersion

NOTHING = Changes((), (), ())


@pytest.fixture
def version(tmp_path) -> StoreVersion:
    return sound_store(tmp_path)


def new_captions(row: dict) -> None:
    row["captions"] = caption_rows([("a cow", 1.0)])
    row["captions_digest"] = captions_digest(row["captions"])
    row["digest"] = row["digest"][:16] + row["captions_digest"]


def new_latents(row: dict) -> None:
    row["latent_mean"] = row["latent_mean"][::-1]
    latents = row["latent_mean"], row["latent_logvar"]
    row["digest"] = latent_digest(row["id"], *latents, row["encoder_digest"]) + row["digest"][16:]


def test_a_version_is_no_different_from_itself(version):
    again = version.store.open_version(version.store.publish(version.manifest))
    assert difference(version, again).none


def test_samples_added_and_removed(version):
    newer = add_sample(version.store, "new.png", "a new caption")
    found = difference(version, newer)
    assert found.samples == Changes(("new.png",), (), ())
    assert found.texts == Changes(("clip: a new caption", "t5: a new caption"), (), ())
    assert found.rejects == NOTHING
    back = difference(newer, version)
    assert back.samples == Changes((), ("new.png",), ())
    assert back.texts.removed == found.texts.added


def test_latents_and_captions_are_told_apart(version):
    def change(rows):
        new_captions(rows[1])
        new_latents(rows[2])
        new_captions(rows[3])
        new_latents(rows[3])

    found = difference(version, change_rows(version, "samples", change))
    assert found.samples == Changes((), (), ("001.png", "002.png", "003.png"))
    assert found.captions == ("001.png", "003.png")
    assert found.latents == ("002.png", "003.png")


def test_texts_of_another_encoder_and_rejects_of_another_reason(version):
    other = change_rows(version, "texts", lambda rows: rows[2].update(encoder_digest="new"))
    assert difference(version, other).texts == Changes((), (), ("clip: a dog",))

    def change(rows):
        rows[0]["reason"] = "truncated"
        rows[1:] = [reject("c.txt")]

    found = difference(version, change_rows(version, "rejects", change))
    assert found.rejects == Changes(("c.txt",), ("b.txt",), ("a.txt",))
    assert not found.none
    assert found.samples == found.texts == NOTHING
