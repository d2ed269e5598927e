"""`ldm store`: what a latent store holds, whether it holds, and what can go."""

from collections.abc import Mapping
from typing import Annotated

import typer

from ldm_core.errors import UserError
from ldm_core.files import reach
from pipelines.cli_options import Verbose

KEEP, OLDER_THAN, TARGET_MB = 3, 24.0, 128


def store(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The store: a folder or s3:// prefix.")],
    version: Annotated[
        int | None, typer.Option(metavar="N", help="The version to show or verify, not the newest.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every row of a version.")] = False,
    preview: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="With --verify: 16 samples decoded.")
    ] = None,
    diff: Annotated[
        tuple[int, int] | None, typer.Option(metavar="A B", help="What version B changed of A.")
    ] = None,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Remove old versions and files nobody needs.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(help=f"With --vacuum: newest versions that stay. [{KEEP}]")
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            metavar="HOURS",
            help=f"With --vacuum: age at which an uncommitted file is abandoned. [{OLDER_THAN:g}]",
        ),
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Make few large files of many small ones.")
    ] = False,
    target_mb: Annotated[
        int | None, typer.Option(help=f"With --compact: size of a large file. [{TARGET_MB}]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --vacuum: say what would go.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """List a latent store's versions and what is in one; check, compare and clean them.

    Example: ldm store demo/latents --verify --preview decoded.png
    """
    actions = {"--verify": verify, "--diff": diff is not None, "--vacuum": vacuum,
               "--compact": compact}  # fmt: skip
    _check_one(actions)
    _check_together(actions, "--verify", {"--preview": preview})
    _check_together(
        actions,
        "--vacuum",
        {"--keep": keep, "--older-than": older_than, "--dry-run": dry_run or None},
    )
    _check_together(actions, "--compact", {"--target-mb": target_mb})
    if version is not None and (diff or vacuum or compact):
        raise UserError(f"--version {version}: it goes with the list and with --verify only")
    from pipelines import store_actions as act

    reach(uri)
    if verify:
        act.verify_version(uri, version, preview)
    elif diff:
        act.show_difference(uri, *diff)
    elif vacuum:
        hours = OLDER_THAN if older_than is None else older_than
        act.vacuum_store(uri, KEEP if keep is None else keep, hours, dry_run)
    elif compact:
        act.compact_store(uri, TARGET_MB if target_mb is None else target_mb)
    else:
        act.show_store(uri, version)


def _check_one(actions: Mapping[str, bool]) -> None:
    chosen = [name for name, on in actions.items() if on]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: choose one at a time")


def _check_together(actions: Mapping[str, bool], action: str, given: Mapping[str, object]) -> None:
    """An option without the action it belongs to would be a silent no-op."""
    for name, value in given.items():
        if value is not None and not actions[action]:
            raise UserError(f"{name} goes with {action}: give both, or neither")
