"""Files of one data set that are the same, or look it: told after an encode, and listed in full.

Pictures look alike whose difference hashes are near (`near_hashes`): the same picture saved anew,
with another quality or a little smaller. Not found are crops, turned and mirrored pictures.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ldm_core.files import exists, join, write_bytes
from ldm_core.latents.store import StoreVersion
from ldm_core.media.near_hashes import groups_of

FILE = "duplicates.jsonl"  # beside the store's card, of the newest version

Groups = list[list[str]]


def report_duplicates(version: StoreVersion) -> int:
    """Tell of files with the same bytes, and of pictures that look alike, and list them all in the
    store's `FILE`; returns how many files repeat another's bytes.

    Its lines are groups, the largest first: {"same": "bytes", "files": [...]} of equal bytes, and
    {"same": "dHash", "files": [...]} of near difference hashes but not all of equal bytes.
    """
    columns = ["source_id", "part", "source_sha256", "perceptual_hash"]
    rows = [row for row in version.table("samples", columns).to_pylist() if row["part"] == 0]
    same = _groups(rows, [row["source_sha256"] for row in rows])
    hashes = np.array([row["perceptual_hash"] for row in rows], np.int64)
    looks = _groups(rows, groups_of(hashes).tolist())
    bytes_of = {row["source_id"]: row["source_sha256"] for row in rows}
    only_alike = [files for files in looks if len({bytes_of[file] for file in files}) > 1]
    uri = join(version.store.uri, FILE)
    if same or only_alike or exists(uri):  # one of an earlier version would be wrong
        write_bytes(uri, (_lines("bytes", same) + _lines("dHash", only_alike)).encode())
    repeats = _repeats(same)
    alike = _repeats(only_alike)
    told = {"with the bytes of another file": repeats, "that look like another": alike}
    found = ", ".join(f"{count} {what}" for what, count in told.items() if count)
    if found:
        most = (same or only_alike)[0]
        print(
            f"[encode] duplicates: {found}; most often, {len(most)} times: {', '.join(most[:3])}; "
            f"all are in {uri}",
            flush=True,
        )
    return repeats


def _groups(rows: Iterable[Mapping[str, Any]], values: Iterable[object]) -> Groups:
    """Files with one value, of values that several have; the largest group first."""
    files: defaultdict[object, list[str]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        files[value].append(row["source_id"])
    return sorted(
        (sorted(some) for some in files.values() if len(some) > 1),
        key=lambda some: (-len(some), some),
    )


def _repeats(groups: Groups) -> int:
    return sum(len(files) - 1 for files in groups)


def _lines(same: str, groups: Groups) -> str:
    return "".join(json.dumps({"same": same, "files": files}) + "\n" for files in groups)
