"""What a stage's settings are made of: frozen and validated."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Workers(Section):
    """How many Ray workers a stage gets, and what each of them holds."""

    count: int = Field(2, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)

    @property
    def threads(self) -> int:
        """Of each worker's torch."""
        return max(1, int(self.cpus))

    @property
    def device(self) -> str:
        """Where a worker computes: a GPU it was not given is somebody else's."""
        return "cuda" if self.gpus else "cpu"


class TrainingSection(Section):
    """What every stage that trains on Ray Train says.

    Attributes:
        batch_size: samples per optimiser step, over all workers.
        learning_rate: of AdamW; Muon's update is scaled to match its RMS.
        max_failures: worker failures Ray Train retries from the last checkpoint, of a whole command
            however long it runs; where machines come and go, allow for as many as may go.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    clip_norm: float = Field(1.0, gt=0)
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    max_failures: int = Field(3, ge=0)
    workers: Workers = Workers()

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result: not who computes it, nor what is told on the way."""
        telling = {"log_every", "sample_every", "checkpoint_every"}
        return self.model_dump(
            mode="json", exclude=telling | {"workers", "max_failures", "compile"}
        )

    @model_validator(mode="after")
    def _shares(self) -> "TrainingSection":
        """Every worker takes the same share of a batch: their gradients are averaged as equals."""
        count = self.workers.count
        if self.batch_size % count:
            near = math.ceil(self.batch_size / count) * count
            raise ValueError(
                f"batch_size {self.batch_size} does not divide among workers.count {count}: try "
                f"batch_size {near} or another workers.count"
            )
        return self
