"""What `ldm train --dry-run` tells, and what is refused before any worker starts."""

import re

import pytest
import torch
from command_line import assert_mistake, files_under
from tiny_plans import planned

from ldm_core.autoencoders.autoencoder import AutoencoderFacts
from ldm_core.errors import UserError
from ldm_core.planning.memory import memory_of
from ldm_core.planning.search import fits
from pipelines.backbones import declared_space, new_backbone
from pipelines.encode_plan import encode_job
from pipelines.recipe_options import Arguments
from pipelines.recipes import RECIPES
from pipelines.train_plan import check_memory

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
    recipe, plan = RECIPES[name](), planned(name)
    assert Arguments(name).resolve() == recipe
    with torch.device("meta"):
        network = new_backbone(plan.backbone)
    assert plan.step.weights.total == sum(weight.numel() for weight in network.parameters())
    main = plan.step.samples[0]
    assert plan.step.per_step(main) == recipe.train.batch_size
    if name in PUBLISHED:
        parameters, tokens = PUBLISHED[name]
        assert plan.step.weights.total == pytest.approx(parameters, rel=0.15)
        assert main.tokens == pytest.approx(tokens, rel=0.02)
        theirs = planned(name, *_buckets(BUCKETS.get(name)))
        assert theirs.step.samples[0].tokens == tokens
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
    recipe, plan = RECIPES[name](), planned(name)
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
    plan = planned("flux-12b", "train.layout.shard=1", *(word.replace("'", "") for word in words))
    assert plan.on is not None
    assert fits(plan.step, plan.on)
    said = float(re.search(r"([\d.]+) GiB with", refused)[1])
    assert memory_of(plan.step).total / 2**30 == pytest.approx(said, abs=0.06)


def test_no_accelerator_no_refusal():
    check_memory(planned("flux-12b", "train.layout.shard=1", "train.accelerator=null"), 24)
    named = planned("flux-12b", "train.layout.shard=1")
    with pytest.raises(UserError, match=r"needs 3\d\d\.\d GiB a device \(averages"):
        check_memory(named, 24)
