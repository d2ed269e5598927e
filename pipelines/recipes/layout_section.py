"""How the workers of a training share its state and its samples."""

import math

from pydantic import Field

from pipelines.recipes.base import Section


class LayoutSection(Section):
    """How the workers are arranged: replicate x shard x context of them.

    Attributes:
        replicate: groups that hold the whole training state; None is as many as there are workers.
        shard: workers of a group that deal out its parameters and are given different samples.
        context: workers that deal out a sample's tokens.
    """

    replicate: int | None = Field(None, ge=1)
    shard: int = Field(1, ge=1)
    context: int = Field(1, ge=1)

    def replicas(self, workers: int) -> int:
        """How many groups the workers are.

        Raises:
            ValueError: they are not replicate x shard x context.
        """
        group = self.shard * self.context
        replicate = self.replicate or max(1, workers // group)
        if replicate * group != workers:
            raise ValueError(
                f"layout.replicate {replicate} x shard {self.shard} x context {self.context} are "
                f"{replicate * group} workers, but workers.count is {workers}: set workers.count="
                f"{replicate * group}, or another layout"
            )
        return replicate

    def context_of(self, workers: int) -> int:
        """Workers that deal out a sample's tokens where there are so many of them: fewer than
        `context` where that does not divide them.
        """
        return math.gcd(workers, self.context)
