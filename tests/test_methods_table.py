"""The README's table names files, symbols and tests that are there, and it names every method."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "ldm_core"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "README.md").read_text().split("| Method |")[1].splitlines()[2:]
    if line.startswith("|")
]
GUIDANCE_HELPERS = {"estimate", "scale_at", "sum_over_sample", "check_interval"}
CONDITIONING_HELPERS = {
    "Extra", "TextCondition", "Widened", "check_takes_captions", "check_mask", "renoise",
    "solve_poisson", "gaussian_blur", "sobel", "thin", "hysteresis",
}  # fmt: skip
"""What methods are written with."""


def names_in(cell):
    return set(re.findall(r"`(\w+)`", cell))


def files_in(cell, root):
    return [root / name for name in re.findall(r"`([\w./]+\.py)`", cell)]


@cache
def defined_in(file):
    """Classes and functions at the top level of a module."""
    body = ast.parse(file.read_text()).body
    return [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]


def defined_below(*folders):
    return [
        node
        for folder in folders
        for file in (CORE / folder).rglob("*.py")
        for node in defined_in(file)
    ]


def functions(pattern, *folders):
    found = [node.name for node in defined_below(*folders) if isinstance(node, ast.FunctionDef)]
    return {name for name in found if re.fullmatch(pattern, name)}


def is_protocol(node):
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def classes(folder, method="", arguments=()):
    """No protocols; with a method, those that define it with arguments beginning like these."""

    def has(node):
        return any(
            isinstance(inner, ast.FunctionDef)
            and inner.name == method
            and tuple(a.arg for a in inner.args.args[1:])[: len(arguments)] == arguments
            for inner in node.body
        )

    found = [node for node in defined_below(folder) if isinstance(node, ast.ClassDef)]
    found = [node for node in found if not is_protocol(node) and not node.name.startswith("_")]
    return {node.name for node in found if not method or has(node)}


METHODS = {
    "sample_ddim": functions(r"sample_\w+", "samplers", "conditioning"),
    "flow_matching_loss": functions(r"\w+_loss", "."),
    "ClassifierFreeGuidance": classes("guidance"),
    "log_sigma_interval": functions(r"[a-z]\w+", "guidance") - GUIDANCE_HELPERS,
    "FlowProcess": classes("diffusion", "time_of"),
    "ClassEmbedding": classes("conditioning") - CONDITIONING_HELPERS,
    "drop_captions": functions(r"[a-z]\w+", "conditioning") - CONDITIONING_HELPERS,
    "DiT": classes("backbones", "forward", ("x_t", "t")),  # networks, not the layers of them
}
"""Every method of a kind, by one of them."""


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_row_is_true_about_names(row):
    _, symbols, file, _, test, _ = row
    named = names_in(symbols)
    assert named
    defined = {node.name for path in files_in(file, CORE) for node in defined_in(path)}
    assert not named - defined, f"{file} does not define {named - defined}"
    proof = "\n".join(path.read_text() for path in files_in(test, ROOT / "tests"))
    unproved = named - set(re.findall(r"\w+", proof))
    assert not unproved, f"{test} does not name {unproved}"


@pytest.mark.parametrize("one", METHODS)
def test_every_method_is_in_the_table(one):
    assert one in METHODS[one]
    missing = METHODS[one] - set().union(*(names_in(row[1]) for row in ROWS))
    assert not missing, f"the table does not name {sorted(missing)}"


def test_the_helpers_that_are_left_out_are_there():
    assert functions(r"[a-z]\w+", "guidance") > GUIDANCE_HELPERS
    assert functions(r"[a-z]\w+", "conditioning") | classes("conditioning") > CONDITIONING_HELPERS
