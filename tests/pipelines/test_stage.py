"""What a stage says of earlier work on the same product."""

import pytest

from ldm_core.files import join, read_bytes, write_bytes
from ldm_core.latents.lock import LockHeld
from pipelines.recipe_options import Arguments
from pipelines.stage import Options, checkpoint_place, run_stage


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Arguments("image-tiny", root=str(tmp_path / "run")).resolve()


def killed(recipe, product: str, sections: dict[str, int]) -> str:
    """A stage that is killed after its first checkpoint; returns where that lies."""
    made = []

    def work(context):
        place = checkpoint_place(recipe, product, context.digest)
        write_bytes(join(*place, "step-000000001", "manifest.json"), b"{}")
        made.append(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(recipe, "train", product, sections, {}, work, Options())
    return made[0][1]


def test_checkpoints_of_other_settings_are_told_of(recipe, capsys):
    product = recipe.product("teacher")
    first = killed(recipe, product, {"parts": 8})
    assert "begins anew" not in capsys.readouterr().out
    second = killed(recipe, product, {"parts": 4})
    told = capsys.readouterr().out
    assert "[train] begins anew" in told
    assert first in told
    killed(recipe, product, {"parts": 4})  # goes on with its own
    assert "begins anew" not in capsys.readouterr().out
    killed(recipe, recipe.product("teacher-2"), {"parts": 4})  # another product's are no news
    assert "begins anew" not in capsys.readouterr().out
    killed(recipe, product, {"parts": 2})
    assert f"({', '.join(sorted([first, second]))})" in capsys.readouterr().out


def test_a_second_command_for_the_same_product_is_refused(recipe):
    """It would take away the first one's checkpoints, which this one's work has."""
    product = recipe.product("teacher")

    def work(context) -> dict[str, str]:
        place = join(*checkpoint_place(recipe, product, context.digest), "half")
        write_bytes(place, b"")
        for force in (False, True):
            with pytest.raises(LockHeld, match=r"run/.running/teacher is being written"):
                run_stage(recipe, "train", product, {}, {}, pytest.fail, Options(force=force))
        other = recipe.product("student")
        run_stage(recipe, "distill", other, {}, {}, lambda _: {}, Options())
        return {"left": read_bytes(place).decode()}

    assert run_stage(recipe, "train", product, {}, {}, work, Options()).summary == {"left": ""}
