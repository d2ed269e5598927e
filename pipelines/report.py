"""The whole project on one page: data, models, scores, times, and the commands that made them.

The page is read back from the products, so it can be written at any time; a stage that has not
run yet is named with its command.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np

from ldm_core.errors import UserError
from ldm_core.files import exists, join, read_bytes, read_json, write_bytes
from pipelines.ask_endpoint import Answer
from pipelines.commands import command, shapes_command
from pipelines.judged_pictures import made_of_shapes
from pipelines.provenance import code, machine, packages
from pipelines.recipes.schema import Recipe
from pipelines.report_pictures import (
    SHEET,
    cut_sheet,
    data_uri,
    png_uri,
    read_picture,
    reconstructions,
    sample_pictures,
)
from pipelines.scores import Scores
from pipelines.scores_plot import PANELS
from pipelines.stage import Record, read_record

SAMPLES = 8  # pictures of the data
COMPARED = 6  # captions of each kind whose pictures stand side by side
T = TypeVar("T")


@dataclass(frozen=True)
class StageView:
    """One line of the table of stages; `record` is None while the stage has not run."""

    title: str
    stage: str
    product: str
    command: str
    record: Record | None
    rate: str = ""
    note: str = ""


def write_report(recipe: Recipe) -> str:
    """Write `report.html` under the recipe's root and return its URI."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages = {view.stage: view for view in stage_views(recipe)}
    if not made_of_shapes(recipe):
        del stages["evaluate"]  # it would be refused
    page = environment.get_template("report.html").render(
        recipe=recipe,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine(),
        packages=packages(),
        code=code(),
        seconds=sum(view.record.seconds for view in stages.values() if view.record),
        stages=stages,
        data=_data(recipe),
        evaluation=_evaluation(recipe),
        models=_models(recipe, stages),
        answer=_answer(recipe),
        tracking_uri=next((v.record.tracking_uri for v in stages.values() if v.record), None),
        demo=command(recipe, "demo"),
        serve=command(recipe, "serve"),
    )
    uri = recipe.product("report.html")
    write_bytes(uri, page.encode())
    return uri


def stage_views(recipe: Recipe) -> list[StageView]:
    """The stages in their order, with what their records say."""
    views = []
    for title, stage, product, describe in STAGES:
        uri = recipe.product(product)
        record = read_record(uri)
        rate, note = describe(recipe, record) if record else ("", "")
        views.append(StageView(title, stage, uri, command(recipe, stage), record, rate, note))
    return views


# What a stage's record says, as (throughput, result)


def _autoencoder_words(recipe: Recipe, record: Record) -> tuple[str, str]:
    note = f"{record.summary.get('psnr', float('nan')):.1f} dB PSNR on held-out pictures"
    return _trained_at(record, "pictures"), note


def _encode_words(recipe: Recipe, record: Record) -> tuple[str, str]:
    summary = record.summary
    note = (
        f"store version {summary.get('version')}: {summary.get('samples')} samples, "
        f"{summary.get('texts')} texts, {summary.get('rejects')} rejects"
    )
    rate = f"{summary['images_per_second']:.0f} pictures/s" if summary.get("new_rows") else ""
    return rate, note


def _train_words(recipe: Recipe, record: Record) -> tuple[str, str]:
    parameters = record.summary.get("parameters", 0) / 1e6
    note = f"{parameters:.1f} M parameters, {recipe.train.steps} steps"
    return _trained_at(record, "samples"), note


def _distill_words(recipe: Recipe, record: Record) -> tuple[str, str]:
    section = recipe.distill
    note = f"for {section.student_steps} steps, guidance {section.guidance:g} folded in"
    return _trained_at(record, "samples"), note


def _evaluate_words(recipe: Recipe, record: Record) -> tuple[str, str]:
    names = {key.split("/")[0] for key in record.summary}
    captions = recipe.evaluate.single_prompts + recipe.evaluate.double_prompts
    rate = captions * len(names) / max(record.seconds, 1e-9)
    return _rate(rate, "pictures"), f"{captions} captions for each of {len(names)}"


def _trained_at(record: Record, unit: str) -> str:
    """The workers' own rate: the record's seconds also hold the start of Ray and workers."""
    rate = record.summary.get("mean_samples_per_second", 0)
    return _rate(rate, unit) if rate else ""


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


STAGES: tuple[tuple[str, str, str, Callable[[Recipe, Record], tuple[str, str]]], ...] = (
    ("Autoencoder", "autoencoder", "autoencoder", _autoencoder_words),
    ("Latent store", "encode", "latents", _encode_words),
    ("Teacher", "train", "teacher", _train_words),
    ("Student", "distill", "student", _distill_words),
    ("Evaluation", "evaluate", "evaluation", _evaluate_words),
)


# The parts of the page; None where the product is not there yet


def _data(recipe: Recipe) -> dict[str, Any]:
    samples = _if_there(lambda: sample_pictures(recipe.data, recipe.size, SAMPLES)) or []
    pictures = [picture for picture, _ in samples]
    after = None
    if pictures:
        after = _if_there(lambda: reconstructions(pictures, recipe.autoencoder_uri))
    return {
        "samples": [(data_uri(picture), caption) for picture, caption in samples],
        "reconstructions": [] if after is None else [data_uri(picture) for picture in after],
        "command": shapes_command(recipe, 4096),
    }


def _if_there(read: Callable[[], T]) -> T | None:
    """What is read, or None where the user has nothing to read yet."""
    try:
        return read()
    except UserError:
        return None


def _evaluation(recipe: Recipe) -> dict[str, Any] | None:
    folder = recipe.product("evaluation")
    if read_record(folder) is None:
        return None
    scores = Scores.model_validate(read_json(join(folder, "scores.json")))
    names = [entry.name for entry in scores.entries]
    sheets = {name: read_picture(join(folder, f"samples-{name}.png")) for name in names}
    return {
        "scores": scores,
        "in_short": in_short(scores),
        "names": names,
        "plot": png_uri(read_bytes(join(folder, "steps.png"))),
        "comparison": _comparison(scores, sheets),
        "sheets": {name: data_uri(sheet, SHEET) for name, sheet in sheets.items()},
    }


def in_short(scores: Scores) -> str:
    """What matters most, of the teacher and of the student at its most steps."""
    sentences = []
    for source in ("teacher", "student"):
        entries = [entry for entry in scores.entries if entry.source == source]
        for entry in entries[-1:]:
            found = [
                f"{attribute} {100 * row.rate:.0f} % ({100 * row.low:.0f} to {100 * row.high:.0f})"
                for kind, attribute, _ in PANELS
                if (row := scores.find(entry.name, kind, attribute))
            ]
            seconds = scores.seconds_per_picture[entry.name]
            sentences.append(
                f"The {source} in {entry.steps} steps gets right: {', '.join(found)}; "
                f"a picture takes {seconds:.2g} s."
            )
    return " ".join(sentences)


def _comparison(scores: Scores, sheets: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of a caption and every entry's picture of it, with whether it is right."""
    rows, first = [], 0
    count = sum(map(len, scores.shown.values()))
    pictures = {name: cut_sheet(sheet, scores.size, count) for name, sheet in sheets.items()}
    for captions in scores.shown.values():
        for index, caption in enumerate(captions[:COMPARED], first):
            cells = [
                (name, data_uri(pictures[name][index]), scores.shown_right[name][index])
                for name in sheets
            ]
            rows.append({"caption": caption, "pictures": cells})
        first += len(captions)
    return rows


def _models(recipe: Recipe, stages: dict[str, StageView]) -> dict[str, dict[str, Any]]:
    """Digest, lineage and encoders of teacher and student."""
    found = {}
    for kind, stage in (("teacher", "train"), ("student", "distill")):
        config = join(recipe.product(kind), "config.json")
        record = stages[stage].record
        if record and exists(config):
            values = read_json(config)
            encoders = {name: values[name] for name in ("autoencoder", "t5", "clip")}
            digest = record.summary.get("digest", "")
            found[kind] = {"digest": digest, "lineage": values["lineage"], "encoders": encoders}
    return found


def _answer(recipe: Recipe) -> dict[str, Any] | None:
    uri = recipe.product("answer.json")
    if not exists(uri):
        return None
    picture = data_uri(read_picture(recipe.product("answer.png")), 512)
    return {"record": Answer.model_validate(read_json(uri)), "picture": picture}
