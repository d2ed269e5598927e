"""What several processes of one test run need, and only one of them makes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills: by who asks first, while the others wait.

    Args:
        shared: a folder of the whole test run.
        name: of what is made.
        make: writes into the empty folder that it is given; what fails is made anew.
    """
    place = shared / name
    with FileLock(f"{place}.lock"):
        if not place.exists():
            fresh = Path(tempfile.mkdtemp(dir=shared))
            make(fresh)
            fresh.rename(place)
    return place
