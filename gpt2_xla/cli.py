"""Dataclass fields → command-line flags; presets, recipes, saved configurations; "did you mean"."""

import argparse
import dataclasses
import difflib
import shlex
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from gpt2_xla.config import PRESET_OPTIMIZERS, PRESETS, ModelConfig, RunConfig
from gpt2_xla.errors import UserError

Config = TypeVar("Config")
LARGEST_RECIPE = 2**16  # bytes; splitting a megabyte of anything into words takes minutes
LARGEST_NUMBER = 2**53  # what JSON and float64 hold exactly
RECIPES = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Flag:
    """One field of one group, as a command-line flag."""

    group: str | None  # the attribute that holds the group's dataclass; None for a flat configuration
    title: str
    field: dataclasses.Field[Any]
    type: Any

    @property
    def name(self) -> str:
        return "--" + self.field.name.replace("_", "-")

    @property
    def key(self) -> str:
        return self.field.name

    @property
    def help(self) -> str:
        """The line of --help: the option's text, with its default where the text does not tell it."""
        text = self.field.metadata["help"]
        told = self.field.default in (None, ()) or "default:" in text
        return text if told else f"{text} (default: {self.default_text})"

    @property
    def default_text(self) -> str:
        """The default in words; empty where there is none."""
        default = self.field.default
        if isinstance(default, tuple):
            return " ".join(map(str, default))
        if isinstance(default, bool):
            return "on" if default else "off"
        return "" if default is None else str(default)

    @property
    def metavar(self) -> str | None:
        """What stands for the value in --help: the choices, or the kind of value."""
        inner = _inner(self.type)
        if inner is bool:
            return None
        element = typing.get_args(inner)[0] if typing.get_origin(inner) is tuple else inner
        if typing.get_origin(element) is Literal:
            return "{" + ",".join(typing.get_args(element)) + "}"
        return {int: "N", float: "X", str: "TEXT"}[element]

    @property
    def metavar_text(self) -> str:
        """The same for documentation, where | separates columns."""
        return (self.metavar or "on/off").strip("{}").replace(",", ", ")


@dataclass(frozen=True)
class Parsed(Generic[Config]):
    """A configuration and the names of the fields that the command itself set (by flag, preset or recipe)."""

    config: Config
    explicit: frozenset[str]


def flags_of(config_type: type) -> list[Flag]:
    """All flags of a configuration: of its groups if its fields are dataclasses, else its own."""
    types_ = typing.get_type_hints(config_type)
    flags = []
    for field in dataclasses.fields(config_type):
        inner = types_[field.name]
        if dataclasses.is_dataclass(inner):
            hints = typing.get_type_hints(inner)
            title = inner.__doc__ or field.name
            flags += [Flag(field.name, title, f, hints[f.name]) for f in dataclasses.fields(inner)]
        else:
            flags.append(Flag(None, config_type.__doc__ or "Options", field, inner))
    return flags


def parser_for(config_type: type, description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The argparse parser whose groups and help texts are the configuration's."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--flag value ...]",
        description=description,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=34, width=110),
    )
    general = parser.add_argument_group("General")
    general.add_argument("-h", "--help", action="help", help="show this text")
    if _holds(config_type, ModelConfig):
        presets = "{" + ",".join(PRESETS) + "}"
        general.add_argument(
            "--preset", nargs="?", metavar=presets, help="model, and optimizer where a preset has one (default: gpt2)"
        )
    if _holds(config_type, RunConfig):
        general.add_argument(
            "--recipe", nargs="?", metavar="NAME", help="flags from configs/NAME.flags, or a file; flags given here win"
        )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags_of(config_type):
        if flag.title not in groups:
            groups[flag.title] = parser.add_argument_group(flag.title)
        group = groups[flag.title]
        help_text = flag.help.replace("%", "%%")
        if _inner(flag.type) is bool:
            group.add_argument(flag.name, dest=flag.key, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            many = typing.get_origin(_inner(flag.type)) is tuple
            group.add_argument(
                flag.name, dest=flag.key, metavar=flag.metavar, nargs="*" if many else "?", help=help_text
            )
    return parser


def parse(
    config_type: type[Config],
    argv: list[str],
    description: str,
    prog: str | None = None,
    base: Config | None = None,
    mistakes: list[str] | None = None,
    others: Mapping[str, type] = types.MappingProxyType({}),
) -> Parsed[Config]:
    """Parse `argv` into a configuration; collect every mistake before raising one `UserError`.

    Precedence, weakest first: the dataclass defaults (or `base`, a saved configuration), the recipe, the command
    line; in each of the two, --preset is weaker than the flags beside it. With a list for `mistakes` they are added to it
    instead, and what could be parsed is returned. An unknown flag that one of `others` has, commands by name with their
    configurations, is said to be that one's.
    """
    found: list[str] = []
    parser = parser_for(config_type, description, prog)
    owners = {flag.name: name for name, other in reversed(list(others.items())) for flag in flags_of(other)}
    raw = vars(_parse_tokens(parser, argv, found, owners))
    values: dict[str, Any] = {}
    if "recipe" in raw:
        values |= _recipe_values(config_type, parser, raw.pop("recipe"), found, owners)
    values |= _values(config_type, raw, found)
    if mistakes is not None:
        mistakes += found
    elif found:
        raise UserError(found)
    return Parsed(replace_fields(base if base is not None else config_type(), values), frozenset(values))


def _recipe_values(
    config_type: type,
    parser: argparse.ArgumentParser,
    name: str | None,
    mistakes: list[str],
    owners: Mapping[str, str],
) -> dict[str, Any]:
    """The fields that a recipe sets."""
    if name is None:
        mistakes.append("--recipe needs a value")
        return {}
    own: list[str] = []
    try:
        values = _values(config_type, vars(_parse_tokens(parser, read_recipe(name), own, owners)), own)
    except UserError as error:  # the file itself
        mistakes += error.mistakes
        return {}
    mistakes += [f"in recipe {name}: {mistake}" for mistake in own]
    return values


def _values(config_type: type, raw: dict[str, Any], mistakes: list[str]) -> dict[str, Any]:
    """Raw strings as fields' values; a preset's fields first, so that flags beside it win."""
    values: dict[str, Any] = {}
    if "preset" in raw:
        preset = raw.pop("preset")
        if preset is None:
            mistakes.append("--preset needs a value")
        elif preset not in PRESETS:
            mistakes.append(
                f"--preset {preset} is unknown{did_you_mean(preset, PRESETS)}; there are {', '.join(PRESETS)}"
            )
        else:
            values |= PRESETS[preset] | PRESET_OPTIMIZERS.get(preset, {})
    flags = {flag.key: flag for flag in flags_of(config_type)}
    for key, text in raw.items():
        if text is None:
            choices = (flags[key].metavar or "").strip("{}").split(",")
            among = f": one of {', '.join(choices)}" if len(choices) > 1 else ""
            mistakes.append(f"{flags[key].name} needs a value{among}")
            continue
        try:
            values[key] = convert(text, flags[key].type, flags[key].name)
        except UserError as error:
            mistakes += error.mistakes
    return values


def replace_fields(config: Config, values: dict[str, Any]) -> Config:
    """A copy of the configuration with fields replaced, wherever in its groups they stand."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        current = getattr(config, field.name)
        if dataclasses.is_dataclass(current) and not isinstance(current, type):
            own = {f.name: values[f.name] for f in dataclasses.fields(current) if f.name in values}
            changes[field.name] = dataclasses.replace(current, **own)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def from_dict(config_type: type[Config], saved: dict[str, Any]) -> Config:
    """The inverse of `config.to_dict`; what another entry point saved and this one lacks, or means otherwise, is left out.

    What was saved when an option took one value only (text, or null for none) is read as a list of one, or none.

    Raises `UserError` for a value of the wrong type.
    """
    values = {}
    flags = flags_of(config_type)
    for flag in flags:
        group = saved.get(flag.group, {}) if flag.group else saved
        if isinstance(group, dict) and flag.key in group:
            ours = {other.key for other in flags if other.group == flag.group}
            if not flag.field.metadata["portable"] and not group.keys() <= ours:
                continue  # an option beside it that only the other entry point has tells where it comes from
            value = group[flag.key]
            if typing.get_origin(flag.type) is tuple and isinstance(value, str | None):
                value = [] if value is None else [value]
            may_be_none = types.NoneType in typing.get_args(flag.type)
            none = value is None and may_be_none
            values[flag.key] = None if none else convert(value, flag.type, f"saved option {flag.key}")
    return replace_fields(config_type(), values)


def read_recipe(name: str) -> list[str]:
    """The flags in configs/NAME.flags or in the file NAME: shell words, # comments."""
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.flags"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.flags"))
        raise UserError(
            f"--recipe {name}: no such file or recipe{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}"
        )
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            raise UserError(
                f"--recipe {path} is larger than {LARGEST_RECIPE:,} bytes; a recipe is a short file of flags"
            )
        tokens = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    except (OSError, ValueError) as error:  # ValueError: an unclosed quote, or no text
        raise UserError(f"--recipe {path} can't be read as flags: {error}") from error
    if any(token.split("=")[0] == "--recipe" for token in tokens):
        raise UserError(f"{path}: a recipe cannot name another --recipe")
    if "-h" in tokens or "--help" in tokens:
        raise UserError(f"{path}: a recipe cannot ask for --help")
    return tokens


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`, did you mean X?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]}?" if near else ""


def convert(value: Any, type_: Any, name: str) -> Any:
    """A string (or JSON value) as the field's type; raises `UserError` that says what was expected."""
    inner = _inner(type_)
    if typing.get_origin(inner) is tuple:
        elements = typing.get_args(inner)
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} {value} is not a list")
        if elements[-1] is not Ellipsis and len(value) != len(elements):
            raise UserError(f"{name} takes {len(elements)} values, got {len(value)}: {' '.join(map(str, value))}")
        return tuple(convert(v, elements[0], name) for v in value)
    if typing.get_origin(inner) is Literal:
        choices = typing.get_args(inner)
        if value not in choices:
            raise UserError(f"{name} {value} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        return value
    # A flag's text is read as a number; a saved value must be one already (true is an int to Python, not to us).
    takes: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int, str), float: (float, int, str), str: (str,)}
    try:
        if not isinstance(value, takes[inner]) or (isinstance(value, bool) and inner is not bool):
            raise TypeError
        converted = inner(value)
        if inner is int and abs(converted) > LARGEST_NUMBER:
            raise UserError(f"{name} is too large: whole numbers end at {LARGEST_NUMBER:,}")
        return converted
    except (TypeError, ValueError, OverflowError):
        kind = {bool: "on or off", int: "a whole number", float: "a number", str: "text"}[inner]
        raise UserError(f"{name} {value} is not {kind}") from None


class _HelpFormatter(argparse.HelpFormatter):
    """Shows values without brackets: they are optional only to let us say what is missing."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        shown = action.metavar or default_metavar
        if action.nargs == 0:
            return ""
        return f"{shown} ..." if action.nargs == "*" else str(shown)


class _Mistake(Exception):
    """What argparse would have printed before exiting."""


def _parse_tokens(
    parser: argparse.ArgumentParser, tokens: list[str], mistakes: list[str], owners: Mapping[str, str]
) -> argparse.Namespace:
    """Parse into raw strings; add unknown flags, with the nearest known one, and what argparse refuses to the mistakes.

    `owners` names the other command that has a flag.
    """
    known = {option for action in parser._actions for option in action.option_strings}

    def fail(message: str) -> typing.NoReturn:
        raise _Mistake(message)

    parser.error = fail  # type: ignore[method-assign]
    try:
        namespace, rest = parser.parse_known_args(tokens)
    except _Mistake as mistake:
        namespace, rest = argparse.Namespace(), []
        mistakes.append(str(mistake).removeprefix("argument "))
        mistakes += _unknown([t for t in tokens if t.startswith("--") and t.split("=")[0] not in known], known, owners)
    else:
        mistakes += _unknown(rest, known, owners)
    return namespace


def _unknown(rest: list[str], known: set[str], owners: Mapping[str, str]) -> list[str]:
    """A sentence for each token that no flag took; the value after an unknown flag goes with it."""
    mistakes = []
    after_flag = False
    for token in rest:
        if token.startswith("-") and not token.lstrip("-")[:1].isdigit():
            name = token.split("=")[0]
            if owner := owners.get(name) or owners.get(name.replace("--no-", "--", 1)):
                hint = f", which belongs to {owner}"
            else:
                hint = did_you_mean(name, known) or "; --help lists them"
            mistakes.append(f"unknown flag {name}{hint}")
            after_flag = "=" not in token
        elif not after_flag:
            mistakes.append(f"unexpected argument {token!r}; every option is a --flag")
        else:
            after_flag = False
    return mistakes


def _inner(type_: Any) -> Any:
    """`int` for `int | None`."""
    if typing.get_origin(type_) in (types.UnionType, typing.Union):  # the second with a Literal
        return next(t for t in typing.get_args(type_) if t is not types.NoneType)
    return type_


def _holds(config_type: type, group: type) -> bool:
    """Whether a configuration has that group of options."""
    return any(hint is group for hint in typing.get_type_hints(config_type).values())
