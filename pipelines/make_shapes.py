"""Stage 0, for whoever has no pictures yet: a captioned data set of coloured shapes."""

import tempfile
from pathlib import Path

from ldm_core.files import absolute, is_remote, join, upload_folder, write_bytes
from ldm_core.media.shapes import write_shapes
from pipelines.progress import Progress


def make_shapes(out: str, count: int, size: int, seed: int) -> None:
    """Write the data set to a folder or URI; same numbers, same bytes.

    Raises:
        UserError: a number out of range, or a folder that holds other pictures.
    """
    if not is_remote(out):
        _write(Path(absolute(out)), count, size, seed)
        return
    with tempfile.TemporaryDirectory(prefix="ldm-shapes-") as folder:
        _write(Path(folder), count, size, seed)
        upload_folder(Path(folder, "images"), join(out, "images"))
        # last: a folder with captions is a whole data set
        write_bytes(join(out, "captions.jsonl"), Path(folder, "captions.jsonl").read_bytes())


def _write(folder: Path, count: int, size: int, seed: int) -> None:
    with Progress("shapes", count, "pictures") as bar:
        write_shapes(folder, count, size, seed, bar.update)
