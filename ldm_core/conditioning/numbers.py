"""Conditions that are a few numbers: sizes and crops, noise levels, frame rates.

Each number becomes sines and cosines, all of them pass a small MLP, and the result is added to the
pooled caption (Podell et al. 2023, Sec. 2.2), which every backbone adds to its time embedding.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.conditioning.extra import check_takes_captions
from ldm_core.conditioning.text import TextCondition


class NumberConditioned(nn.Module):
    """A network told some numbers; at initialisation it does not listen."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        numbers: int,
        pooled_width: int,
        frequencies: tuple[float, float],
        pairs: int = 64,
    ) -> None:
        """Wrap a network.

        Args:
            network: takes pooled captions of `pooled_width`.
            name: of the condition, whose value is (B, numbers).
            numbers: how many.
            pooled_width: P.
            frequencies: lowest and highest, in radians per unit of the numbers.
            pairs: of sines and cosines for each number.

        Raises:
            UserError: the network takes labels, see `check_takes_captions`.
        """
        super().__init__()
        check_takes_captions(network, type(self).__name__)
        self.network, self.name, self.numbers = network, name, numbers
        self.frequencies, self.pairs = frequencies, pairs
        self.hidden = nn.Linear(2 * pairs * numbers, pooled_width)
        self.out = nn.Linear(pooled_width, pooled_width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t: Tensor, t: Tensor, cond: TextCondition, *times: Tensor) -> Tensor:
        """As the network, with the numbers in the pooled caption if `cond` has them.

        Raises:
            ValueError: the condition is not (B, numbers).
        """
        extra = cond.extras.get(self.name)
        if extra is None:
            return self.network(x_t, t, cond, *times)
        if extra.value.shape != (len(x_t), self.numbers):
            raise ValueError(
                f"condition {self.name!r} is {tuple(extra.value.shape)}, "
                f"expected {(len(x_t), self.numbers)}"
            )
        pooled = cond.pooled + extra.weigh(self.embed(extra.value, cond.pooled.dtype))
        return self.network(x_t, t, replace(cond, pooled=pooled), *times)

    def embed(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, K) -> (B, P); the waves are computed in float32 or wider."""
        numbers = numbers.to(torch.promote_types(dtype, torch.float32))
        low, high = (torch.tensor(edge).log2() for edge in self.frequencies)
        frequencies = torch.logspace(float(low), float(high), self.pairs, 2.0).to(numbers)
        angles = (numbers[..., None] * frequencies).flatten(1)  # (B, K * pairs)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.out(F.silu(self.hidden(waves)))
