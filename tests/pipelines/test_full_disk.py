"""A store on a volume that runs full: what fits is kept, and with room the same command ends.

The volume is a small tmpfs, which a child process mounts in a name space of its own.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from picture_folder import picture_folder
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.latents import commit, lock
from ldm_core.latents.commit import CommitFailed
from ldm_core.latents.store import LatentStore
from ldm_core.latents.verify import verify
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection

OWN_MOUNTS = ("unshare", "--mount", "--map-root-user")
VOLUME = 8 << 20
STEP = 48 << 10  # how much more room each attempt has


def project(folder: Path, root: Path) -> Recipe:
    return Recipe(
        name="test",
        data=str(folder / "data"),
        root=str(root),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        size=16,
        autoencoder=AutoencoderSection(source="identity"),
        text=TextSection(tiny_width=8),
        encode=EncodeSection(shard_size=4, max_aspect=1, upscale=True, max_reject_share=0.5),
    )


@pytest.mark.slow
def test_a_full_disk_costs_the_same_command_again(tmp_path):
    mounts = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if subprocess.run(mounts, capture_output=True, check=False).returncode:
        pytest.skip("nobody may mount a tmpfs here, not even in a name space of their own")
    (tmp_path / "data").mkdir()
    picture_folder(tmp_path / "data")
    recipe = project(tmp_path, tmp_path / "roomy")
    encode_here(recipe)
    expected = LatentStore(recipe.product("latents")).open_version().manifest
    child = [*OWN_MOUNTS, sys.executable, __file__, str(tmp_path)]
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        child, env=os.environ | paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["content"] == expected.content
    assert found["counts"] == expected.counts
    assert found["versions"] == [1]
    assert found["unsound"] == found["halves"] == []
    assert len(found["failures"]) > 3, found


# The child


def main(folder: Path) -> None:
    """Encode onto a full volume that gets more room each time, until it is enough."""
    commit.FIRST_PAUSE_S = 0.0
    begun = itertools.count(1)
    lock._started = lambda pid: next(begun)  # each attempt stands for a process that has ended
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={VOLUME}", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    recipe, failures = project(folder, disk / "root"), []
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * VOLUME)
    while True:
        try:
            encode_here(recipe)
            break
        except (OSError, CommitFailed) as error:
            failures.append(type(error).__name__)
        os.truncate(ballast, ballast.stat().st_size - STEP)
    version = LatentStore(recipe.product("latents")).open_version()
    found = {
        "failures": failures,
        "content": version.manifest.content,
        "counts": version.manifest.counts,
        "versions": version.store.versions(),
        "unsound": [str(each) for each in verify(version, autoencoder_facts("identity"))
                    if each.failed],
        "halves": [str(path) for path in disk.rglob(".part-*")],
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
