"""When a cron expression comes round.

Debian's cron, Kubernetes and KubeRay agree on five fields of numbers, ranges, lists, steps and
English names. What only some of them know, or what they read otherwise, is refused, so that a
schedule means the same wherever it is kept.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from ldm_core.errors import UserError

EXAMPLE = "'0 3 * * *' is every day at 3:00"
COMPARED = 1500  # times whose distances are looked at: the year of one that comes 4 times a day
SOME_DAY = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Field:
    """One of the five.

    Attributes:
        name: of the field.
        value: a pattern of its single values.
        range: what they may be, for people; numbers beyond it are refused by the parser.
    """

    name: str
    value: str
    range: str

    def matches(self, text: str) -> bool:
        """Whether all crons can read it."""
        item = rf"(?:(?:\*|{self.value}-{self.value})(?:/[0-9]+)?|{self.value})"
        return re.fullmatch(rf"{item}(?:,{item})*", text, re.IGNORECASE) is not None


NUMBER = "[0-9]+"
FIELDS = (
    Field("minute", NUMBER, "0-59"),
    Field("hour", NUMBER, "0-23"),
    Field("day", NUMBER, "1-31"),
    Field("month", f"(?:{NUMBER}|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", "1-12"),
    Field("weekday", "(?:[0-6]|sun|mon|tue|wed|thu|fri|sat)", "0-6, where 0 is Sunday"),
)


@dataclass(frozen=True)
class Cron:
    """A cron expression and the time zone of its hours, both checked.

    Raises:
        UserError: no such expression or zone, or one that never comes round.
    """

    expression: str
    zone: str = "UTC"

    def __post_init__(self) -> None:
        _check_zone(self.zone)
        _check_fields(self.expression)
        if next(_times(self.expression, SOME_DAY), None) is None:
            raise UserError(f"--cron {self.expression!r} never comes round; {EXAMPLE}")

    def times(self, after: datetime) -> Iterator[datetime]:
        """All times later than `after`, in the cron's zone."""
        return _times(self.expression, after.astimezone(ZoneInfo(self.zone)))

    def shortest_gap(self, after: datetime) -> timedelta:
        """The least that lies between two times; a change of the clock can make it shorter."""
        times = (time.astimezone(UTC) for time in islice(self.times(after), COMPARED))
        return min(later - earlier for earlier, later in pairwise(times))


def _times(expression: str, after: datetime) -> Iterator[datetime]:
    """The parser's times; none if no month has such a day."""
    try:
        return CronSim(expression, after)
    except CronSimError:
        return iter(())


def _check_zone(zone: str) -> None:
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:  # OSError: a folder of zones
        raise UserError(
            f"--time-zone {zone!r} is no time zone; take a name such as UTC or Europe/Berlin"
        ) from error


def _check_fields(expression: str) -> None:
    texts = expression.split()
    if len(texts) != len(FIELDS):
        names = ", ".join(field.name for field in FIELDS)
        raise UserError(
            f"--cron {expression!r} has {len(texts)} fields and needs {len(FIELDS)}: {names}; "
            f"{EXAMPLE}"
        )
    for place, (field, text) in enumerate(zip(FIELDS, texts, strict=True)):
        if not field.matches(text) or not _in_range(place, text):
            raise UserError(
                f"--cron {expression!r}: the {field.name} {text!r} is not within {field.range}; "
                "write a number, a range 1-5, a list 1,3,5, or a step */2 or 1-5/2"
            )
    _, _, day, _, weekday = texts
    if "*" not in (day, weekday) and "*" in day + weekday:
        raise UserError(
            f"--cron {expression!r}: with day {day!r} and weekday {weekday!r} some crons mean both "
            "and some either; list the days without a step, or make one of the two *"
        )


def _in_range(place: int, text: str) -> bool:
    """Whether the parser takes the text in this field, every other being free."""
    texts = ["*"] * len(FIELDS)
    texts[place] = text
    try:
        CronSim(" ".join(texts), SOME_DAY)
    except CronSimError:
        return False
    return True
