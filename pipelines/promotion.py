"""Which of the trained models is the champion: the version that `models:/NAME@champion` gives.

Losses compare where they were measured on the same rows of the same store content, with the same
noise and normalisation. A version's tags hold its own, so that the next one needs nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isnan
from typing import Any, Literal

from ldm_core.files import absolute, exists, join, local_copy, upload_folder
from pipelines.credentials import masked
from pipelines.model_registry import named_version, register_model
from pipelines.stage import forget_record
from pipelines.tracking import Run
from pipelines.train_inputs import initial_model

CHAMPION = "champion"
Rule = Literal["always", "better"]


@dataclass(frozen=True)
class Score:
    """A model's validation loss.

    Attributes:
        content: of the store version whose rows were held out.
        held_out: digest of these, their noise and normalisation.
    """

    loss: float
    content: str
    held_out: str

    def facts(self) -> dict[str, Any]:
        """As a training's summary tells it."""
        return {
            "final_validation_loss": self.loss,
            "validation_content": self.content,
            "held_out": self.held_out,
        }

    def tags(self) -> dict[str, str]:
        """As a version of the registry tells it; a number in all its digits."""
        return {name: str(value) for name, value in self.facts().items()}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Score | None":
        """What `facts` or `tags` tell; None if they tell of no validation."""
        if "final_validation_loss" not in facts:
            return None
        loss = float(facts["final_validation_loss"])
        return cls(loss, facts["validation_content"], facts["held_out"])


@dataclass(frozen=True)
class Champion:
    """The version under the alias."""

    version: str
    digest: str | None
    score: Score | None


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes the champion, and why."""

    promoted: bool
    reason: str

    def say(self, run: Run, name: str, version: str) -> None:
        """Tell the user, and what to do if it should be otherwise."""
        if self.promoted:
            print(f"[train] {name} version {version} is the champion: {self.reason}", flush=True)
            return
        client = f"mlflow.MlflowClient({masked(run.uri)!r})"
        print(
            f"[train] {name} version {version} does not become the champion: {self.reason}. "
            f'To do it by hand: python -c "import mlflow; {client}'
            f".set_registered_model_alias({name!r}, {CHAMPION!r}, '{version}')\"",
            flush=True,
        )


def decide(run: Run, name: str, rule: Rule, digest: str, score: Score | None) -> Decision:
    """Whether a model becomes the champion of its name, before it is registered.

    Args:
        run: whose registry it is.
        name: in the registry.
        rule: as `train.promote`.
        digest: of the model.
        score: its own; None if it was not validated.
    """
    if rule == "always":
        return Decision(True, "the newest is (train.promote always)")
    found = named_version(run, name, CHAMPION)
    if found is None:
        return Decision(True, "there was none")
    there = Champion(str(found.version), found.tags.get("digest"), Score.of(found.tags))
    return against(there, digest, score)


def against(there: Champion, digest: str, mine: Score | None) -> Decision:
    """Whether a model is better than the champion."""
    whose = f"version {there.version}, the champion,"
    if digest == there.digest:
        return Decision(True, f"{whose} is the same model")
    if mine is None:
        return Decision(False, "its validation loss is not known")
    if there.score is None:
        return Decision(False, f"{whose} tells no validation loss to compare with")
    for what in ("content", "held_out"):
        here, others = getattr(mine, what), getattr(there.score, what)
        if here != others:
            return Decision(
                False,
                f"the losses do not compare, as {_WORDS[what]} {here[:16]} here and {others[:16]} "
                f"of version {there.version}, the champion",
            )
    lower = _rank(mine.loss) < _rank(there.score.loss)
    losses = f"its validation loss is {mine.loss:.6g}, that of {whose}"
    return Decision(lower, f"{losses} {'was' if lower else 'is'} {there.score.loss:.6g}")


_WORDS = {
    "content": "the content of the store is",
    "held_out": "the digest of the held-out rows, their noise and normalisation is",
}


def _rank(loss: float) -> float:
    return inf if isnan(loss) else loss


def copy_beside(product: str, digest: str) -> str:
    """A copy of the model directory that no later training writes to; returns where it lies.

    Beside the product, as a model names its encoders by where they lie from there.
    """
    place = f"{product.rstrip('/')}-{digest}"
    with local_copy(product) as folder:
        upload_folder(folder, place)
    forget_record(place)  # a copy is no stage's product
    return place


def save_champion(run: Run, name: str, product: str) -> None:
    """Before the product is written again: a champion that lies there moves to a copy of its own.

    It is registered from there once more, as what it was.
    """
    found = named_version(run, name, CHAMPION)
    if found is None or found.source != absolute(product):
        return
    if not exists(join(product, "config.json")):
        return
    digest = initial_model(product).digest
    if digest != found.tags.get("digest"):
        return  # it has been overwritten, and the alias leads nowhere
    tags = {key: value for key, value in found.tags.items() if key != "digest"}
    place, of = copy_beside(product, digest), Run(run.uri, str(found.run_id))
    version = register_model(of, name, place, digest, CHAMPION, tags)
    print(f"[train] the champion of {name} is kept at {place}, as version {version}", flush=True)
