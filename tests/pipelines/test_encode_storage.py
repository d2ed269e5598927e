"""Files of several mounts and buckets, some of which a node may lack."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from picture_folder import SIZE, picture_folder
from test_encode_damage import JOB, item_of, put_files
from test_encode_media import project

from ldm_core.errors import BadMedia, UserError
from pipelines.encode_files import with_content
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.encode_storage import device_of, mounts_of, storage, witnesses

TREE = {"/": 1, "/mnt": 1, "/mnt/a": 2, "/mnt/a/deep": 2, "/mnt/b": 3, "/mnt/b/in/c": 4}
URIS = ("/mnt/a/deep/1.png", "file:///mnt/a/2.png", "file:///mnt/b/3.png", "file:///mnt/b/in/c/4")


def device(folder: str) -> int:
    """As a tree with three mounts has them; other folders are on what their parents are."""
    return TREE[folder] if folder in TREE else device(os.path.dirname(folder))


def test_mounts_are_where_the_device_changes():
    mounts = mounts_of(URIS, device)
    assert mounts == ("/mnt/a/", "/mnt/b/", "/mnt/b/in/c/")
    assert [storage(uri, mounts)[1] for uri in URIS] == [mounts[k] for k in (0, 0, 1, 2)]
    assert storage("/mnt/bc/5.png", mounts) == ("", "")
    assert mounts_of(["/x.png", "file:///home/y.png"], device) == ("/",)
    assert mounts_of(["s3://bucket/1.png"], device) == ()


def test_a_bucket_is_one_storage():
    uris = ["s3://a/x/1.png", "s3://a/2.png", "gs://a/1.png", "s3://b/1.tar#offset=0&size=1"]
    assert [storage(uri, ()) for uri in uris] == [
        ("s3", "a"),
        ("s3", "a"),
        ("gs", "a"),
        ("s3", "b"),
    ]


def test_the_mount_of_a_folder_here_is_a_mount(tmp_path):
    [mount] = mounts_of([str(tmp_path / "1.png")])
    assert str(tmp_path).startswith(mount)
    assert device_of(mount) == device_of(str(tmp_path))
    assert os.path.ismount(mount) or os.path.islink(mount.rstrip("/"))
    assert mounts_of([str(tmp_path / "gone/too/1.png")]) == (mount,)


def test_each_storage_has_witnesses():
    mounts = mounts_of(URIS, device)
    many = [f"/mnt/a/{k}.png" for k in range(9)]
    found = witnesses([*many, *URIS[2:]], mounts, 3)
    assert found == (many[0], many[3], many[6], *URIS[2:])


class TestAway:
    """A worker with one mount, whose files it can read, and without another."""

    @pytest.fixture
    def job(self, tmp_path: Path):
        here = [item["uri"] for item in put_files(tmp_path, 3)]
        mounts = ("/", f"{tmp_path}/", f"{tmp_path}/away/")
        return replace(JOB, mounts=mounts, witnesses=(*here, f"{tmp_path}/away/7.png"))

    def test_a_mount_that_is_away_stops_the_job(self, tmp_path, job):
        files = [[item_of(f"{tmp_path}/away/{k}.png")] for k in range(20)]
        with pytest.raises(UserError, match=r"away/0\.png was listed but .* nor others"):
            list(with_content(files, job))

    def test_a_file_that_is_gone_does_not(self, tmp_path, job):
        [(_, content)] = with_content([[item_of(f"{tmp_path}/gone.png")]], job)
        assert isinstance(content, BadMedia)
        assert content.reason == "file missing"


def test_the_plan_tells_the_mounts(tmp_path):
    (tmp_path / "data").mkdir()
    picture_folder(tmp_path / "data")
    recipe = project(tmp_path, SIZE).located()
    job = make_plan(recipe, describe_autoencoder(recipe)).job
    assert job.mounts == mounts_of([str(tmp_path / "data/1.png")])
    assert {storage(uri, job.mounts) for uri in job.witnesses} == {("", job.mounts[0])}
