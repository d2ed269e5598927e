"""What a command left behind, and whether it ended as a user's mistake should."""

from pathlib import Path

from typer.testing import Result


def files_under(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_mistake(result: Result, *named: str) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in named:
        assert word in result.stderr
