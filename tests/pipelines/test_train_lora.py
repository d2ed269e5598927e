"""`train.lora_rank`: adapters on an initial model are trained, averaged and kept, and merged."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from command_line import assert_mistake
from small_store import small_store
from test_train_inputs import model_for
from tiny_runs import train_here

from ldm_core.latents.store import LatentStore
from ldm_core.model_directory import load_model, save_model
from ldm_core.model_export import initial_weights
from ldm_core.planning.memory import memory_of, moments
from ldm_core.training.adapter_weights import load_adapters
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.lora import adapters, add_lora
from pipelines import train_denoiser as module
from pipelines.backbones import declared_space, new_backbone
from pipelines.denoiser_worker import DenoiserTraining
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe
from pipelines.teacher_places import ADAPTER
from pipelines.train_denoiser import train_denoiser
from pipelines.train_initial import check_initial
from pipelines.train_plan import plan_training

RANK, STEPS = 3, 6


def recipe_at(root: Path, *words: str) -> Recipe:
    """All write to one tracking store, as making one takes seconds."""
    sets = (
        f"tracking_uri=sqlite:///{root.parent}/mlflow.db",
        "size=8", "precision=fp32", "autoencoder.source=identity", "train.workers.count=1",
        f"train.steps={STEPS}", "train.batch_size=4", "train.checkpoint_every=2",
        "train.log_every=3", f"train.sample_every={STEPS}", "train.sample_steps=2",
    )  # fmt: skip
    return Arguments("image-tiny", root=str(root), overrides=(*sets, *words)).resolve()


def lora_words(base: str) -> tuple[str, ...]:
    return (f"train.initial={base}", f"train.lora_rank={RANK}", "train.learning_rate=0.01")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A teacher that adapters are trained for: of random weights, and of the store beside it."""
    root = tmp_path_factory.mktemp("base")
    version = small_store(root / "latents", shape=(3, 8, 8))
    own = version.manifest.statistics
    known = {"latents_mean": own.mean, "latents_std": own.std, "lineage": {}}
    return model_for(version, root / "teacher", **known)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Recipe:
    """Adapters trained on it, undisturbed."""
    root = tmp_path_factory.mktemp("tuned")
    shutil.copytree(Path(base).parent / "latents", root / "latents")
    recipe = recipe_at(root, *lora_words(base), "train.ema_lengths=[0.05,0.1]")
    train_here(train_denoiser, recipe)
    return recipe


def test_the_model_is_the_base_and_the_product_of_its_adapters(base, tuned):
    product = tuned.product("teacher")
    (_, before, first), (config, after, _) = load_model(base), load_model(product)
    found = load_adapters(f"{product}/{ADAPTER}")
    assert found is not None
    assert (found.scale, found.base) == (1.0, base)
    factors = found.weights
    layers = {name.partition(".lora_")[0] for name in factors}
    assert layers == {
        f"{part}.{i}.attention.{own}"
        for part, blocks in (("blocks", before.blocks), ("text_blocks", before.text_blocks))
        for i in range(len(blocks))
        for own in ("qkv", "out")
    }
    merged = after.state_dict()
    for name, weight in before.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            assert torch.equal(merged[name], weight), name
            continue
        a, b = (factors[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        assert a.shape[0] == b.shape[1] == RANK
        assert (b @ a).abs().max() > 1e-5
        torch.testing.assert_close(merged[name], weight + b @ a, rtol=0, atol=1e-6)
    assert (config.lineage["initial"], config.lineage["lora_rank"]) == (first, str(RANK))


def test_a_training_may_begin_with_what_another_wrote(base, tuned):
    product = tuned.product("teacher")
    manifest = LatentStore(tuned.product("latents")).open_version().manifest
    _, network, _ = load_model(base)
    check_initial(product, manifest, network.config)
    initial_weights(product).load_into(network)
    written = load_model(product)[1].state_dict()
    assert all(torch.equal(weight, written[name]) for name, weight in network.state_dict().items())


def test_peft_reads_the_adapters_and_merges_the_same(base, tuned):
    product = tuned.product("teacher")
    _, network, _ = load_model(base)
    box = torch.nn.ModuleDict(dict(network.named_children()))  # peft wants no configuration of ours
    read = peft.PeftModel.from_pretrained(box, f"{product}/{ADAPTER}")
    assert (read.peft_config["default"].r, read.peft_config["default"].lora_alpha) == (RANK, RANK)
    theirs, ours = read.merge_and_unload().state_dict(), load_model(product)[1].state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6)


def test_a_killed_training_goes_on_to_the_same_bits_from_adapters_alone(
    base, tuned, tmp_path_factory, monkeypatch
):
    root = tmp_path_factory.mktemp("killed")
    shutil.copytree(Path(base).parent / "latents", root / "latents")
    recipe = recipe_at(root, *lora_words(base), "train.ema_lengths=[0.05,0.1]")
    look = DenoiserTraining.look

    def killed(self: DenoiserTraining, done: int) -> None:
        if done == 5:
            self.resuming.wait()
            raise RuntimeError("killed")
        look(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserTraining, "look", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_here(train_denoiser, recipe)
    [folder] = (root / "checkpoints").iterdir()
    kept = newest(str(folder))
    assert kept is not None
    assert kept.step == 4
    named = {name.split("/")[0] for name in kept.index}
    assert named == {"model", "optimizer", "average"}
    assert all(".lora_" in name for name in kept.index)
    again = train_here(train_denoiser, recipe)
    whole = load_model(tuned.product("teacher"))[2]
    assert again.summary["digest"] == whole


def test_workers_refuse_a_base_that_was_replaced_since_the_command_began(
    base, tmp_path_factory, monkeypatch
):
    root = tmp_path_factory.mktemp("replaced")
    mine = str(shutil.copytree(base, root / "mine"))
    shutil.copytree(Path(base).parent / "latents", root / "latents")
    config, network, began = load_model(mine)

    def replace(*_: object) -> None:
        weights = {name: weight + 1 for name, weight in network.state_dict().items()}
        save_model(mine, config, weights, "")

    monkeypatch.setattr(module, "_tell_inputs", replace)
    with pytest.raises(Exception, match=f"now holds the model .* began with {began}"):
        train_here(train_denoiser, recipe_at(root, *lora_words(mine)))


def test_averages_after_the_fact_are_of_the_adapters(base, tuned, ldm, tmp_path):
    """At the width of one that was kept, the average is that one."""
    product = tuned.product("teacher")
    for model, out in ((product, "other"), ("other", "out")):  # an average's average is the model's
        result = ldm("export", model, out, "--average", 0.1 if out == "out" else 0.05)
        assert result.exit_code == 0, result.output
    [folder] = Path(f"{product}-snapshots").iterdir()
    last = newest(str(folder))
    assert last is not None
    kept = read_tensors(last, "average/power-0.1/")
    before, averaged = load_model(base)[1].state_dict(), load_model("out")[1].state_dict()
    layers = {name.partition(".lora_")[0] for name in kept}
    for layer in layers:
        a, b = (kept[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        expected = before[f"{layer}.weight"] + b @ a
        torch.testing.assert_close(averaged[f"{layer}.weight"], expected, rtol=0, atol=1e-6)
    beside = load_adapters(f"out/{ADAPTER}")
    assert beside is not None
    torch.testing.assert_close(dict(beside.weights), kept)
    assert not any(torch.equal(averaged[f"{layer}.weight"], before[f"{layer}.weight"])
                   for layer in layers)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("train.lora_rank=4",), ("train: lora_rank 4 without initial", "set initial")),
        (
            ("train.lora_rank=4", "train.initial=x", "train.float8=true"),
            ("float8 with lora_rank 4",),
        ),
        (("train.lora_rank=0", "train.initial=x"), ("train.lora_rank is 0",)),
    ],
)
def test_what_cannot_be_adapted_is_refused(ldm, words, named):
    sets = [word for each in words for word in ("--set", each)]
    assert_mistake(ldm("train", "image-tiny", "--dry-run", *sets), *named)


JOINT = ("train.backbone=mmdit", "train.single_depth=1", "train.layout.shard=2")


@pytest.mark.parametrize("words", [(), JOINT], ids=["dit", "mmdit in shards"])
def test_the_plan_counts_adapters_where_they_alone_are_trained(words):
    words = ("train.workers.count=2", "train.optimizer=adamw", *words)
    plain = Arguments("image-tiny", overrides=words).resolve()
    adapted = (*words, "train.initial=x", "train.lora_rank=4")
    recipe = Arguments("image-tiny", overrides=adapted).resolve()
    all_weights = plan_training(plain, declared_space(plain)).step
    plan = plan_training(recipe, declared_space(recipe))
    with torch.device("meta"):
        network = new_backbone(plan.backbone)
    add_lora(network, 4, 4)
    count = sum(weight.numel() for weight in adapters(network))
    assert plan.step.adapters == count < all_weights.weights.total / 4
    share = 4 * count / plan.step.layout.holders
    memory = memory_of(plan.step)
    assert (memory.gradients, memory.optimizer, memory.update) == (share, 2 * share, 0)
    assert memory.averages == plan.step.averages * share
    assert memory.weights == memory_of(all_weights).weights + share
    assert moments(plan.step) == 2 * count
    sample = plan.step.samples[0]
    assert plan.step.flops(sample) == 2 * sample.forward.flops


def test_a_dry_run_tells_of_the_adapters(ldm):
    words = ("--set", "train.initial=x", "--set", "train.lora_rank=4")
    text = ldm("train", "image-tiny", "--dry-run", *words).stdout
    assert "of rank 4: they alone are trained, by AdamW" in text
    assert "none, adamw, averages 1" in text
