"""Stage 5: teacher and student -> how often their pictures show what the captions say.

    fixed captions and seeds -> pictures on Ray -> a verifier's verdicts -> scores with intervals
    beside them: real pictures and their reconstructions (the ceiling), and chance

The captions are those of the procedural shapes, which a program can check; models that were
trained on other pictures are refused, as nothing about them would be measured.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ldm_core.evaluation.verifier import Verdict
from ldm_core.files import absolute, exists, join, upload_folder
from ldm_core.generation import grid_image
from ldm_core.model_directory import ModelConfig, load_model
from pipelines.evaluate_workers import SHOWN, Job, Result, score_on_ray
from pipelines.judged_pictures import refuse_other_pictures
from pipelines.recipes.schema import Recipe
from pipelines.scores import Entry, Kind, Scores, chance_of, score
from pipelines.scores_plot import plot_steps
from pipelines.stage import Context, Options, Record, forget_record, run_stage

COLUMNS = 8  # pictures in a row of the sample sheets


def evaluate(recipe: Recipe, options: Options) -> Record | None:
    """Score the recipe's teacher and, if there is one, its student.

    Raises:
        UserError: no teacher, or models of other pictures than the shapes.
    """
    recipe = recipe.located()
    models = {"teacher": _load(recipe, "teacher")}
    if exists(join(recipe.product("student"), "config.json")):
        models["student"] = _load(recipe, "student")
    else:
        print("[evaluate] no student yet (`ldm distill` makes one): teacher alone", flush=True)
    digests = {kind: digest for kind, (_, digest) in models.items()}
    configs = {kind: config for kind, (config, _) in models.items()}
    for kind, config in configs.items():
        refuse_other_pictures(recipe, kind, config)
    job = _job(recipe, configs)

    def work(context: Context) -> dict[str, Any]:
        context.run.tags({f"parent.{kind}": c.lineage.get("run") for kind, c in configs.items()})
        print(
            f"[evaluate] {sum(job.counts.values())} captions for each of {len(job.entries)}: "
            + ", ".join(entry.name for entry in job.entries),
            flush=True,
        )
        scores, sheets = collect(job, digests, _draw(job, context))
        publish(scores, sheets, context)
        print_scores(scores)
        return flat(scores)

    section = recipe.evaluate.model_dump(mode="json", exclude={"workers", "batch_size"})
    sections = {"evaluate": section, "size": recipe.size}
    product = recipe.product("evaluation")
    return run_stage(recipe, "evaluate", product, sections, digests, work, options)


def _load(recipe: Recipe, kind: str) -> tuple[ModelConfig, str]:
    config, _, digest = load_model(recipe.product(kind))
    return config, digest


def _job(recipe: Recipe, configs: dict[str, ModelConfig]) -> Job:
    section = recipe.evaluate
    counts: dict[Kind, int] = {"single": section.single_prompts, "double": section.double_prompts}
    steps = {
        "teacher": (section.teacher_steps,),
        "student": tuple(sorted(set(section.student_steps))),
    }
    models = [
        Entry(
            name=f"{kind}-{count}",
            source=kind,  # type: ignore[arg-type]
            steps=count,
            model=absolute(recipe.product(kind)),
            guidance=config.guidance,
        )
        for kind, config in configs.items()
        for count in steps[kind]
    ]
    ceiling = [Entry(name=name, source=name) for name in ("real", "reconstructed")]
    return Job(
        entries=(*models, *ceiling),
        teacher=absolute(recipe.product("teacher")),
        size=int(configs["teacher"].sizes[0].split("x")[0]),
        counts={kind: count for kind, count in counts.items() if count},
        seed=section.seed,
        batch_size=section.batch_size,
    )


def _draw(job: Job, context: Context) -> Iterable[Result]:
    """The results as they come, shown as sampling steps, which take about the same time each."""
    steps = {entry.name: max(1, entry.steps) for entry in job.entries}
    total = sum(steps.values()) * sum(job.counts.values())
    workers, done = context.recipe.evaluate.workers, 0
    with context.progress(total, "sampling steps") as bar:
        for result in score_on_ray(job, workers, context.options.verbose):
            done += steps[result.entry] * len(result.verdicts)
            bar.update(done, result.entry)
            yield result


def collect(
    job: Job, digests: dict[str, str], results: Iterable[Result]
) -> tuple[Scores, dict[str, np.ndarray]]:
    """All rows' results as scores, and a sheet of the first pictures by entry."""
    verdicts: dict[tuple[str, Kind], list[Verdict]] = defaultdict(list)
    pictures: dict[str, list[np.ndarray]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    order = {kind: index for index, kind in enumerate(job.counts)}
    for result in sorted(results, key=lambda r: (order[r.kind], r.start)):
        verdicts[result.entry, result.kind] += result.verdicts
        pictures[result.entry].append(result.pictures)
        seconds[result.entry] += result.seconds
    names = [entry.name for entry in job.entries]
    scores = Scores(
        models=digests,
        size=job.size,
        entries=list(job.entries),
        rows=[
            row
            for name in names
            for kind in job.counts
            for row in score(name, kind, verdicts[name, kind])
        ],
        chance=chance_of(list(job.counts)),
        shown={
            kind: [scene.caption for scene in scenes[:SHOWN]]
            for kind, scenes in job.scenes().items()
        },
        shown_right={
            name: [v.all for kind in job.counts for v in verdicts[name, kind][:SHOWN]]
            for name in names
        },
        seconds_per_picture={name: seconds[name] / sum(job.counts.values()) for name in names},
    )
    return scores, {name: grid_image(np.concatenate(pictures[name]), COLUMNS) for name in names}


def publish(scores: Scores, sheets: dict[str, np.ndarray], context: Context) -> None:
    """Write scores, sheets and plot to the product, and log them with the run."""
    with tempfile.TemporaryDirectory(prefix="ldm-evaluation-") as name:
        folder = Path(name)
        for key, sheet in sheets.items():
            Image.fromarray(sheet).save(folder / f"samples-{key}.png")
            context.run.image(sheet, f"samples-{key}")
        (folder / "steps.png").write_bytes(plot_steps(scores))
        (folder / "scores.json").write_text(scores.model_dump_json(indent=2) + "\n")
        for file in ("steps.png", "scores.json"):
            context.run.file(folder / file)
        forget_record(context.product)
        upload_folder(folder, context.product)
    for entry in scores.entries:  # without the steps in the key: MLflow draws quality over steps
        rows = [row for row in scores.rows if row.entry == entry.name]
        values = {f"{entry.source}/{row.kind}/{row.attribute}": row.rate for row in rows}
        context.run.metrics(values, step=entry.steps)


def flat(scores: Scores) -> dict[str, Any]:
    """The scores by names such as "teacher-32/single/color", for the stage's record."""
    rates = {f"{row.entry}/{row.kind}/{row.attribute}": row.rate for row in scores.rows}
    seconds = scores.seconds_per_picture.items()
    return {**rates, **{f"{entry}/seconds_per_picture": value for entry, value in seconds}}


def print_scores(scores: Scores) -> None:
    """A table for each kind of scene, chance in the last line."""
    for kind in scores.kinds:
        trials = next(row.trials for row in scores.rows if row.kind == kind)
        title = f"{kind} scenes: % right of {trials}; intervals are in scores.json"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for attribute in scores.chance[kind]:
            table.add_column(attribute, justify="right")
        for entry in scores.entries:
            found = [scores.find(entry.name, kind, name) for name in scores.chance[kind]]
            table.add_row(entry.name, *(f"{100 * row.rate:.1f}" for row in found if row))
        table.add_section()
        table.add_row("chance", *(f"{100 * level:.1f}" for level in scores.chance[kind].values()))
        Console().print(table)
