"""What a recipe learns in some minutes on two cores, and what each of its choices is worth.

    ldm shapes demo/learning/data --count 20000
    ldm autoencoder image-s --data demo/learning/data --root demo/learning
    ldm encode image-s --data demo/learning/data --root demo/learning
    make bench-learning                     # and again with ARGS="--minutes 20"

One process trains the recipe on the store with one thing changed at a time, each variant from the
same weights, on the same samples and noise, for as long by the clock; drawing and judging pictures
do not count. Schedules follow the clock, too. On a machine that others use, `--steps 1900` gives
all of them the recipe's steps, and `default` is what `ldm train` makes.
  default          the recipe: Muon, logit-normal times, QK-norm, velocity, not compiled
  adamw            AdamW in Muon's place, at its rate; adamw-slower: at 2e-3
  uniform          times spread evenly; uniform-shifted: and then shifted as the recipe's are
  no-qk-norm       queries and keys as they are
  x0               the network predicts x0, with the errors of velocity; x0-unweighted: of x0
  compile          blocks compiled; compiling counts

The captions and seeds are the first of `ldm evaluate`, drawn with the recipe's steps and guidance
and read back by its verifier; of the default by every average unless `--averages own` says not to,
of the others by the recipe's own: judging all takes most of the minutes that training does. Errors
are standard errors, of Wilson's interval: of these pictures, not of other seeds of training (`--set
seed=1`). A finished variant is in --out at once; the same command goes on with the others.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning_runs import RAW, VARIANTS, Budget, average_name, train
from learning_scores import Counts, Judge

from ldm_core.errors import UserError
from ldm_core.evaluation.statistics import wilson_interval
from ldm_core.files import write_bytes
from ldm_core.latents.store import LatentStore
from pipelines.provenance import code, machine
from pipelines.quiet import VARIABLES
from pipelines.ray_runtime import worker_environment
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe
from pipelines.training_data import TrainingData, find_data

USUAL = ("default", "adamw", "uniform", "no-qk-norm", "x0", "compile")
SHOWN = {"colour": "single/color", "shape": "single/shape", "both": "double/both"}

Row = dict[str, Any]


def settings(args: argparse.Namespace, recipe: Recipe, data: TrainingData) -> Row:
    """What rows of one table share, but for the variant and the budget."""
    decides = [recipe.train.deciding(), recipe.seed, recipe.precision, recipe.evaluate.seed]
    text = json.dumps([*decides, data.version.manifest.content], sort_keys=True)
    return {
        "recipe": recipe.name, "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
        "samples": data.version.manifest.counts["samples"], "threads": args.threads,
        "pictures": args.pictures, "pairs": args.pairs, "seed": recipe.seed,
    }  # fmt: skip


def measure(args: argparse.Namespace, recipe: Recipe) -> list[Row]:
    """Train and judge what --out lacks; returns the rows of these settings, of all budgets."""
    data = find_data(recipe, LatentStore(recipe.product("latents")).open_version())
    judge = Judge(recipe, data, {"single": args.pictures, "double": args.pairs})
    budget, shared = Budget(args.minutes, args.steps), settings(args, recipe, data)
    for name in args.variants:
        rows = read_rows(args.out)
        asked = {**shared, "variant": name, "budget": str(budget)}
        if any(asked.items() <= row.items() for row in rows):
            continue
        print(f"{name}, {budget}:", flush=True)
        every = name == "default" and args.averages == "all"
        done = measured(judge, recipe, data, name, budget, every)
        rows.append(asked | {"code": code(), "machine": machine()} | done)
        write_bytes(str(args.out), (json.dumps(rows, indent=1) + "\n").encode())
    found = [row for row in read_rows(args.out) if shared.items() <= row.items()]
    return sorted(found, key=lambda row: (row["budget"], [*VARIANTS].index(row["variant"])))


def measured(
    judge: Judge, recipe: Recipe, data: TrainingData, name: str, budget: Budget, every: bool
) -> dict[str, Any]:
    """The figures of one variant; one that diverges has none but that."""
    variant = VARIANTS[name]
    try:
        trained = train(recipe, data, variant, budget)
    except UserError as error:
        return {"failed": str(error)}
    model = average_name(recipe.train.ema_decay)
    judged = trained.weights if every else [model]
    return {
        "steps": len(trained.seconds), "seconds": float(trained.seconds.sum()),
        "ms_a_step": 1e3 * float(np.median(trained.seconds)),
        "first_step_s": float(trained.seconds[0]), "skipped": trained.skipped,
        "model": model,
        "scores": judge.scores(trained, variant.prediction, judged),
    }  # fmt: skip


def read_rows(out: Path) -> list[Row]:
    return json.loads(out.read_text()) if out.exists() else []


def rate_and_error(count: tuple[int, int]) -> tuple[float, float]:
    """In percent; the error is half of Wilson's interval of one standard deviation, which is not 0
    where all are right."""
    low, high = wilson_interval(*count, z=1.0)
    return 100 * count[0] / count[1], 50 * (high - low)


def told(counts: Counts, key: str) -> str:
    return "{:.1f} ± {:.1f}".format(*rate_and_error(counts[key])) if key in counts else "-"


def against(counts: Counts, default: Counts) -> str:
    """Points more or less than the default, and who won where that is above two errors."""
    parts, won = [], []
    for name, key in SHOWN.items():
        if key in counts:
            (mine, error), (theirs, other) = (rate_and_error(c[key]) for c in (counts, default))
            both = float(np.hypot(error, other))
            parts.append(f"{name} {mine - theirs:+.1f} ± {both:.1f}")
            won += [mine > theirs] if abs(mine - theirs) > 2 * both else []
    verdict = {(): "even", (True,): "variant wins", (False,): "default wins"}
    return f"{', '.join(parts)}: {verdict.get(tuple(sorted(set(won))), 'either wins')}"


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def variants_table(rows: list[Row]) -> Iterator[str]:
    """Each variant by the average that is the recipe's model."""
    head = ("variant", "trained", "steps", "ms a step", *SHOWN, "against default")
    yield from (line(*head), line(*("---" for _ in head)))
    defaults = {row["budget"]: row for row in rows if row["variant"] == "default"}
    for row in rows:
        if "failed" in row:
            yield line(row["variant"], row["budget"], *["-"] * (2 + len(SHOWN)), "diverged")
            continue
        counts, base = row["scores"][row["model"]], defaults.get(row["budget"], {})
        compared = row["variant"] != "default" and "scores" in base
        verdict = against(counts, base["scores"][base["model"]]) if compared else ""
        cells = [told(counts, key) for key in SHOWN.values()]
        figures = (row["steps"], f"{row['ms_a_step']:.0f}")
        yield line(row["variant"], row["budget"], *figures, *cells, verdict)


def averages_table(rows: list[Row]) -> Iterator[str]:
    """Every average that was judged, where there are several: shape / both."""
    rows = [row for row in rows if len(row.get("scores", ())) > 1]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    if not rows:
        return
    yield from ("", "shape / both by average:", "")
    head = ("variant", "trained", *(n if n == RAW else f"EMA {n}" for n in names))
    yield from (line(*head), line(*("---" for _ in head)))
    for row in rows:
        keys = (SHOWN["shape"], SHOWN["both"])
        counts = [row["scores"].get(name, {}) for name in names]
        cells = [" / ".join(told(each, key) for key in keys) for each in counts]
        yield line(row["variant"], row["budget"], *cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="image-s")
    parser.add_argument(
        "--root", default="demo/learning", help="with latents, autoencoder and text"
    )
    parser.add_argument("--set", action="append", default=[], help="as ldm's, e.g. seed=1")
    parser.add_argument("--minutes", type=float, help="of training a variant; 10 if not given")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--variants", nargs="+", default=USUAL, choices=VARIANTS)
    parser.add_argument("--averages", default="all", choices=("all", "own"), help="of the default")
    parser.add_argument("--pictures", type=int, default=512, help="of one object")
    parser.add_argument("--pairs", type=int, default=256, help="pictures of two objects")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("demo/learning.json"))
    args = parser.parse_args()
    if args.minutes and args.steps:
        parser.error("give --minutes or --steps")
    args.minutes = args.minutes or (None if args.steps else 10.0)
    return args


def as_a_worker() -> None:
    """Begin again, quietly, with the memory settings of `ldm train`'s workers, read at the start.

    What an earlier run compiled is not used: compiling is to take what it takes.
    """
    wanted = {k: v for k, v in worker_environment().items() if k.startswith("MALLOC_")}
    wanted |= VARIABLES | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


def main() -> None:
    """Measure and print."""
    args = arguments()
    as_a_worker()
    torch.set_num_threads(args.threads)
    recipe = Arguments(args.recipe, root=args.root, overrides=tuple(args.set)).resolve().located()
    rows = measure(args, recipe)
    print(f"\n{recipe.name}, {machine()}, {args.threads} threads, % right of {args.pictures}")
    print(f"pictures of one object and {args.pairs} of two, ± standard error:\n")
    print("\n".join([*variants_table(rows), *averages_table(rows)]))


if __name__ == "__main__":
    main()
