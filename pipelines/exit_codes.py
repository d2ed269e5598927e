"""How a command ends: 0 good, 1 a failed job or our bug, 2 the user's mistake, 130 Ctrl-C.

A user reads one line on stderr; the traceback is for `--verbose`.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from ldm_core.errors import UserError
from pipelines.recipe_options import describe_errors

GOOD, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


class JobFailed(RuntimeError):
    """A submitted job that did not succeed: its own log has said why."""


class Commands(TyperGroup):
    """The group of all commands, which ends the program with our exit codes."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run the command named by `args`, by default those of the program."""
        words = list(sys.argv[1:] if args is None else args)
        run = super().main
        sys.exit(exit_code(lambda: run(words, *rest, **{**extra, "standalone_mode": False}), words))


def exit_code(run: Callable[[], Any], words: Sequence[str]) -> int:
    """Run a command and say in one line what went wrong, if something did."""
    verbose = "--verbose" in words
    try:
        code = int(run() or GOOD)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except typer.TyperException as error:  # an unknown option, a missing argument, …
        _say_usage(error)
        return error.exit_code
    except Exception as error:
        mistake = _mistake(error)
        if verbose:
            traceback.print_exc()
        if mistake is not None:
            _say(mistake)
            return MISTAKE
        hint = (
            ""
            if verbose or isinstance(error, JobFailed)
            else " (run with --verbose for the traceback)"
        )
        _say(f"{_one_line(error)}{hint}")
        return FAILED
    if code == INTERRUPTED:
        _say("interrupted; the same command goes on from what is finished")
    return code


def _mistake(error: BaseException) -> str | None:
    """The message for the user if the error is the user's to mend."""
    cause = getattr(error, "cause", None)  # Ray wraps what a task raised
    if isinstance(cause, UserError):
        error = cause
    if isinstance(error, ValidationError):
        return describe_errors(error)
    return " ".join(str(error).split()) if isinstance(error, UserError) else None


def _one_line(error: BaseException) -> str:
    """The error's name and its last line: a remote traceback has the reason at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, JobFailed):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _say_usage(error: typer.TyperException) -> None:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "ldm"
    if message := error.format_message():  # without any word, the help is printed instead
        _say(f"{message.rstrip('.')}; see {command} --help")


def _say(message: str) -> None:
    print(f"ldm: {message}", file=sys.stderr, flush=True)
