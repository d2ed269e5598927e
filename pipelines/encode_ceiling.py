"""Where a run stops because its data are broken: so many rejects that the set itself must be."""

from collections.abc import Iterable, Iterator

from ldm_core.errors import UserError
from pipelines.encode_media import Row
from pipelines.encode_results import parts_of

FIRST = 1000  # rows from which on their rejects are a sign of what is to come


class BrokenData(UserError):
    """More rejects than a recipe bears; what is known of them is in the table."""


class Ceiling:
    """How many rejects there may be: among all rows of media, and among those made so far.

    One for a run, whatever its rounds: files come in the order of their names, so that a broken
    folder lies together, and what went well before it counts as well.

    Attributes:
        rejects: all there are.
    """

    def __init__(self, share: float, samples: int, rejects: int) -> None:
        """Args:
        share: of the rows, kept and to come.
        samples: that stay of an earlier run.
        rejects: that stay; they tell nothing of the rows to come.
        """
        self.share, self.rejects = share, rejects
        self._done, self._bad = samples, 0

    def broken_by(self, files: int, rejects: int) -> BrokenData | None:
        """What to say of so many more files and rejects among them, if that is too much."""
        done, bad = self._done + files, self._bad + rejects
        if done >= FIRST and bad > self.share * done:
            return _broken(self.share, bad, f"the first {done} rows")
        return None

    def add(self, files: int, rejects: int) -> None:
        """Count files that were looked into and are not counted as rows later."""
        self._done, self._bad = self._done + files, self._bad + rejects

    def over(self, rows: int, made: Iterable[Row], refused: Iterable[Row] = ()) -> Iterator[Row]:
        """The results; each is yielded, so that it can be committed, before it is counted.

        Args:
            rows: of samples and rejects, kept and to come.
            made: by workers.
            refused: what was known to be rejects before; they come first and tell nothing of the
                others.

        Raises:
            BrokenData: there are too many, at the first already or by then.
        """
        self._check(rows)
        for result in refused:
            yield result
            self.rejects += _count(result, "rejects")
            self._check(rows)
        for result in made:
            yield result
            bad = _count(result, "rejects")
            self.rejects += bad
            self.add(bad + _count(result, "samples"), bad)
            self._check(rows)
            if error := self.broken_by(0, 0):
                raise error

    def _check(self, rows: int) -> None:
        if self.rejects > self.share * rows:
            raise _broken(self.share, self.rejects, f"{rows} rows")


def _broken(share: float, rejects: int, among: str) -> BrokenData:
    return BrokenData(
        f"{rejects} rejects among {among} are more than encode.max_reject_share {share:g}: the "
        "data itself seems broken. Mend it, try them again with --retry-rejects, or raise the share"
    )


def _count(result: Row, table: str) -> int:
    return sum(part.rows for part in parts_of(result) if part.table == table)
