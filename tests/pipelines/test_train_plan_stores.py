"""What is planned of the stores that a training reads, and which of them do not go together."""

import json

import pytest
from bucket_store import bucket_store
from command_line import assert_mistake
from small_store import small_store
from tiny_plans import WORDS, tiny

from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from pipelines.backbones import stored_space
from pipelines.train_checks import check_training
from pipelines.train_plan import plan_training


def test_a_store_says_what_it_holds(tmp_path):
    version = small_store(tmp_path / "latents", shape=(2, 8, 8))
    space = stored_space(version)
    assert (dict(space.latents), space.text_width) == ({"8x8x1": (2, 8, 8)}, 5)
    plan = plan_training(tiny(), space)
    assert (plan.backbone.in_channels, plan.backbone.text_width) == (2, 5)
    assert plan.step.samples[0].tokens == 16


def test_a_version_that_is_not_there(ldm, tmp_path):
    small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    result = ldm("train", *WORDS, "--set", "train.store_version=7", "--dry-run")
    assert_mistake(result, "no version 7", "[1]")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_stores_of_other_encoders_are_not_mixed(ldm, tmp_path, dry):
    first = small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    other = small_store(tmp_path / "other", shape=(2, 8, 8))
    mix = json.dumps([{"uri": "other", "weight": 0.5}])
    words = (*WORDS, "--set", f"train.mix={mix}")
    said = ldm("train", *words, "--dry-run").stdout
    assert said.endswith("train: would run\n")
    count = first.manifest.counts["samples"]
    assert f"{count + count // 2} samples in" in said
    assert "each as often as its store's weight says; 0 held out" in said
    assert f"{count} samples in" in ldm("train", *WORDS, "--dry-run").stdout
    entry = other.manifest.autoencoder.model_copy(update={"digest": "b"})
    LatentStore(other.store.uri).publish(other.manifest.model_copy(update={"autoencoder": entry}))
    assert_mistake(ldm("train", *words, *dry), "autoencoder identity", "autoencoder b", "train.mix")
    earlier = json.dumps([{"uri": "other", "version": 3}])
    assert_mistake(ldm("train", *WORDS, "--set", f"train.mix={earlier}", *dry), "no version 3")


def test_tokens_that_cannot_be_dealt_out(tmp_path):
    shapes = {"8x8x1": (2, 8, 8), "6x6x1": (2, 6, 6)}
    version = bucket_store(tmp_path / "s", {"8x8x1": 3, "6x6x1": 2}, shapes=shapes)
    words = ("train.heads=2", "train.workers.count=2", "train.layout.context=2")
    with pytest.raises(UserError, match=r"layout.context 2: 9 of 6x6x1; set train.layout.context"):
        plan_training(tiny(*words), stored_space(version))
    assert plan_training(tiny(*words[:2]), stored_space(version)).step.samples[1].tokens == 9


class TestMixes:
    """Of stores: the recipe's own one has pictures of 8 x 8 x 2 channels."""

    @pytest.fixture
    def own(self, tmp_path):
        return bucket_store(tmp_path / "own", {"8x8x1": 4}, shapes={"8x8x1": (2, 8, 8)})

    def check(self, own, *others, words=()):
        mix = json.dumps([{"uri": other.store.uri} for other in others])
        return check_training(tiny(f"train.mix={mix}", *words), own, others)

    def test_the_plan_has_the_buckets_of_all(self, own, tmp_path):
        shapes = {"8x8x1": (2, 8, 8), "8x16x1": (2, 8, 16)}
        other = bucket_store(tmp_path / "o", {"8x8x1": 2, "8x16x1": 9}, shapes=shapes)
        plan = self.check(own, other)
        assert [(s.bucket, s.tokens) for s in plan.step.samples] == [("8x8x1", 16), ("8x16x1", 32)]

    def test_a_bucket_of_another_shape(self, own, tmp_path):
        other = bucket_store(tmp_path / "o", {"8x8x1": 2}, shapes={"8x8x1": (2, 4, 4)})
        with pytest.raises(UserError, match=r"latents of 8x8x1 are \(2, 4, 4\).*train.mix"):
            self.check(own, other)

    def test_a_patch_that_does_not_divide(self, own, tmp_path):
        other = bucket_store(tmp_path / "o", {"8x9x1": 2}, shapes={"8x9x1": (2, 8, 9)})
        with pytest.raises(UserError, match=r"train: a latent of 8 x 9"):
            self.check(own, other)

    @pytest.mark.parametrize(
        ("words", "remedy"),
        [
            ((), "name them in train.buckets"),
            (("train.backbone=mmdit", "train.positions=fixed"), "train.positions=rotary"),
        ],
    )
    def test_videos_for_a_network_of_pictures(self, own, tmp_path, words, remedy):
        other = bucket_store(tmp_path / "o", {"8x8x5": 2}, shapes={"8x8x5": (2, 2, 8, 8)})
        with pytest.raises(UserError, match=f"videos of 8x8x5.*{remedy}"):
            self.check(own, other, words=words)
        named = ("train.buckets=[8x8x1,8x8x5]", "autoencoder.temporal_downsampling=4")
        if not words:
            assert self.check(own, other, words=named).backbone.frame_pairs

    def test_a_store_named_twice(self, own, tmp_path):
        other = bucket_store(tmp_path / "o", {"8x8x1": 2}, shapes={"8x8x1": (2, 8, 8)})
        for twice in ((other, other), (own,)):
            with pytest.raises(UserError, match="is named twice"):
                self.check(own, *twice)
