"""The rules of the rows of `samples` and `rejects` together: each id once, each file whole."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ldm_core.latents.tally import Check, Row, Tally

_FIELDS = {"id": pa.string(), "source_id": pa.string(), "part": pa.int32(), "parts": pa.int32()}
COLUMNS = tuple(_FIELDS)


class Identities:
    """What is kept of each row is its id, its file's and its place there."""

    def __init__(self) -> None:
        self._schema = pa.schema(list(_FIELDS.items()))
        self._kept: list[pa.RecordBatch] = []
        self._rejected: set[str] = set()

    def take(self, table: str, rows: Sequence[Row]) -> None:
        """Keep the names of some rows of "samples" or "rejects"."""
        some = [{name: row[name] for name in COLUMNS} for row in rows]
        self._kept.append(pa.RecordBatch.from_pylist(some, schema=self._schema))
        if table == "rejects":
            self._rejected.update(row["id"] for row in rows)

    def checks(self) -> list[Check]:
        """Whether an id is in one row only, and a file's parts are all there, in either table."""
        rows = pa.Table.from_batches(self._kept, schema=self._schema)
        ids = Tally("an id has one row, in samples or in rejects")
        for each in pc.value_counts(rows["id"]):
            id, count = each["values"].as_py(), each["counts"].as_py()
            where = "samples and rejects" if id in self._rejected else "samples"
            ids.ask(id, f"{count} rows in {where}" if count > 1 else "")
        files = Tally("a file's parts are all there, in samples or in rejects")
        for source, problem in _part_problems(rows):
            files.ask(source, problem)
        return [ids.check(), files.check()]


def _part_problems(rows: pa.Table) -> Iterator[tuple[str, str]]:
    """Of each file: parts 0 to n - 1, each in a row that says of how many."""
    wanted: list[tuple] = [("part", f) for f in ("count_distinct", "min", "max")]
    wanted += [("part", "count", pc.CountOptions(mode="all")), ("parts", "min"), ("parts", "max")]
    files = rows.group_by("source_id").aggregate(wanted)
    for batch in files.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            count, least, most = row["part_count"], row["parts_min"], row["parts_max"]
            if least == most == count == row["part_count_distinct"] == (row["part_max"] or 0) + 1:
                yield row["source_id"], "" if row["part_min"] == 0 else "part below 0"
                continue
            said = f"{least}" if least == most else f"{least} to {most}"
            here = f"{row['part_count_distinct']} parts in {count} rows"
            yield row["source_id"], f"{here}, up to part {row['part_max']}; they say {said}"
