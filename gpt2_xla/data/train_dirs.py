"""What --train-dir says: folders of token shards, each perhaps with a name and a weight."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from gpt2_xla.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_.-]+")
SPLIT_NAMES = ("train", "valid")  # of data/web/train the telling part is web


@dataclass(frozen=True)
class TrainDir:
    """One entry of --train-dir; `weight` is None where it says none."""

    name: str
    folder: Path
    weight: Fraction | None = None


def parse_train_dirs(entries: Sequence[str]) -> list[TrainDir]:
    """Read entries `[NAME=]FOLDER[:WEIGHT]`; raises one UserError with all that is wrong with them.

    What follows the last colon is a weight if it is a number, else part of the folder. What precedes the first equals sign is
    a name if it is letters, digits, _ . and -, else part of the folder (so ./a=b is a folder). Names default to the folder's.
    """
    found: list[TrainDir] = []
    mistakes: list[str] = []
    for entry in entries:
        try:
            found.append(_parse(entry))
        except UserError as error:
            mistakes += error.mistakes
    if len(weighted := [one for one in found if one.weight is not None]) not in (0, len(found)):
        without = " ".join(one.name for one in found if one.weight is None)
        mistakes.append(
            f"--train-dir gives a weight to {' '.join(one.name for one in weighted)} but none to {without}; "
            "give each folder one (FOLDER:WEIGHT), or none to weigh all by their tokens"
        )
    mistakes += [
        f"--train-dir names {count} folders {name}; call them apart: NAME=FOLDER, as in "
        + " ".join(f"{name}{i}={one.folder}" for i, one in enumerate((o for o in found if o.name == name), start=1))
        for name, count in Counter(one.name for one in found).items()
        if count > 1
    ]
    mistakes += [
        f"--train-dir lists the folder {folder} {count} times; list it once, with a larger weight if need be"
        for folder, count in Counter(one.folder.resolve() for one in found).items()
        if count > 1
    ]
    if mistakes:
        raise UserError(mistakes)
    return found


def _parse(entry: str) -> TrainDir:
    name, equals, rest = entry.partition("=")
    if equals and not name:
        raise UserError(f"--train-dir {entry} has no name before its =; write NAME=FOLDER or FOLDER")
    if not equals or not NAME.fullmatch(name):
        name, rest = "", entry
    folder, weight = rest, None
    head, colon, tail = rest.rpartition(":")
    if colon and (value := _number(tail)) is not None:
        folder = head
        if not 0 < value < math.inf:
            raise UserError(f"--train-dir {entry} has the weight {tail}; expected a finite number above 0")
        weight = Fraction(tail)
    if not folder:
        raise UserError(f"--train-dir {entry} names no folder; expected [NAME=]FOLDER[:WEIGHT]")
    return TrainDir(name or _default_name(Path(folder)), Path(folder), weight)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _default_name(folder: Path) -> str:
    name = folder.parent.name if folder.name in SPLIT_NAMES and folder.parent.name else folder.name
    return name or str(folder)
