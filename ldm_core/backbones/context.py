"""Tokens dealt out over workers, all of which attend to all of them.

Ulysses (Jacobs et al. 2023, Sec. 3.1): between two exchanges a worker has all tokens and its share
of the heads instead of its share of the tokens and all heads. Everything else in a transformer is
done token by token, or once on every worker.

The exchanges are differentiated as functions of what all workers hold. If each of them computes the
whole loss from gathered tokens, the gradients of `size` such losses add up over the group: their
mean over the group is that of one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ldm_core.errors import UserError


@dataclass(frozen=True)
class Context:
    """One worker's place among those that share a sample's tokens.

    Attributes:
        group: of these workers; None for one alone.
        rank: of this worker in it; it holds the rank-th of `size` equal runs of tokens.
        size: workers in the group.
    """

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    def share(self, x: Tensor, dim: int) -> Tensor:
        """This worker's part of what every worker holds, cut along `dim`.

        Raises:
            UserError: it does not divide.
        """
        if x.shape[dim] % self.size:
            raise UserError(
                f"{x.shape[dim]} tokens do not divide among {self.size} context workers: set "
                "layout.context to a divisor, or use buckets of another size"
            )
        return x.chunk(self.size, dim)[self.rank]

    def swap(self, x: Tensor, split: int, join: int) -> Tensor:
        """Give each worker its part along `split`, and get all workers' parts along `join`."""
        return self._exchange(x.chunk(self.size, split), join)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All workers' parts along `dim`, on every worker."""
        return self._exchange((x,) * self.size, dim)

    def _exchange(self, parts: tuple[Tensor, ...], join: int) -> Tensor:
        if self.group is None:
            return parts[0]
        got = all_to_all_single_autograd(torch.stack(parts), None, None, self.group)
        return torch.cat(got.unbind(0), join)

    def to_heads(self, x: Tensor, common: int) -> Tensor:
        """(B, common + N / size, H, K) -> (B, common + N, H / size, K).

        The first `common` tokens are those that every worker holds.
        """
        if self.group is None:
            return x
        shared, own = x[:, :common], x[:, common:]
        return torch.cat([self.share(shared, 2), self.swap(own, split=2, join=1)], dim=1)

    def to_tokens(self, x: Tensor, common: int) -> Tensor:
        """`to_heads` backwards: (B, common + N, H / size, K) -> (B, common + N / size, H, K)."""
        if self.group is None:
            return x
        shared, own = x[:, :common], x[:, common:]
        return torch.cat([self.whole(shared, 2), self.swap(own, split=1, join=2)], dim=1)

    def check_heads(self, heads: int) -> None:
        """Refuse heads that do not divide.

        Raises:
            UserError: they do not.
        """
        if heads % self.size:
            raise UserError(
                f"{heads} heads do not divide among {self.size} context workers: set "
                f"layout.context to a divisor of {heads}"
            )


ALONE = Context()
