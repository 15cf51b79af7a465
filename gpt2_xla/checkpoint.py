"""Checkpoints: a Hugging Face model folder with a trainer_state/ beside it; save, find, verify, read, prune.

step-00001000/
  config.json  model.safetensors        what `transformers` reads (and the tokenizer's files, if it has some)
  trainer_state/optimizer.safetensors   Adam's moments and step counts, by parameter name
  trainer_state/state.json              TrainerState
  trainer_state/COMPLETE                size and sha256 of every file, written last
"""

import dataclasses
import math
import platform
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_xla import checkpoint_files as files
from gpt2_xla import hf
from gpt2_xla.cli import from_dict
from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError

CONFIG, MODEL = "config.json", "model.safetensors"
OPTIMIZER, STATE = "trainer_state/optimizer.safetensors", "trainer_state/state.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class SaveError(UserError):
    """A checkpoint could not be written; those before it are as they were."""


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


@dataclass(frozen=True)
class TrainerState:
    """What a resume needs beside the tensors.

    No random state is here: dropout seeds, batches and the learning rate are functions of (configuration, seed, step).
    """

    step: int  # optimizer steps done
    samples: int  # sequences consumed: the position in the data
    config: dict[str, Any]  # config.to_dict() of the run
    valid_loss: float | None = None  # nats per token, at this step
    best_valid_loss: float | None = None  # the lowest so far in the run
    data_fingerprint: str | None = None  # hash of the training data's manifest
    tokenizer: str | None = None
    tokenizer_hash: str | None = None
    scaler: dict[str, Any] | None = None  # fp16's gradient scaler
    wandb_id: str | None = None
    versions: dict[str, str] = field(default_factory=_versions)


def save(
    run_dir: Path,
    state: TrainerState,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    end_of_text: int | None = None,
    tokenizer_files: Path | None = None,
) -> Path:
    """Write the checkpoint of `state.step`, replacing one of the same step; return its folder.

    All tensors are on the CPU; weights have our names, `lm_head.weight` may be listed or not where it is tied. The files
    in the folder `tokenizer_files` are copied in. Raises SaveError if the disk is full or may not be written.
    """
    final = run_dir / f"step-{state.step:08d}"
    config = from_dict(ModelConfig, state.config["model"])

    def fill(folder: Path) -> None:
        for file in sorted(tokenizer_files.iterdir()) if tokenizer_files else []:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        (folder / STATE).parent.mkdir()
        files.write_json(folder / CONFIG, hf.hugging_face_config(config, end_of_text))
        files.write_json(folder / STATE, dataclasses.asdict(state))
        files.write_tensors(folder / MODEL, hf.to_hugging_face(weights, config))
        files.write_tensors(folder / OPTIMIZER, optimizer)

    try:
        files.remove_leftovers(run_dir, "step-*")
        files.write_folder(final, fill)
    except OSError as error:
        good = newest_good(run_dir, lambda _: None)
        rest = f"the last good one, {good.name}, is untouched" if good else "there is no earlier one"
        raise SaveError(f"could not save checkpoint {final}: {error.strerror or error}; {rest}") from error
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest (highest step) first; a run folder that does not exist has none."""
    try:
        found = [folder for folder in run_dir.iterdir() if STEP_FOLDER.fullmatch(folder.name) and folder.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{run_dir} can't be read: {error.strerror}") from error
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def problems(path: Path, for_resume: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a sentence each: missing or altered files, odd JSON. Empty for a good one.

    Reads every byte; without `for_resume` not those of the optimizer's state.
    """
    found = files.damage(path, {CONFIG, MODEL, OPTIMIZER, STATE}, unhashed=set() if for_resume else {OPTIMIZER})
    if found:
        return found
    for read in (read_model_config, read_state):
        try:
            read(path)
        except UserError as error:
            found += error.mistakes
    return found


def newest_good(run_dir: Path, say: Callable[[str], None], for_resume: bool = True) -> Path | None:
    """The newest checkpoint without problems, or None; tells `say` which ones it passed over, and why."""
    files.recover(run_dir)
    passed_over = False
    for folder in checkpoints(run_dir):
        why = problems(folder, for_resume)
        if not why:
            if passed_over:
                say(f"falling back to checkpoint {folder}")
            return folder
        say(f"checkpoint {folder} is damaged: {'; '.join(why)}")
        passed_over = True
    return None


def resolve(path: str, say: Callable[[str], None] | None = None, for_resume: bool = False) -> Path:
    """The folder of weights that a user means: a checkpoint, a run's newest good one, a Hugging Face GPT-2's.

    Tells `say` (default: a warning on standard error) of damaged ones passed over. Raises UserError that starts with the
    path, so that a caller can put its flag before it.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{path}: {what}; expected a checkpoint folder (step-…) or a run folder that holds some")
    if STEP_FOLDER.fullmatch(folder.name) or (folder / STATE).parent.is_dir():
        found = problems(folder, for_resume)
        if found:
            raise UserError(f"{path} is a damaged checkpoint: {'; '.join(found)}")
        return folder
    if (folder / CONFIG).is_file() and (folder / MODEL).is_file() and not for_resume:
        return folder
    good = newest_good(folder, say or _warn, for_resume)
    if good is None:
        state = "all are damaged" if checkpoints(folder) else f"there is neither a step-… folder nor {MODEL} in it"
        raise UserError(f"{path} holds no usable checkpoint: {state}")
    return good


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


def has_state(path: Path) -> bool:
    """Whether a resolved folder is a checkpoint of ours, and not only a Hugging Face model."""
    return (path / STATE).is_file()


def read_state(path: Path) -> TrainerState:
    """The trainer's state; raises UserError naming each missing or odd value. Keys it doesn't know are left out."""
    saved = files.read_json(path / STATE)
    hints = typing.get_type_hints(TrainerState)
    mistakes = [f"{path / STATE} has no {name!r}" for name in ("step", "samples", "config") if name not in saved]
    for name in hints.keys() & saved.keys():
        value, kinds = saved[name], _json_types(hints[name])
        if type(value) not in kinds:
            mistakes.append(f"{path / STATE}: {name!r} is {str(value)[:40]!r}; expected {kinds[0].__name__}")
        elif name in ("step", "samples") and value < 0:
            mistakes.append(f"{path / STATE}: {name!r} is {value}; expected 0 or more")
    if mistakes:
        raise UserError(sorted(mistakes))
    return TrainerState(**{name: saved[name] for name in hints if name in saved})


def _json_types(hint: Any) -> list[type]:
    """The types that json.loads may give for a field: [float, NoneType, int] for `float | None`."""
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(member) or member for member in union]
    return [*kinds, int] if float in kinds else kinds


def read_model_config(path: Path) -> ModelConfig:
    """The model's configuration, from config.json; raises UserError for one that the model can't represent."""
    try:
        return hf.model_config(files.read_json(path / CONFIG))
    except UserError as error:
        shown = [m if str(path / CONFIG) in m else f"{path / CONFIG}: {m}" for m in error.mistakes]
        raise UserError(shown) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights under our names, memory-mapped (matrices as transposed views); raises UserError."""
    return hf.from_hugging_face(files.read_tensors(path / MODEL), read_model_config(path))


def read_optimizer(path: Path) -> dict[str, Tensor]:
    """The optimizer's state, named as by `optim.named_state`, memory-mapped; raises UserError."""
    return files.read_tensors(path / OPTIMIZER)


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into the model, whatever its device; a tied weight is listed once or, equal, twice.

    Raises UserError naming every weight that is missing, unexpected or of another shape; then nothing was copied.
    """
    parameters = dict(model.named_parameters())  # tied ones once, under their first name
    aliases = dict(model.named_parameters(remove_duplicate=False))
    mistakes = [f"weight {name} is missing" for name in parameters if name not in weights]
    for name, value in weights.items():
        if name not in aliases:
            mistakes.append(f"weight {name} is not in the model")
        elif value.shape != aliases[name].shape:
            expected, got = (" x ".join(map(str, shape)) or "scalar" for shape in (aliases[name].shape, value.shape))
            mistakes.append(f"weight {name} is {got}; the model's is {expected}")
        elif name not in parameters and not _equals_its_twin(name, aliases, parameters, weights):
            mistakes.append(f"weight {name} differs from the one that the model ties it to")
    if mistakes:
        raise UserError(mistakes[:8] + ([f"and {len(mistakes) - 8} more"] if len(mistakes) > 8 else []))
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _equals_its_twin(
    name: str, aliases: dict[str, Any], parameters: dict[str, Any], weights: dict[str, Tensor]
) -> bool:
    twin = next(other for other, parameter in parameters.items() if parameter is aliases[name])
    return twin in weights and torch.equal(weights[name], weights[twin])


def prune(run_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the `keep` last written and the one with the best validation loss. Call after a save.

    Last written, not highest step: after a fallback over a damaged checkpoint the new ones have lower steps than it.
    """
    by_age = sorted(checkpoints(run_dir), key=_written, reverse=True)
    losses = {folder: loss for folder in by_age if (loss := _valid_loss(folder)) is not None}
    kept = {*by_age[: max(keep, 1)], *([min(losses, key=losses.__getitem__)] if losses else [])}
    for folder in by_age:
        if folder not in kept:
            files.delete_folder(folder)


def _written(folder: Path) -> tuple[int, int]:
    """When the checkpoint was completed (ns); 0 if it has no record."""
    record = folder / files.RECORD
    return (record.stat().st_mtime_ns if record.is_file() else 0, _step(folder))


def _valid_loss(folder: Path) -> float | None:
    """The recorded validation loss, unless unreadable or not finite."""
    try:
        loss = read_state(folder).valid_loss
    except UserError:
        return None
    return loss if loss is not None and math.isfinite(loss) else None
