"""The evaluation on real files with random weights: who is asked what, counted and kept."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_store import add_sample, small_store
from tiny_models import WIDTH, save_tiny_models

from ldm_core.errors import UserError
from ldm_core.evaluation.prompts import evaluation_scenes
from ldm_core.evaluation.verifier import Verdict
from ldm_core.files import read_json
from ldm_core.text.tiny import build_tiny_text_encoders
from pipelines import ray_runtime
from pipelines.evaluate_model import COLUMNS, collect, evaluate
from pipelines.evaluate_workers import Job, Result, ScorePictures
from pipelines.judged_pictures import made_of_shapes
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EvaluateSection, TextSection, Workers
from pipelines.scores import ATTRIBUTES, Entry, Kind, Scores, chance_of, score
from pipelines.scores_plot import plot_steps
from pipelines.stage import Options, Record
from pipelines.tracking import Run

SINGLE, DOUBLE, SIZE = 20, 6, 64
RIGHT = Verdict(True, True, True, True, True, True)
WRONG_COLOR = Verdict(False, True, True, True, True, True)


def tiny_recipe(root: Path) -> Recipe:
    return Recipe(
        name="test",
        data=str(root / "data"),
        root=str(root),
        size=SIZE,
        autoencoder=AutoencoderSection(source="identity"),
        text=TextSection(tiny_width=WIDTH),
        evaluate=EvaluateSection(
            single_prompts=SINGLE,
            double_prompts=DOUBLE,
            teacher_steps=3,
            student_steps=(2, 1),
            batch_size=12,
            workers=Workers(count=1),  # starting a second costs more than it does here
        ),
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    recipe = tiny_recipe(tmp_path_factory.mktemp("project"))
    save_tiny_models(recipe)
    return recipe


@pytest.fixture(scope="module")
def record(recipe: Recipe, ray_session: None) -> Record:
    return evaluate(recipe, Options())


@pytest.fixture(scope="module")
def scores(recipe: Recipe, record: Record) -> Scores:
    return Scores.model_validate(read_json(recipe.product("evaluation/scores.json")))


# Counting, without Ray


def a_job(**changes) -> Job:
    entries = (
        Entry(name="teacher-4", source="teacher", steps=4),
        Entry(name="real", source="real"),
    )
    counts: dict[Kind, int] = {"single": 20, "double": 3}
    base = {"teacher": "", "size": 2, "seed": 5, "batch_size": 8}
    return Job(**{"entries": entries, "counts": counts, **base, **changes})


def answered(job: Job) -> Iterator[Result]:
    """Every third picture of a single scene has the wrong colour."""
    for row in reversed(job.rows()):
        indices = range(row["start"], row["stop"])
        shown = [index for index in indices if index < 16]
        pictures = [np.full((2, 2, 3), index, np.uint8) for index in shown]
        yield Result(
            entry=row["entry"],
            kind=row["kind"],
            start=row["start"],
            verdicts=[WRONG_COLOR if index % 3 == 0 else RIGHT for index in indices],
            pictures=np.array(pictures, np.uint8).reshape(-1, 2, 2, 3),
            seconds=0.5,
        )


def test_a_score_is_the_share_of_right_verdicts_within_its_interval():
    rows = {row.attribute: row for row in score("x", "single", [RIGHT] * 3 + [WRONG_COLOR])}
    assert (rows["color"].successes, rows["color"].trials, rows["color"].rate) == (3, 4, 0.75)
    assert (rows["shape"].rate, rows["shape"].high) == (1, pytest.approx(1))
    assert rows["color"].low < rows["color"].rate < rows["color"].high
    assert tuple(rows) == ATTRIBUTES["single"]


def test_a_scene_of_two_is_also_asked_for_the_right_pairs():
    verdicts = [Verdict(True, True, True, True, True, True, both=b) for b in (True, False)]
    rows = {row.attribute: row.rate for row in score("x", "double", verdicts)}
    assert rows["both"] == 0.5
    assert chance_of(["double"])["double"].keys() == rows.keys()


def test_rows_cover_every_scene_of_every_entry_once_and_begin_with_the_slowest():
    job = a_job()
    rows = job.rows()
    asked = [(r["entry"], r["kind"], i) for r in rows for i in range(r["start"], r["stop"])]
    assert len(asked) == len(set(asked)) == 2 * 23
    assert rows[0]["entry"] == "teacher-4"


def test_no_two_scenes_share_their_noise():
    job = a_job()
    seeds = job.seeds("single", 0, 20) + job.seeds("double", 0, 3)
    assert len(set(seeds)) == 23
    assert job.seeds("single", 8, 10) == job.seeds("single", 0, 10)[8:]


def test_results_in_any_order_make_the_same_scores_and_sheets():
    job = a_job()
    scores, sheets = collect(job, {"teacher": "d"}, answered(job))
    row = scores.find("teacher-4", "single", "color")
    assert row is not None
    assert (row.successes, row.trials) == (13, 20)
    assert scores.seconds_per_picture["real"] == pytest.approx(0.5 * 4 / 23)
    assert [len(captions) for captions in scores.shown.values()] == [16, 3]
    assert scores.shown_right["real"][:4] == [False, True, True, False]
    # the pictures' values are their indices, read along the rows of the sheet
    values = sheets["real"][3::4, 3::4, 0].ravel()
    assert values[:19].tolist() == [*range(16), 0, 1, 2]


def test_a_project_without_pairs_has_no_such_rows():
    job = a_job(counts={"single": 4})
    scores, _ = collect(job, {}, answered(job))
    assert scores.kinds == ["single"]
    assert plot_steps(scores).startswith(b"\x89PNG")


def test_an_encoder_that_is_another_by_now_is_the_users_to_mend(recipe, tmp_path):
    folder = shutil.copytree(recipe.root, tmp_path / "root")
    moved = recipe.model_copy(update={"root": str(folder)})
    build_tiny_text_encoders(["another vocabulary"], moved.t5_uri, moved.clip_uri, WIDTH, seed=1)
    entry = Entry(name="t", source="teacher", steps=1, model=moved.product("teacher"))
    job = a_job(entries=(entry,))
    with pytest.raises(UserError, match="put the old one back"):
        ScorePictures(job, threads=1, device="cpu")(job.rows()[0])


def test_what_a_model_cannot_draw_is_the_users_to_mend(recipe):
    model = recipe.product("teacher")
    job = a_job(entries=(Entry(name="t", source="teacher", steps=1001, model=model),))
    with pytest.raises(UserError, match="steps is 1001"):
        ScorePictures(job, threads=1, device="cpu")(job.rows()[0])


def test_without_a_teacher_it_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="ldm train"):
        evaluate(tiny_recipe(tmp_path), Options())


SCENES = tuple((scene.caption,) for scene in evaluation_scenes("double", 4, 0))


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_of_other_pictures_is_refused_before_anything_is_drawn(recipe, tmp_path, dry_run):
    mine = recipe.model_copy(update={"root": str(tmp_path)})
    version = small_store(tmp_path / "latents", captions=(*SCENES, ("a dog", "a pet")), parts=1)
    save_tiny_models(mine, version.manifest.content)
    before = sorted(tmp_path.rglob("*"))
    named = r"such as 004\.png \('a dog'\), 004\.png \('a pet'\), 009\.png .*ldm sample"
    with pytest.raises(UserError, match=named):
        evaluate(mine, Options(dry_run=dry_run))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_counts_is_the_version_the_model_was_trained_on(recipe, tmp_path, capsys):
    mine = recipe.model_copy(update={"root": str(tmp_path)})
    shapes = small_store(tmp_path / "latents", captions=SCENES)
    assert made_of_shapes(mine)
    save_tiny_models(mine, shapes.manifest.content)
    add_sample(shapes.store, "dog.png", "a dog")
    assert not made_of_shapes(mine)
    evaluate(mine, Options(dry_run=True))
    assert capsys.readouterr().out == "evaluate: would run\n"


# The whole stage


@pytest.mark.ray
def test_counts_add_up_for_every_entry(scores: Scores):
    names = [entry.name for entry in scores.entries]
    assert names == ["teacher-3", "student-1", "student-2", "real", "reconstructed"]
    assert len(scores.rows) == len(names) * sum(map(len, ATTRIBUTES.values()))
    trials = {"single": SINGLE, "double": DOUBLE}
    assert all(row.trials == trials[row.kind] for row in scores.rows)
    assert all(0 <= row.successes <= row.trials for row in scores.rows)


@pytest.mark.ray
def test_real_pictures_are_the_ceiling_and_random_weights_know_nothing(scores: Scores):
    for row in scores.rows:
        if row.entry in ("real", "reconstructed"):  # the identity loses nothing
            assert row.rate >= 0.99, row
    both = scores.find("teacher-3", "double", "both")
    assert both is not None
    assert both.rate == 0
    assert scores.chance["single"]["color"] == 1 / 8


@pytest.mark.ray
def test_sheets_and_plot_lie_beside_the_scores(recipe: Recipe, scores: Scores):
    folder = Path(recipe.product("evaluation"))
    for entry in scores.entries:
        sheet = Image.open(folder / f"samples-{entry.name}.png")
        assert sheet.size == (COLUMNS * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)
    assert Image.open(folder / "steps.png").width > 500
    one, two = (np.asarray(Image.open(folder / f"samples-student-{n}.png")) for n in (1, 2))
    assert (one != two).any()


@pytest.mark.ray
def test_the_run_has_scores_over_steps_and_both_parents(recipe: Recipe, record: Record):
    run = Run(record.tracking_uri, record.run_id)
    history = run.client.get_metric_history(run.id, "student/single/color")
    assert [point.step for point in history] == [1, 2]
    tags = run.client.get_run(run.id).data.tags
    assert (tags["parent.teacher"], tags["parent.student"]) == ("teacher-run", "student-run")
    assert tags["input.student"] == record.inputs["student"]
    assert 0 <= record.summary["student-2/double/both"] <= 1


@pytest.mark.ray
def test_the_second_time_nothing_is_drawn(recipe: Recipe, record: Record, monkeypatch):
    monkeypatch.setattr(ray_runtime, "start", lambda verbose: pytest.fail("Ray was started"))
    assert evaluate(recipe, Options()) == record
