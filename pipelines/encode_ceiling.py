"""Where a run stops because its data are broken: so many rejects that the set itself must be."""

from collections.abc import Iterable, Iterator

from ldm_core.errors import UserError
from pipelines.encode_media import Row
from pipelines.encode_workers import parts_of

FIRST = 1000  # rows made from which on their rejects are a sign of what is to come


class Ceiling:
    """How many rejects there may be: among all rows of media, and among those made so far.

    Args:
        share: of the rows, kept and to come.
        rows: of samples and rejects.
        rejects: that an earlier run has left and that stay.
    """

    def __init__(self, share: float, rows: int, rejects: int) -> None:
        self.share, self.rows, self.rejects = share, rows, rejects

    def over(self, made: Iterable[Row], refused: Iterable[Row] = ()) -> Iterator[Row]:
        """The results; each is yielded, so that it can be committed, before it is counted.

        Args:
            made: by workers.
            refused: what was known to be rejects before; they come first and tell nothing of the
                others.

        Raises:
            UserError: there are too many, at the first already or by then.
        """
        self._check()
        for result in refused:
            yield result
            self.rejects += _count(result, "rejects")
            self._check()
        done = rejects = 0
        for result in made:
            yield result
            found = _count(result, "rejects")
            done, rejects = done + found + _count(result, "samples"), rejects + found
            self.rejects += found
            self._check()
            if too_many(self.share, done, rejects):
                raise broken(self.share, rejects, f"the first {done} rows")

    def _check(self) -> None:
        if self.rejects > self.share * self.rows:
            raise broken(self.share, self.rejects, f"{self.rows} rows")


def too_many(share: float, done: int, rejects: int) -> bool:
    """Whether what is done so far is broken throughout: `FIRST` rows at least tell."""
    return done >= FIRST and rejects > share * done


def broken(share: float, rejects: int, among: str) -> UserError:
    """What the user is told."""
    return UserError(
        f"{rejects} rejects among {among} are more than encode.max_reject_share {share:g}: the "
        "data itself seems broken. The table rejects in the store says why of each; mend the "
        "data, try them again with --retry-rejects, or raise the share"
    )


def _count(result: Row, table: str) -> int:
    return sum(part.rows for part in parts_of(result) if part.table == table)
