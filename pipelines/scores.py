"""Verdicts to scores: how often an attribute was right, how sure that is, what guessing gives."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ldm_core.evaluation.statistics import chance_levels, wilson_interval
from ldm_core.evaluation.verifier import Verdict

Kind = Literal["single", "double"]
KINDS: tuple[Kind, ...] = ("single", "double")
ATTRIBUTES: dict[Kind, tuple[str, ...]] = {
    "single": ("color", "shape", "position", "size", "background", "count"),
    "double": ("both", "color", "shape", "position", "size", "background", "count"),
}


class Entry(BaseModel):
    """One source of pictures that is scored.

    Attributes:
        name: "teacher-32", "student-4", "real", "reconstructed".
        source: who draws them; "real" and "reconstructed" are the ceiling.
        steps: sampling steps of a model, 0 for the ceiling.
        model: URI of the model directory, empty for the ceiling.
        guidance: the model's default scale, which its pictures are drawn with.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    source: Literal["teacher", "student", "real", "reconstructed"]
    steps: int = 0
    model: str = ""
    guidance: float | None = None


class Score(BaseModel):
    """How often one attribute of one kind of scene was right, with its 95 % Wilson interval."""

    entry: str
    kind: Kind
    attribute: str
    successes: int
    trials: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """The share that was right."""
        return self.successes / self.trials


class Scores(BaseModel):
    """What `scores.json` holds.

    Attributes:
        models: digest by kind of model.
        size: side of the pictures, pixels.
        entries: in the order they are shown.
        rows: one per entry, kind and attribute.
        chance: level by kind and attribute of drawing good scenes without reading the caption.
        shown: captions of the pictures in the `samples-*.png`, kind after kind.
        shown_right: by entry, which of those pictures are right in every attribute.
        seconds_per_picture: of drawing in batches on one worker, by entry.
    """

    models: dict[str, str]
    size: int
    entries: list[Entry]
    rows: list[Score]
    chance: dict[Kind, dict[str, float]]
    shown: dict[Kind, list[str]]
    shown_right: dict[str, list[bool]]
    seconds_per_picture: dict[str, float]

    def find(self, entry: str, kind: Kind, attribute: str) -> Score | None:
        """The row, or None where no such scenes were drawn."""
        wanted = (entry, kind, attribute)
        return next((r for r in self.rows if (r.entry, r.kind, r.attribute) == wanted), None)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of scene that were drawn."""
        return [kind for kind in KINDS if kind in self.chance]


def score(entry: str, kind: Kind, verdicts: Sequence[Verdict]) -> list[Score]:
    """Count the verdicts on an entry's pictures of one kind, attribute by attribute."""
    rows = []
    for attribute in ATTRIBUTES[kind]:
        successes = sum(bool(getattr(verdict, attribute)) for verdict in verdicts)
        low, high = wilson_interval(successes, len(verdicts))
        rows.append(
            Score(
                entry=entry,
                kind=kind,
                attribute=attribute,
                successes=successes,
                trials=len(verdicts),
                low=low,
                high=high,
            )
        )
    return rows


def chance_of(kinds: Sequence[Kind]) -> dict[Kind, dict[str, float]]:
    """Chance level of every attribute that is scored."""
    return {kind: {name: chance_levels(kind)[name] for name in ATTRIBUTES[kind]} for kind in kinds}
