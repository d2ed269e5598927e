"""What a stage says of earlier work on the same product."""

import pytest

from ldm_core.files import join, write_bytes
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
