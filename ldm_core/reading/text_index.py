"""Where each caption's embeddings are: 16 bytes for each caption and encoder."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm_core.errors import UserError
from ldm_core.latents.schema import TEXTS
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.cells import cells
from ldm_core.reading.groups import Groups, find_groups
from ldm_core.reading.row_groups import Place, TableFiles, as_schema
from ldm_core.reading.text_rows import TOKENS

COLUMNS = ("caption", "encoder", "tokens", "tokens_shape", "pooled", "pooled_size", "dtype")

_KEYS = ("caption_digest", "encoder", "tokens_shape", "pooled_size", "encoder_digest")
_HEX = 16  # digits of a 64-bit hash


@dataclass(frozen=True, eq=False)
class Rows:
    """An encoder's T rows.

    Attributes:
        hashes: (T,) uint64, ascending: the first half of each caption's digest.
        group: (T,) int32, the row group.
        row: (T,) int32, in the row group.
    """

    hashes: np.ndarray
    group: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, eq=False)
class TextIndex:
    """The rows of `texts` that a version's encoders made.

    Attributes:
        groups: of the table.
        encoders: rows by the encoder's name.
        mean_bytes: of one caption's embeddings that are read, decoded, by all encoders.
    """

    groups: Groups
    encoders: dict[str, Rows]
    mean_bytes: float

    def find(self, encoder: str, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row group and row of captions (n,) uint64.

        Raises:
            UserError: a caption that the encoder has not embedded.
        """
        rows = self.encoders[encoder]
        if not len(rows.hashes):
            raise UserError(f"{self.groups.uri} has no row of {encoder}: run `ldm encode` again")
        places = np.minimum(np.searchsorted(rows.hashes, hashes), len(rows.hashes) - 1)
        lacking = rows.hashes[places] != hashes
        if lacking.any():
            name = f"{int(hashes[lacking][0]):016x}"
            raise UserError(
                f"{self.groups.uri} has no embedding by {encoder} of the caption whose digest "
                f"begins with {name}, and of {int(lacking.sum()) - 1} others: `ldm store verify` "
                "says what else is missing, `ldm encode` adds it"
            )
        return rows.group[places], rows.row[places]


@dataclass(frozen=True)
class _Found:
    """The rows of an encoder in a row group."""

    hashes: np.ndarray
    row: np.ndarray
    bytes: int


def index_texts(version: StoreVersion) -> TextIndex:
    """Look at the small columns of a version's `texts`.

    Raises:
        UserError: two captions of an encoder have the same 64 bits.
    """
    digests = {entry.name: entry.digest for entry in version.manifest.texts}

    def look(files: TableFiles, place: Place, footer: pq.FileMetaData) -> dict[str, _Found]:
        table = as_schema(files.read(place, _KEYS), TEXTS)
        return {name: _of(table, name, digest) for name, digest in digests.items()}

    groups, found = find_groups(version, "texts", COLUMNS, look)
    encoders = {name: _joined([each[name] for each in found]) for name in digests}
    for name, rows in encoders.items():
        _refuse_twins(version, name, rows)
    total = sum(each[name].bytes for each in found for name in digests)
    count = max((len(rows.hashes) for rows in encoders.values()), default=0)
    return TextIndex(groups, encoders, total / max(count, 1))


def hash_of(digests: pa.Array) -> np.ndarray:
    """The first 64 bits of digests of 32 hex digits, (n,) uint64."""
    data, ends = cells(digests)
    assert (np.diff(ends) == 2 * _HEX).all(), "a caption digest is not of 32 hex digits"
    letters = data.reshape(-1, 2 * _HEX)[:, :_HEX].astype(np.uint64)
    values = letters - np.where(letters > ord("9"), ord("a") - 10, ord("0")).astype(np.uint64)
    result = np.zeros(len(values), np.uint64)
    for column in values.T:
        result = (result << np.uint64(4)) | column
    return result


def _of(table: pa.Table, name: str, digest: str) -> _Found:
    here = pc.and_(pc.equal(table["encoder"], name), pc.equal(table["encoder_digest"], digest))
    rows = np.flatnonzero(here.to_numpy())
    chosen = table.take(pa.array(rows))
    hashes = hash_of(chosen["caption_digest"].combine_chunks())
    size = _token_bytes(chosen) if name == TOKENS else _pooled_bytes(chosen)
    return _Found(hashes, rows.astype(np.int32), size)


def _pooled_bytes(rows: pa.Table) -> int:
    """As 16-bit floats."""
    return 2 * (pc.sum(rows["pooled_size"]).as_py() or 0)


def _token_bytes(rows: pa.Table) -> int:
    """As 16-bit floats."""
    flat = rows["tokens_shape"].combine_chunks().flatten().to_numpy().astype(np.int64)
    return 2 * int(flat.reshape(-1, 2).prod(1).sum())


def _joined(found: list[_Found]) -> Rows:
    counts = [len(each.row) for each in found]
    hashes = np.concatenate([np.zeros(0, np.uint64), *(each.hashes for each in found)])
    group = np.repeat(np.arange(len(found), dtype=np.int32), counts)
    row = np.concatenate([np.zeros(0, np.int32), *(each.row for each in found)])
    order = np.argsort(hashes, kind="stable")
    return Rows(hashes[order], group[order], row[order])


def _refuse_twins(version: StoreVersion, name: str, rows: Rows) -> None:
    twins = rows.hashes[1:][rows.hashes[1:] == rows.hashes[:-1]]
    if len(twins):
        raise UserError(
            f"{version.store.uri} version {version.number}: {len(twins)} captions of {name} are "
            f"there twice, the digest of the first begins with {int(twins[0]):016x}: run "
            "`ldm encode` again"
        )
