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
from pipelines.credentials import masked
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
        if verbose:
            print(masked(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        return _failure(_raised(error), verbose)
    if code == INTERRUPTED:
        _say("interrupted; the same command goes on from what is finished")
    return code


def _failure(error: BaseException, verbose: bool) -> int:
    """Say what went wrong, and whose it is to mend."""
    mistake = _mistake(error)
    if mistake is not None:
        _say(mistake)
        return MISTAKE
    told = verbose or isinstance(error, JobFailed)
    _say(_one_line(error) + ("" if told else " (run with --verbose for the traceback)"))
    return FAILED


def _mistake(error: BaseException) -> str | None:
    """The message for the user if the error is the user's to mend."""
    if isinstance(error, ValidationError):
        return describe_errors(error)
    if isinstance(error, PermissionError | NotADirectoryError) and error.filename:
        return f"{_one_line(error)}: name a place that can be written, or make this one so"
    if _no_store_answers(error):
        return f"{_one_line(error)}; check AWS_ENDPOINT_URL and the credentials"
    return " ".join(_text(error).split()) if isinstance(error, UserError) else None


def _no_store_answers(error: BaseException) -> bool:
    """Whether the object store cannot be reached, or knows nobody who asks like this."""
    from botocore import exceptions as of_aws  # here: it is imported for nothing else

    unheard = (of_aws.HTTPClientError, of_aws.ConnectionError)
    refusals = (*unheard, of_aws.NoCredentialsError, of_aws.PartialCredentialsError)
    no_access = isinstance(error, PermissionError) and not error.filename
    patience_spent = isinstance(error, ConnectionError) and "S3 did not answer" in str(error)
    return no_access or patience_spent or isinstance(error, refusals)


def _raised(error: Exception) -> BaseException:
    """What a task raised, if Ray wrapped it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _text(error: BaseException) -> str:
    """The error's message, without what Ray Data appends to it."""
    return str(error).partition("\nFailed to apply UDF transform")[0]


def _one_line(error: BaseException) -> str:
    """The error's name and its last line: a remote traceback has the reason at its end."""
    lines = [line.strip() for line in _text(error).splitlines() if line.strip()]
    if isinstance(error, JobFailed):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _say_usage(error: typer.TyperException) -> None:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "ldm"
    if message := error.format_message():  # without any word, the help is printed instead
        _say(f"{message.rstrip('.')}; see {command} --help")


def _say(message: str) -> None:
    print(f"ldm: {masked(message)}", file=sys.stderr, flush=True)
