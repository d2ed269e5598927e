"""Stage 3: the latent store -> a text-conditioned latent diffusion transformer, the teacher.

    open the newest version -> flow matching under Ray Train -> EMA weights as a model directory

The order of samples, noise, timesteps and dropped captions are functions of (seed, step, sample),
so that neither worker count nor a restart changes what is trained on.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.files import join
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.model_directory import FORMAT
from ldm_core.training.checkpoint_newest import newest
from pipelines.backbones import declared_space
from pipelines.commands import command
from pipelines.denoiser_network import fitting
from pipelines.denoiser_worker import architecture, denoiser_worker
from pipelines.diffusers_backbone import with_initial_sizes
from pipelines.epoch_account import say_epoch
from pipelines.lineage import tell_parents
from pipelines.model_registry import register_model
from pipelines.promotion import CHAMPION, Score, copy_beside, decide, save_champion
from pipelines.ray_training import fit
from pipelines.recipes.schema import Recipe
from pipelines.stage import (
    Context,
    Options,
    Record,
    checkpoint_place,
    read_record,
    run_stage,
    say_verdict,
    stage_digest,
    up_to_date,
)
from pipelines.tracking import Run
from pipelines.train_checks import check_autoencoder, check_training
from pipelines.train_inputs import InitialModel, initial_model, input_digests, pinned
from pipelines.train_plan import check_memory, plan_training
from pipelines.train_plan_table import print_plan
from pipelines.training_data import TrainingData, find_data

INITIAL_LOOK = "initial_look"  # in the summary: of the initial model's files


def train_denoiser(recipe: Recipe, options: Options) -> Record | None:
    """Train the teacher on the newest published version of the recipe's store.

    Raises:
        UserError: no published version, one of another size, other encoders than the initial
            model's, or a transformer or layout that does not fit: see `check_training`; or there is
            something to train, and the autoencoder that made the latents is gone or another one, or
            a checkpoint is of another network or order.
    """
    asked, recipe = recipe, with_initial_sizes(recipe.located())
    store = LatentStore(recipe.product("latents"))
    if options.dry_run and not store.versions():
        plan = plan_training(recipe, declared_space(recipe))
        print_plan(plan, recipe.train, command(asked, "encode"))
        check_memory(plan, recipe.train.heads)
        say_verdict("train", f"would run once there is a store at {store.uri}")
        return None
    version = store.open_version(recipe.train.store_version)
    recipe, mix = pinned(recipe)
    section = recipe.train
    plan = check_training(recipe, version, mix)
    if options.dry_run:
        say_epoch(recipe, version, mix)
        print_plan(plan, section, command(asked, "train"))
    check_memory(plan, section.heads)
    product = recipe.product("teacher")
    initial = initial_model(section.initial, _known(product)) if section.initial else None
    inputs = input_digests(version, mix, initial)

    def work(context: Context) -> dict[str, Any]:
        manifest = version.manifest
        _tell_inputs(context.run, [version, *mix], initial)
        name = f"{recipe.model_name}-teacher"
        if section.promote == "better":
            save_champion(context.run, name, context.product)
        print(
            f"[train] {manifest.counts['samples']} samples of store version {version.number}, "
            f"{section.steps} steps of {section.batch_size}",
            flush=True,
        )
        data = find_data(recipe, version, mix=mix)
        _check_checkpoint(context, data)
        worker = partial(denoiser_worker, data)
        summary = fit(
            context,
            worker,
            section.workers,
            section.steps,
            section.max_failures,
            section.least_workers,
            section.validation_gpus,
        )
        if ended := summary.get("ended"):
            print(f"[train] ended after {summary['steps']} steps: {ended}", flush=True)
        number = _register(context, name, summary)
        looked = {INITIAL_LOOK: initial.look} if initial else {}
        return {**summary, **looked, "registered": f"models:/{name}/{number}"}

    sections = {
        "format": FORMAT,  # a former one's product and checkpoints are of another network
        "train": section.deciding(),
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    if isinstance(plan.backbone, DiffusersConfig):  # what the recipe's section leaves to its folder
        sections["backbone"] = plan.backbone.model_dump()
    if not up_to_date(product, stage_digest(sections, inputs), options):
        check_autoencoder(version)  # which it reads, perhaps out of a bucket
    return run_stage(recipe, "train", product, sections, inputs, work, options)


def _check_checkpoint(context: Context, data: TrainingData) -> None:
    """Refuse to go on from a checkpoint of another network or order, before any worker starts.

    Its files are not read here: the workers do that between them.
    """
    section, seed = context.recipe.train, context.recipe.seed
    place = join(*checkpoint_place(context.recipe, context.product, context.digest))
    with data.reader(section, seed) as reader:
        expected = architecture(fitting(section, reader, data.main), reader)
    newest(place, expected, told=lambda _: None, hashes=False)


def _known(product: str) -> dict[str, str]:
    """The digest of the initial model that the product was trained from, by the look of its files:
    to ask whether a training is up to date no weights are read.
    """
    record = read_record(product)
    if record is None or "initial" not in record.inputs:
        return {}
    return {record.summary.get(INITIAL_LOOK, ""): record.inputs["initial"]}


def _register(context: Context, name: str, summary: Mapping[str, Any]) -> str:
    """The model as a version of its name, the champion or not; returns the number."""
    run, rule, model = context.run, context.recipe.train.promote, summary["digest"]
    score = Score.of(summary)
    decision = decide(run, name, rule, model, score)
    place = copy_beside(context.product, model) if rule == "better" else context.product
    alias = CHAMPION if decision.promoted else None
    number = register_model(run, name, place, model, alias, score.tags() if score else {})
    decision.say(run, name, number)
    return number


def _tell_inputs(run: Run, stores: Sequence[StoreVersion], initial: InitialModel | None) -> None:
    """Say what the run reads: the recipe's own store first, those of the mix, the initial model.

    And under which run it is shown.
    """
    for k, version in enumerate(stores):
        name, content = f"mix.{k}" if k else "latents", version.manifest.content[:36]
        run.dataset(name, version.store.uri, content, context="training")
    tell_parents(run, stores[0], initial)
