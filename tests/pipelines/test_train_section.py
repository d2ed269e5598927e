"""What decides a training's result, and what a section makes of the workers it has."""

import re

import pytest
from pydantic import ValidationError
from torch import nn

from pipelines.denoiser_network import new_averages
from pipelines.recipes import RECIPES
from pipelines.recipes.layout_section import LayoutSection
from pipelines.recipes.sections import TrainSection, Workers
from pipelines.train_plan import layout_of, micro_samples

TELLING = {
    "layout": LayoutSection(replicate=2),
    "activation_checkpointing": "full",
    "compile": True,
    "workers": Workers(count=4),
    "least_workers": 1,
    "validate_every": 7,
    "keep_checkpoints": 5,
    "snapshot_every": 3,
    "accelerator": "H100-80",
    "worker_hour_price": 2.0,
    "store_version": 3,
    "initial": "models:/a/1",  # what it names does, as an input of the stage
    "max_failures": 0,
}
DECIDING = {
    "micro_batches": 4,
    "tokens": 512,
    "optimizer": "adamw",
    "schedule": "cosine",
    "ema_decays": (0.9,),
    "ema_lengths": (0.05,),
    "spike_factor": 4.0,
    "validation_samples": 8,
    "mlp_ratio": 4.0,
    "buckets": ("64x64x1",),
    "mix": ({"uri": "s3://b/more"},),
    "steps": 9,
}


def section(**fields) -> TrainSection:
    return TrainSection.model_validate(fields)


@pytest.mark.parametrize("name", TELLING)
def test_what_does_not_decide(name):
    plain = section(micro_batches=4)  # which samples a step has: else as many as workers
    assert section(micro_batches=4, **{name: TELLING[name]}).deciding() == plain.deciding()


@pytest.mark.parametrize("name", DECIDING)
def test_what_decides(name):
    assert section(**{name: DECIDING[name]}).deciding() != section().deciding()


@pytest.mark.parametrize("name", RECIPES)
def test_any_shipped_recipe_goes_on_with_fewer_workers(name):
    plain = RECIPES[name]().train
    assert plain.parts == plain.micro_batches
    values = {field: getattr(plain, field) for field in TrainSection.model_fields}
    group = plain.layout.shard * plain.layout.context
    for count in {plain.workers.count // 2, 1}:
        fewer = plain.workers.model_copy(update={"count": count})
        layout = plain.layout if count % group == 0 else LayoutSection()
        assert TrainSection(**{**values, "workers": fewer, "layout": layout}).deciding() == (
            plain.deciding()
        )


def test_without_micro_batches_other_workers_are_another_training():
    assert section(workers={"count": 4}).deciding() != section(workers={"count": 2}).deciding()


def test_float8_is_of_gpus_and_decides():
    with pytest.raises(ValidationError, match=r"workers\.gpus is 0: set workers\.gpus=1"):
        section(float8=True)
    gpus = {"count": 2, "gpus": 1}
    assert section(float8=True, workers=gpus).deciding() != section(workers=gpus).deciding()


def test_patience_decides_and_with_it_where_losses_are_known():
    patient = section(validation_samples=8, patience=2).deciding()
    assert patient != section(validation_samples=8).deciding()
    assert patient != section(validation_samples=8, patience=3).deciding()
    assert patient != section(validation_samples=8, patience=2, validate_every=7).deciding()


def test_who_is_champion_and_what_is_sampled_decide_nothing():
    plain = section(validation_samples=8).deciding()
    for field in ({"promote": "better"}, {"system_metrics": False}):
        assert section(validation_samples=8, **field).deciding() == plain


@pytest.mark.parametrize("field", [{"patience": 2}, {"promote": "better"}])
def test_what_goes_by_a_validation_loss_needs_one(field):
    [(name, value)] = field.items()
    with pytest.raises(ValidationError, match=f"{name} {value} .* validation_samples is 0"):
        section(**field)
    assert getattr(section(validation_samples=1, **field), name) == value


def test_averages_of_one_name_are_refused():
    assert section(ema_decays=(0.9, 0.99999), ema_lengths=(0.1, 0.05)).ema_lengths == (0.1, 0.05)
    for field, values, name in (
        ("ema_decays", (0.9, 0.99999991, 0.99999992), "1"),
        ("ema_lengths", (0.05, 0.05), "0.05"),
    ):
        told = f"{field} {values[-2]} and {values[-1]} are both called {name}: "
        with pytest.raises(ValidationError, match=re.escape(told)):
            section(**{field: values})


def test_all_averages_that_are_let_through_are_kept():
    decays, lengths = (0.5, 0.9, 0.999999, 0.9999), (0.05, 0.1, 0.050001)
    made = new_averages(section(ema_decays=decays, ema_lengths=lengths), nn.Linear(1, 1))
    assert len(made.by_name) == 1 + len(decays) + len(lengths)


def test_snapshots_do_not_grow_with_the_steps():
    def kept(**fields) -> tuple[int, int]:
        train = section(ema_lengths=(0.05, 0.1), **fields)
        return train.snapshot_steps, train.snapshots

    assert kept(steps=400_000, checkpoint_every=2000) == (8000, 100)
    assert kept(steps=12, checkpoint_every=2) == (2, 12)
    assert kept(steps=101, checkpoint_every=1) == (3, 68)
    assert kept(steps=101, checkpoint_every=1000, snapshot_every=10) == (10, 22)
    assert section(steps=10_000).snapshots == 0


def test_of_a_mix_the_weights_decide_and_the_content_is_an_input():
    def told(**share: object) -> object:
        return section(mix=({"uri": "a", "weight": 2.0} | share,)).deciding()

    assert told()["mix"] == [2.0]
    assert told(uri="b", version=3) == told() != told(weight=1.0)


def test_fields_that_say_nothing_new_are_left_out():
    """Of the demo's digest, which a new field would else change."""
    assert RECIPES["image-s"]().train.deciding() == {
        "steps": 1900, "batch_size": 32, "learning_rate": 0.008, "clip_norm": 1.0,
        "patch_size": 2, "width": 96, "depth": 4, "heads": 4, "warmup_steps": 50,
        "decay_fraction": 0.6, "weight_decay": 0.01, "caption_drop": 0.1, "timestep_mean": 0.0,
        "timestep_std": 0.8, "timestep_shift": 3.0, "ema_decay": 0.99, "sample_steps": 32,
        "guidance": 2.5, "parts": 2,
    }  # fmt: skip
    assert "temporal_downsampling" not in RECIPES["image-s"]().autoencoder.deciding()


def test_the_layout_of_the_workers():
    def laid_out(count: int, **layout: int) -> tuple[int, int, int, int, int]:
        train = section(workers={"count": count}, layout=layout, batch_size=64)
        made = layout_of(train)
        return made.replicate, made.shard, made.context, train.lanes, train.parts

    assert laid_out(8) == (8, 1, 1, 8, 8)
    assert laid_out(8, shard=4) == (2, 4, 1, 8, 8)
    assert laid_out(8, shard=2, context=2) == (2, 2, 2, 4, 4)
    with pytest.raises(ValidationError, match="replicate 3 x shard 2 x context 1 are 6 workers, b"):
        section(workers={"count": 8}, layout={"replicate": 3, "shard": 2})


def test_larger_samples_come_in_smaller_micro_batches():
    tokens = {"64x64x1": 64, "64x128x1": 128, "64x64x25": 1600}
    train = section(batch_size=32, micro_batches=2)
    assert micro_samples(train, tokens) == {"64x64x1": 16, "64x128x1": 8, "64x64x25": 1}
    assert micro_samples(section(tokens=640), tokens)["64x64x1"] == 10
    assert section(tokens=640, batch_size=33).parts == 2  # the budget says how many there are
