"""From what the user typed to one validated recipe: a name or file, then `--set a.b=c` on top."""

import difflib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ldm_core.errors import UserError
from ldm_core.files import exists, read_json
from pipelines.recipes import RECIPES
from pipelines.recipes.schema import Recipe


@dataclass(frozen=True)
class Arguments:
    """The words that name a recipe: kept, so that the next command can be shown with the same.

    Attributes:
        recipe: a recipe's name, or a JSON file as `ldm show` prints.
        data, root: instead of the recipe's own.
        overrides: "section.field=value" each; the value as YAML, so JSON too.
    """

    recipe: str
    data: str | None = None
    root: str | None = None
    overrides: tuple[str, ...] = ()

    def resolve(self) -> Recipe:
        """The recipe these words name.

        Raises:
            UserError: no such recipe or field, or a value that is not allowed.
        """
        values = _load(self.recipe)
        for override in self.overrides:
            _override(values, override)
        given = {"data": self.data, "root": self.root}
        values |= {name: uri for name, uri in given.items() if uri is not None}
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            raise UserError(describe_errors(error)) from error

    def words(self) -> list[str]:
        """The words again."""
        options = {"--data": self.data, "--root": self.root}
        given = [word for name, uri in options.items() if uri is not None for word in (name, uri)]
        sets = [word for override in self.overrides for word in ("--set", override)]
        return [self.recipe, *given, *sets]

    def command(self, stage: str) -> str:
        """A shell line that runs a stage with the same words."""
        return shlex.join(["ldm", stage, *self.words()])


def _load(name: str) -> dict[str, Any]:
    if name in RECIPES:
        return RECIPES[name]().model_dump(mode="json")
    if not name.endswith(".json"):
        raise UserError(
            f"no recipe {name}: known are {', '.join(RECIPES)}; or pass a file such as "
            f"`ldm show {next(iter(RECIPES))} > my.json` makes"
        )
    if not exists(name):
        raise UserError(f"no file {name}; `ldm show image-s > {name}` makes one to start from")
    try:
        values = read_json(name)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name} holds a {type(values).__name__}, not the fields of a recipe")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    """Put one `a.b=c` into the nested values."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override} has no value; write --set {key}=VALUE")
    *sections, name = key.split(".")
    field = _field(key)
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{section} is {values!r} in the file, not the fields of a section")
    value = _parse(override, text, field)
    if isinstance(value, dict) and isinstance(values.get(name), dict):
        value = values[name] | value  # a section given in part keeps the rest
    values[name] = value


def _field(key: str) -> FieldInfo:
    """The field a dotted key names."""
    model: Any = Recipe
    field = None
    for name in key.split("."):
        fields = model.model_fields if _is_section(model) else {}
        if name not in fields:
            raise UserError(_unknown(key))
        field = fields[name]
        model = field.annotation
    assert field is not None
    return field


def _parse(override: str, text: str, field: FieldInfo) -> Any:
    kinds = {field.annotation, *get_args(field.annotation)}
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {override}: the value is neither a plain word nor YAML nor JSON"
        ) from error
    if value is None and NoneType in kinds:
        return None
    # a name may look like a number, and what is no value is refused as it was typed
    return text if value is None or str in kinds else value


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested ones with its dotted key, as `--set` takes it."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def describe_errors(error: ValidationError) -> str:
    """A pydantic error as one line: each field, its value and the rule it breaks."""
    return "; ".join(_describe(each) for each in error.errors())


def _describe(each: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in each["loc"])
    if each["type"] == "extra_forbidden":
        return _unknown(place)
    message = str(each["msg"]).removeprefix("Value error, ")
    if each["type"] == "missing":
        return f"{place} is missing"
    if isinstance(each["input"], BaseModel | Mapping):  # of the whole section: too long to repeat
        return f"{place}: {message}" if place else message
    return f"{place} is {each['input']!r}: {message[0].lower()}{message[1:]}"


def _unknown(key: str) -> str:
    """What to say about a key that is no field: near ones, else those that are there."""
    section, dot, name = key.rpartition(".")
    names = [known.rpartition(".")[2] for known in _keys() if known.rpartition(".")[0] == section]
    near = [section + dot + known for known in difflib.get_close_matches(name, names)]
    elsewhere = [known for known in _keys() if known.rpartition(".")[2] == name]
    if near or elsewhere:
        return f"no field {key}; did you mean {' or '.join(near or elsewhere)}?"
    if not names:
        return f"no field {key}; {section} has no fields"
    return f"no field {key}; {section or 'a recipe'} has {', '.join(names)}"


def _keys(model: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if _is_section(field.annotation):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
