"""The README's table of methods names files, symbols and tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "README.md").read_text().split("| Method |")[1].splitlines()[2:]
    if line.startswith("|")
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_row_is_true_about_names(row):
    _, symbols, file, _, test, _ = row
    folder = ROOT / "ldm_core"
    defined = set(re.findall(r"^(?:def|class) (\w+)", (folder / file.strip("`")).read_text(), re.M))
    named = re.findall(r"`(\w+)`", symbols)
    assert named
    assert defined & set(named), f"{file} defines none of {named}"
    everywhere = set()
    for path in folder.rglob("*.py"):
        everywhere |= set(re.findall(r"^(?:def|class) (\w+)", path.read_text(), re.M))
    assert set(named) <= everywhere
    assert (ROOT / "tests" / test.strip("`")).exists()


def test_every_sampler_and_loss_is_in_the_table():
    text = (ROOT / "README.md").read_text()
    missing = [
        name
        for folder in ("samplers", "objectives", "distillation")
        for path in (ROOT / "ldm_core" / folder).glob("*.py")
        for name in re.findall(r"^def (sample_\w+|\w+_loss)", path.read_text(), re.M)
        if f"`{name}`" not in text
    ]
    assert missing == []
