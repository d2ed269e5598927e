"""The page on products made by hand: what is there is shown, what is missing is named."""

import re
import subprocess
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_evaluate import RIGHT, WRONG_COLOR

from ldm_core.files import exists, write_json
from ldm_core.generation import grid_image
from ldm_core.media.shapes import write_shapes
from pipelines.ask_endpoint import Answer
from pipelines.commands import command
from pipelines.provenance import code
from pipelines.recipe_options import Arguments
from pipelines.recipes import RECIPES
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection
from pipelines.report import write_report
from pipelines.report_pictures import cut_sheet, data_uri
from pipelines.scores import KINDS, Entry, Scores, chance_of, score
from pipelines.scores_plot import plot_steps
from pipelines.stage import Record

SIZE = 24
ENTRIES = (
    Entry(name="teacher-32", source="teacher", steps=32),
    Entry(name="student-1", source="student", steps=1),
    Entry(name="student-4", source="student", steps=4),
    Entry(name="real", source="real"),
)
CAPTION = "a <b>large</b> circle & a cross"


def a_recipe(root: Path) -> Recipe:
    changes = {"data": str(root / "data"), "root": str(root), "size": SIZE}
    identity = AutoencoderSection(source="identity")
    return RECIPES["image-s"]().model_copy(update={**changes, "autoencoder": identity})


def write_record(recipe: Recipe, stage: str, product: str, **summary) -> None:
    record = Record(
        stage=stage,
        digest="d" * 16,
        run_id=f"{stage}-run",
        tracking_uri="sqlite:////project/mlflow.db",
        product=recipe.product(product),
        inputs={},
        seconds=100.0,
        summary=summary,
    )
    write_json(recipe.product(f"{product}/record.json"), record.model_dump(mode="json"))


def write_evaluation(recipe: Recipe) -> None:
    verdicts = [RIGHT, WRONG_COLOR, RIGHT, RIGHT]
    scores = Scores(
        models={"teacher": "t", "student": "s"},
        size=SIZE,
        entries=list(ENTRIES),
        rows=[row for e in ENTRIES for kind in KINDS for row in score(e.name, kind, verdicts)],
        chance=chance_of(KINDS),
        shown={"single": ["one", "two"], "double": [CAPTION]},
        shown_right={entry.name: [True, False, True] for entry in ENTRIES},
        seconds_per_picture={entry.name: 0.125 for entry in ENTRIES},
    )
    folder = Path(recipe.product("evaluation"))
    write_record(recipe, "evaluate", "evaluation", **{"real/single/color": 0.75})
    (folder / "scores.json").write_text(scores.model_dump_json())
    (folder / "steps.png").write_bytes(plot_steps(scores))
    pictures = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    for entry in ENTRIES:
        Image.fromarray(grid_image(pictures, 8)).save(folder / f"samples-{entry.name}.png")


def write_models(recipe: Recipe) -> None:
    reference = {"uri": "../text", "digest": "e" * 16}
    for stage, kind in (("train", "teacher"), ("distill", "student")):
        summary = {"parameters": 5e6, "mean_samples_per_second": 321.4}
        write_record(recipe, stage, kind, digest=f"digest-of-{kind}", **summary)
        config = dict.fromkeys(("autoencoder", "t5", "clip"), reference)
        write_json(
            recipe.product(f"{kind}/config.json"), {**config, "lineage": {"run": f"run-of-{kind}"}}
        )


def write_answer(recipe: Recipe) -> None:
    answer = Answer(
        model="student",
        model_digest="digest-of-student",
        prompt="a large red circle",
        seed=7,
        steps=4,
        size="24x24",
        seconds=0.25,
        curl="curl -sf http://127.0.0.1:8000/v1/images/generations -d '{\"seed\": 7}'",
    )
    write_json(recipe.product("answer.json"), answer.model_dump())
    Image.new("RGB", (SIZE, SIZE)).save(recipe.product("answer.png"))


def write_products(recipe: Recipe) -> None:
    write_shapes(Path(recipe.data), 10, 32, 0)
    latents = {"version": 1, "samples": 10, "texts": 20, "rejects": 0, "images_per_second": 50.0}
    write_record(recipe, "encode", "latents", new_rows=10, **latents)
    write_models(recipe)
    write_evaluation(recipe)
    write_answer(recipe)


class Page(HTMLParser):
    """The words of a page, its pictures, and whatever it would load from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.elsewhere: list[str] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs) -> None:
        for name, value in attrs:
            if name == "src" and value.startswith("data:image/png;base64,"):
                self.pictures.append(value)
            elif name in ("src", "href"):
                self.elsewhere.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def report(recipe: Recipe) -> Page:
    return Page(Path(write_report(recipe)).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Recipe, Page]:
    recipe = a_recipe(tmp_path_factory.mktemp("whole"))
    write_products(recipe)
    return recipe, report(recipe)


def test_the_page_has_everything_and_loads_nothing(whole):
    recipe, page = whole
    assert page.elsewhere == []
    compared, sheets = 3 * len(ENTRIES), len(ENTRIES)
    assert len(page.pictures) == 8 + 8 + compared + sheets + 1 + 1  # data twice, plot, answer
    assert "not there yet" not in page.text
    for stage in ("encode", "train", "distill", "evaluate", "serve"):
        assert command(recipe, stage) in page.text
    for text in ("digest-of-student", "run-of-teacher", "train-run", "curl -sf", "0.25 s"):
        assert text in page.text, text
    assert "mlflow ui --backend-store-uri sqlite:////project/mlflow.db" in page.text
    assert "1 min 40 s" in page.text
    assert "All stages together took 6 min 40 s" in page.text  # four records of 100 s
    assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d UTC on \d+ cores .*, torch \d", page.text)
    assert "321 samples/s" in page.text


def test_scores_stand_with_interval_ceiling_and_chance(whole):
    _, page = whole
    assert re.search(r"teacher-32 75\.0 30–95 100\.0", page.text)
    assert "chance 12.5 25.0 20.0" in page.text
    sentence = "The student in 4 steps gets right: color 75 % (30 to 95), shape 100 %"
    assert sentence in page.text


def test_captions_are_text_not_markup(whole):
    _, page = whole
    assert CAPTION in page.text


def test_a_missing_stage_is_named_with_its_command(tmp_path):
    recipe = a_recipe(tmp_path)
    write_products(recipe)
    Path(recipe.product("evaluation/record.json")).unlink()
    page = report(recipe)
    assert "The evaluation is not there yet. This makes it: " + command(recipe, "evaluate") in (
        page.text
    )
    assert len(page.pictures) == 8 + 8 + 1


def test_before_anything_has_run_there_is_a_page_of_commands(tmp_path):
    recipe = a_recipe(tmp_path).model_copy(update={"autoencoder": AutoencoderSection()})
    page = report(recipe)
    assert page.pictures == []
    assert page.text.count("not there yet") == 5 + 4  # the table, then a line for each part
    assert f"ldm shapes {recipe.data}" in page.text


def test_the_code_is_named_by_its_commit_else_by_its_version(tmp_path):
    assert code(tmp_path) == version("latent-diffusion-on-ray")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert code(tmp_path) == head.stdout[:12]


def test_pictures_are_cut_out_of_a_sheet_as_they_were_laid(tmp_path):
    pictures = np.random.default_rng(1).integers(0, 256, (11, 7, 7, 3), dtype=np.uint8)
    found = cut_sheet(grid_image(pictures, 8), 7, 11)
    np.testing.assert_array_equal(np.stack(found), pictures)


def test_large_pictures_are_scaled_down():
    large = np.random.default_rng(2).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    assert len(data_uri(large)) < 160 * 160 * 3 * 4 / 3 * 1.1


def test_a_report_in_a_bucket(s3, tmp_path):
    recipe = a_recipe(tmp_path).model_copy(update={"root": f"{s3}/report-test"})
    uri = write_report(recipe)
    assert uri == f"{s3}/report-test/report.html"
    assert exists(uri)


@pytest.mark.parametrize("stage", ["encode", "serve"])
def test_a_command_names_the_recipe_it_was_made_from(stage):
    words = ("train.steps=7", "text.t5=/models/t5 xxl", "evaluate.student_steps=[1, 8]")
    recipe = Arguments("image-tiny", "data", None, words).resolve()
    line = command(recipe, stage)
    assert line.startswith(f"ldm {stage} image-tiny --data data --set")
    import shlex

    overrides = [word for word in shlex.split(line)[5:] if word != "--set"]
    assert Arguments("image-tiny", "data", None, tuple(overrides)).resolve() == recipe
