"""Files of a storage that fails for a moment: nothing is taken for not being there."""

import errno
import os
from pathlib import Path

import pytest

from ldm_core.files import exists, file_sizes


def stale(*_: object, **__: object) -> None:
    raise OSError(errno.ESTALE, "stale file handle")


def test_what_is_there_and_what_is_not(tmp_path: Path):
    (tmp_path / "a").write_text("12")
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "d").write_text("123")
    assert exists(str(tmp_path / "a"))
    assert exists(f"file://{tmp_path}/b")
    for missing in ("e", "a/b", "x" * 300, "nul\0byte"):
        assert not exists(f"{tmp_path}/{missing}")
    sizes = {Path(path.removeprefix("file://")).name: size for path, size in
             file_sizes(str(tmp_path)).items()}  # fmt: skip
    assert sizes == {"a": 2, "d": 3}
    assert file_sizes(str(tmp_path / "e")) == {}


@pytest.mark.parametrize(("broken", "look"), [("stat", exists), ("scandir", file_sizes)])
def test_a_storage_that_cannot_say_is_not_an_empty_one(tmp_path, monkeypatch, broken, look):
    (tmp_path / "a").write_text("12")
    with monkeypatch.context() as away:
        away.setattr(os, broken, stale)
        with pytest.raises(OSError, match="stale"):
            look(str(tmp_path))
    assert look(str(tmp_path))
