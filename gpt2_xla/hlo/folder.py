"""An exported training step: a folder with the program, its first arrays, and what goes where. Needs numpy and safetensors only."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError

PROGRAM, ARRAYS, STEP = "program.stablehlo", "arrays.safetensors", "step.json"
FORMAT = 1


@dataclass(frozen=True)
class Argument:
    """One argument of the program."""

    array: str  # its first value's name in arrays.safetensors; of a changing one all values, stacked
    fed_by: int | None = None  # the result that is its value in the next step; None: none is
    changes: bool = False  # another number in each step: the learning rate, the dropout seed


@dataclass(frozen=True)
class ExportedStep:
    """What step.json holds. Result 0 is float32 [loss, gradient norm]."""

    description: str
    mixed_precision: str
    arguments: tuple[Argument, ...]
    results: int
    tokens: int  # of one step
    flops: float  # model FLOP of one step
    parameters: int
    losses: tuple[float, ...]  # of torch_xla's own run on the CPU, step by step
    sha256: dict[str, str] = field(default_factory=dict)  # of the two other files
    format: int = FORMAT


def write_folder(folder: Path, step: ExportedStep, arrays: dict[str, np.ndarray], program: bytes) -> None:
    """Write the three files, step.json last: a folder without it is not complete."""
    files = {PROGRAM: program, ARRAYS: save(arrays)}
    step = replace(step, sha256={name: _sha256(content) for name, content in files.items()})
    for name, content in (*files.items(), (STEP, json.dumps(asdict(step), indent=2).encode())):
        with atomic_write(folder / name) as file:
            file.write(content)


def read_folder(folder: Path) -> tuple[ExportedStep, dict[str, np.ndarray], bytes]:
    """What `write_folder` wrote. Raises `UserError` for a folder that is none, or not complete."""
    try:
        raw = json.loads((folder / STEP).read_text())
        if raw.get("format") != FORMAT:
            raise UserError(
                f"--folder {folder} has format {raw.get('format')}, this program reads {FORMAT}; export again"
            )
        raw["arguments"] = tuple(Argument(**one) for one in raw["arguments"])
        step = ExportedStep(**raw | {"losses": tuple(map(float, raw["losses"]))})
        if not step.losses:
            raise ValueError(f"{STEP} has no losses to compare with")
        if wrong := [one for one in step.arguments if one.fed_by is not None and not 0 <= one.fed_by < step.results]:
            raise ValueError(f"{STEP} feeds {wrong[0].array} by result {wrong[0].fed_by} of {step.results}")
        files = {name: (folder / name).read_bytes() for name in (PROGRAM, ARRAYS)}
        for name, content in files.items():
            if _sha256(content) != step.sha256[name]:
                raise ValueError(f"{name} has another sha256 than {STEP} says")
        arrays = load(files[ARRAYS])
    except OSError as error:
        raise UserError(
            f"--folder {folder} is no exported step: {error.strerror} ({error.filename}); write one with --export {folder}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"--folder {folder} is damaged ({error}); write it again with --export") from error
    if missing := [one.array for one in step.arguments if one.array not in arrays]:
        raise UserError(f"--folder {folder} is damaged: {ARRAYS} lacks {missing[0]}; write it again with --export")
    return step, arrays, files[PROGRAM]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
