"""How the workers of a run are arranged: copies of the network, its shards, a sample's tokens."""

from dataclasses import dataclass

from ldm_core.errors import UserError


@dataclass(frozen=True)
class Layout:
    """`replicate` x `shard` x `context` workers; the rank counts the context fastest.

    Attributes:
        replicate: groups of workers, each of which holds the whole network.
        shard: workers that deal out a copy's parameters, and are given different samples.
        context: workers that deal out a sample's tokens. With `shard` above 1 they hold shards of
            the parameters too: a copy is dealt out to shard x context workers.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"layout.{name} is {getattr(self, name)}: it is to be at least 1")

    @classmethod
    def filling(cls, world: int, shard: int = 1, context: int = 1) -> "Layout":
        """As many copies as `world` workers make; what remains when some are lost.

        Raises:
            UserError: world is not a multiple of shard x context.
        """
        if world % (shard * context):
            raise UserError(
                f"{world} workers are not a multiple of shard {shard} x context {context}: start "
                f"{(world // (shard * context) + 1) * shard * context}, or shard less"
            )
        return cls(world // (shard * context), shard, context)

    def __str__(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard} x context {self.context}"

    @property
    def world(self) -> int:
        """Workers in all."""
        return self.replicate * self.shard * self.context

    @property
    def holders(self) -> int:
        """Workers that deal out one copy of the parameters; 1 means that each has them all."""
        return self.shard * self.context if self.shard > 1 else 1

    @property
    def data_world(self) -> int:
        """Workers, or groups of `context` of them, that are given different samples."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which of `data_world` shares of the samples worker `rank` is given."""
        return rank // self.context

    def check(self, world: int, heads: int | None = None, rows: int | None = None) -> None:
        """Refuse a layout that cannot be; also where no worker runs yet.

        Args:
            world: workers there are.
            heads: of attention.
            rows: the fewest that a block's matrix has.

        Raises:
            UserError: another number of workers, heads that do not divide, more shards than rows.
        """
        if world != self.world:
            raise UserError(
                f"layout {self} is {self.world} workers, but there are {world}: change one of them"
            )
        if heads is not None and heads % self.context:
            raise UserError(
                f"{heads} heads do not divide among layout.context {self.context}: choose a "
                f"divisor of {heads}"
            )
        if rows is not None and self.holders > rows:
            raise UserError(
                f"layout {self} deals parameters out to {self.holders} workers, but the smallest "
                f"matrix of a block has {rows} rows: shard less and replicate more"
            )
