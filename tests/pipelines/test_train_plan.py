"""What `ldm train --dry-run` tells, and what is refused before any worker starts."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from bucket_store import bucket_store
from command_line import assert_mistake, files_under
from small_store import small_store
from tiny_project import model_config, random_network, tiny_project

from ldm_core.autoencoders.autoencoder import AutoencoderFacts
from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from ldm_core.model_directory import Reference, save_model
from ldm_core.planning.memory import memory_of
from ldm_core.planning.search import fits
from pipelines.backbones import declared_space, new_backbone, stored_space
from pipelines.encode_plan import encode_job
from pipelines.recipe_options import Arguments
from pipelines.recipes import RECIPES
from pipelines.train_checks import check_training
from pipelines.train_initial import check_initial
from pipelines.train_plan import check_memory, plan_training

PUBLISHED = {  # parameters, tokens of the published model's size
    "image-b": (0.13e9, 256),
    "image-xl": (0.675e9, 256),
    "mmdit-2b": (2.03e9, 1024),
    "flux-12b": (11.9e9, 4096),
    "video-1b": (1.3e9, 32760),
    "video-14b": (14e9, 37440),
    "video-30b": (30e9, 75600),
}
BUCKETS = {"video-1b": "480x832x81", "video-14b": "480x832x93"}  # of theirs that are not ours


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_without_a_store(name):
    recipe = RECIPES[name]()
    plan = plan_training(recipe, declared_space(recipe))
    with torch.device("meta"):
        network = new_backbone(plan.backbone)
    assert plan.step.weights.total == sum(weight.numel() for weight in network.parameters())
    main = plan.step.samples[0]
    assert plan.step.per_step(main) == recipe.train.batch_size
    if name in PUBLISHED:
        parameters, tokens = PUBLISHED[name]
        assert plan.step.weights.total == pytest.approx(parameters, rel=0.15)
        assert main.tokens == pytest.approx(tokens, rel=0.02)
        theirs = Arguments(name, overrides=_buckets(BUCKETS.get(name))).resolve()
        assert plan_training(theirs, declared_space(theirs)).step.samples[0].tokens == tokens
        assert plan.on is not None
        assert fits(plan.step, plan.on)
        check_memory(plan, recipe.train.heads)


def _buckets(name: str | None) -> tuple[str, ...]:
    return () if name is None else (f"train.buckets=[{name}]",)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_trains_on_is_what_it_encodes(name):
    """By the autoencoder that it expects."""
    recipe = RECIPES[name]()
    expected, pixels = recipe.autoencoder, recipe.autoencoder.source == "identity"
    shrinks = (1, None) if pixels else (expected.downsampling, expected.temporal_downsampling)
    facts = AutoencoderFacts("digest", *shrinks, None, None)
    made = {bucket.name for bucket in encode_job(recipe, facts).geometry.buckets()}
    assert set(declared_space(recipe).latents) <= made


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_cpu_validates_what_gpus_train(name):
    """And a GPU that does has room for the weights, which it holds in float32."""
    recipe = RECIPES[name]()
    plan = plan_training(recipe, declared_space(recipe))
    assert plan.on is not None
    fit_in_one = 4 * plan.step.weights.total < plan.on.usable_bytes
    assert bool(recipe.train.validation_samples) == fit_in_one
    assert recipe.train.validation_gpus == (1 if fit_in_one else 0)


def test_a_dry_run_prints_the_plan(ldm, tmp_path):
    result = ldm("train", "video-14b", "--dry-run", "--set", "train.buckets=[480x832x93]")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "13,976 M of a dit: 2 text_blocks 629 M, 28 blocks 13,215 M" in text
    assert re.search(r"480x832x93 +37,440 +512 +1.48 PFLOP +4.43 PFLOP +1 +128 +567 PFLOP", text)
    assert "memory of a device, GiB: replicate 1 x shard 128 x context 1" in text
    rates = re.findall(r"^  (\S+) +\S+ +(?:yes|no, \d+) +(\S+) +(\S+) +\d+ +(\d+) %", text, re.M)
    assert [name for name, *_ in rates][:2] == ["H100-80", "H200-141"]
    for _, seconds, per_second, share in rates:
        assert float(seconds) * float(per_second) == pytest.approx(128, rel=0.01)
        assert 5 <= int(share) <= 40
    assert re.search(r"^  next     run          ldm encode video-14b --set ", text, re.M)
    assert text.splitlines()[-1].startswith("train: would run once there is a store at ")
    assert files_under(tmp_path) == {}


def test_the_plan_tells_what_snapshots_take(ldm):
    text = ldm("train", "image-b", "--dry-run").stdout
    weights = float(re.search(r"parameters +([\d.]+) M of a dit", text)[1]) * 1e6
    told = re.search(r"snapshots +100 of 2 averages in all, every 8,000 steps: ([\d.]+) GB", text)
    assert float(told[1]) == pytest.approx(100 * 4 * weights / 1e9, rel=0.01)
    seldom = ldm("train", "image-b", "--dry-run", "--set", "train.snapshot_every=40000").stdout
    assert "snapshots    20 of 2 averages in all, every 40,000 steps" in seldom
    assert "snapshots" not in ldm("train", "image-s", "--dry-run").stdout


def test_an_accelerator_for_a_recipe_of_cpus(ldm):
    without = ldm("train", "image-s", "--dry-run").stdout
    assert "is predicted for accelerators: --accelerator H100-80" in without
    text = ldm("train", "image-s", "--dry-run", "--accelerator", "A10G-24").stdout
    assert re.search(r"on +GiB +fits .*\n  A10G-24 +20.7 +yes", text)
    assert "ldm encode image-s --set train.accelerator=A10G-24\n" in text
    assert_mistake(
        ldm("train", "--dry-run", "--accelerator", "H100"), "accelerator H100", "H100-80"
    )


def test_a_price_of_ones_own(ldm):
    words = ("train", "image-b", "--dry-run", "--set", "train.worker_hour_price=30")
    row = re.search(r"^  H100-80 .*", ldm(*words).stdout, re.M)
    usual = re.search(r"^  H100-80 .*", ldm(*words[:3]).stdout, re.M)
    assert row
    assert usual
    assert float(row[0].split()[-3]) == pytest.approx(10 * float(usual[0].split()[-3]), rel=0.02)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            "flux-12b --set train.layout.shard=1",
            ("flux-12b", "replicate 64 x shard 1", "GiB a device", "73.2 of its 79.6 GiB", "--set"),
        ),
        ("flux-12b --set train.layout.context=5", ("layout", "workers.count is 64")),
        ('flux-12b --set train.layout={"shard":2,"context":16}', ("heads 24", "layout.context 16")),
        ("image-b --set train.layout.shard=3", ("shard 3", "workers.count is 8")),
        ("image-b --set train.micro_batches=4", ("micro_batches 4", "8 workers")),
        ("image-b --set train.micro_batches=24", ("batch_size 256", "micro_batches 24", "264")),
        ("image-b --set train.patch_size=3", ("train: a latent of 32 x 32", "3 x 3")),
        ("image-b --set train.single_depth=3", ("single_depth 3", "dit")),
        ("mmdit-2b --set train.text_depth=3", ("text_depth 3", "mmdit")),
        ("mmdit-2b --set train.heads=7", ("train: width 1536", "heads 7")),
        ("video-1b --set train.buckets=[480x832x80]", ("480x832x80", "temporal_downsampling 4")),
        ("video-1b --set train.buckets=[480x832]", ("train.buckets.0 is '480x832'",)),
        (
            "mmdit-2b --set train.positions=fixed --set train.buckets=[512x512x5]",
            ("positions fixed", "512x512x5"),
        ),
    ],
)
def test_what_cannot_work_is_refused(ldm, words, named):
    named = named[1:] if named[0] == words.split()[0] else named
    assert_mistake(ldm("train", *words.split(), "--dry-run"), *named)


def test_more_shards_than_rows(ldm):
    words = "--set train.workers.count=64 --set train.batch_size=64 --set train.layout.shard=64"
    words += " --set train.micro_batches=64"
    result = ldm("train", "image-tiny", *words.split(), "--dry-run")
    assert_mistake(result, "64 workers", "smallest matrix of a block has 32 rows")


def test_the_remedy_that_is_named_is_one(ldm):
    refused = ldm("train", "flux-12b", "--set", "train.layout.shard=1", "--dry-run").stderr
    words = re.findall(r"--set (train\.\S+=(?:'[^']*'|\S+))", refused)
    assert words
    overrides = ("train.layout.shard=1", *(word.replace("'", "") for word in words))
    recipe = Arguments("flux-12b", overrides=overrides).resolve()
    plan = plan_training(recipe, declared_space(recipe))
    assert plan.on is not None
    assert fits(plan.step, plan.on)
    said = float(re.search(r"([\d.]+) GiB with", refused)[1])
    assert memory_of(plan.step).total / 2**30 == pytest.approx(said, abs=0.06)


def tiny(*words: str):
    return Arguments("image-tiny", root="run", overrides=("size=8", *words)).resolve()


def test_a_store_says_what_it_holds(tmp_path):
    version = small_store(tmp_path / "latents", shape=(2, 8, 8))
    space = stored_space(version)
    assert (dict(space.latents), space.text_width) == ({"8x8x1": (2, 8, 8)}, 5)
    plan = plan_training(tiny(), space)
    assert (plan.backbone.in_channels, plan.backbone.text_width) == (2, 5)
    assert plan.step.samples[0].tokens == 16


WORDS = ("image-tiny", "--root", "run", "--set", "size=8")


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


def initial_model(root, version, **changes) -> str:
    """A model directory that goes with the store."""
    tiny_project(root)
    texts = {
        entry.name: Reference(uri=entry.uri, digest=entry.digest)
        for entry in version.manifest.texts
    }
    entry = version.manifest.autoencoder
    config = model_config(texts, autoencoder=Reference(uri=entry.uri, digest=entry.digest))
    backbone = plan_training(tiny(), stored_space(version)).backbone
    config = config.model_copy(update={"backbone": backbone, **changes})
    save_model(f"{root}/initial", config, random_network(config.backbone).state_dict(), "")
    return f"{root}/initial"


def test_a_model_to_start_from(ldm, tmp_path):
    version = small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    at = initial_model(tmp_path / "p", version)
    good = (*WORDS, "--set", f"train.initial={at}", "--dry-run")
    assert ldm("train", *good).stdout.endswith("train: would run\n")
    wider = ldm("train", *good, "--set", "train.width=64")
    assert_mistake(wider, "train.initial", "width 32 and not 64")
    kind = ldm("train", *good, "--set", "train.backbone=mmdit")
    assert_mistake(kind, "is a DiT where the recipe says MMDiT")
    other = Reference(uri="identity", digest="0123")
    at = initial_model(tmp_path / "q", version, autoencoder=other)
    result = ldm("train", *WORDS, "--set", f"train.initial={at}", "--dry-run")
    assert_mistake(result, "trained with autoencoder 0123", "the store's is identity")
    gone = ldm("train", *WORDS, "--set", "train.initial=nowhere", "--dry-run")
    assert_mistake(gone, "no model at", "nowhere")


def test_a_diffusers_transformer_of_other_channels(ldm, tmp_path):
    small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    (tmp_path / "sd3").mkdir()
    config = {"_class_name": "SD3Transformer2DModel", "in_channels": 16}
    (tmp_path / "sd3" / "config.json").write_text(json.dumps(config))
    result = ldm("train", *WORDS, "--set", "train.initial=sd3", "--dry-run")
    assert_mistake(result, "latents of 16 channels", "have 2")


SD3 = {
    "_class_name": "SD3Transformer2DModel", "in_channels": 2, "patch_size": 2, "num_layers": 2,
    "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 5,
    "pooled_projection_dim": 3, "qk_norm": "rms_norm",
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 8, "num_layers": 2,
    "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
    "joint_attention_dim": 5, "pooled_projection_dim": 3, "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (SD3, None),
        (SD3 | {"num_layers": 3}, "depth 3 and not 2"),
        (SD3 | {"attention_head_dim": 32}, "width 64 and not 32"),
        (SD3 | {"qk_norm": None}, "qk_norm False and not True"),
        (SD3 | {"joint_attention_dim": 7}, "text_width 7 and not 5"),
        (SD3 | {"dual_attention_layers": [0]}, "dual_attention_layers"),
        (FLUX, "single_depth 1 and not 0"),
        (FLUX | {"guidance_embeds": True}, "guidance_embeds True"),
        ({"_class_name": "DiTTransformer2DModel", "in_channels": 2}, "begins with one of SD3"),
    ],
)
def test_a_diffusers_transformer_of_another_architecture(tmp_path, written, named):
    version = small_store(tmp_path / "latents", shape=(2, 8, 8))
    (tmp_path / "config.json").write_text(json.dumps(written))
    words = ("backbone=mmdit", "positions=fixed", "width=32", "depth=2", "heads=2")
    backbone = plan_training(tiny(*(f"train.{w}" for w in words)), stored_space(version)).backbone
    with nullcontext() if named is None else pytest.raises(UserError, match=named):
        check_initial(str(tmp_path), version.manifest, backbone)
    if named is None:
        flux = plan_training(
            tiny(*(f"train.{w}" for w in (words[0], *words[2:], "single_depth=1"))),
            stored_space(version),
        ).backbone
        (tmp_path / "config.json").write_text(json.dumps(FLUX))
        check_initial(str(tmp_path), version.manifest, flux)
        (tmp_path / "config.json").write_text(json.dumps(SD3 | {"num_layers": 2}))
        with pytest.raises(UserError, match="single_depth 0 and not 1"):
            check_initial(str(tmp_path), version.manifest, flux)
        dit = plan_training(tiny(), stored_space(version)).backbone
        with pytest.raises(UserError, match="is a MMDiT where the recipe says DiT"):
            check_initial(str(tmp_path), version.manifest, dit)


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


def test_no_accelerator_no_refusal():
    recipe = Arguments("flux-12b", overrides=("train.layout.shard=1", "train.accelerator=null"))
    plan = plan_training(recipe.resolve(), declared_space(recipe.resolve()))
    check_memory(plan, 24)
    named = Arguments("flux-12b", overrides=("train.layout.shard=1",)).resolve()
    with pytest.raises(UserError, match=r"needs 3\d\d\.\d GiB a device \(averages"):
        check_memory(plan_training(named, declared_space(named)), 24)
