"""Checkpoints: a Hugging Face model folder with a trainer_state/ beside it; save, find, verify, read, prune.

step-00001000/
  config.json  model.safetensors        what `transformers` reads, if it has such a model (see `hf`); and the
                                        tokenizer's files, if it has some
  trainer_state/optimizer.safetensors   Adam's moments and step counts, by parameter name; where several processes hold
                                        the state, a file of each: optimizer-RANK-N.safetensors
  trainer_state/state.json              TrainerState
  trainer_state/COMPLETE                size and sha256 of every file, and the save's number; written last
"""

import dataclasses
import platform
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2_xla import checkpoint_files as files
from gpt2_xla import checkpoint_parts, hf, shares, vocabulary_padding
from gpt2_xla.cli import from_dict
from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.open_window import is_number, is_open_window
from gpt2_xla.shares import Share, by_name, put_together, share_files, whole_shape
from gpt2_xla.tensor_files import Entry, read_tensors

CONFIG, MODEL = "config.json", "model.safetensors"
OPTIMIZER, STATE = "trainer_state/optimizer.safetensors", "trainer_state/state.json"
# What config.json and state.json must agree on: all but the dropout, which is no property of the weights.
MODEL_OF_A_CHECKPOINT = sorted(
    {field.name for field in dataclasses.fields(ModelConfig)}
    - {"vocab_size", "vocab_padding", "d_ff", "num_kv_heads", "dropout"}
    | {"tokens_known", "hidden_dim", "kv_heads"}
)
Kept = TypeVar("Kept")
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
    recent_losses: list[float] = field(default_factory=list)  # mean losses of the last log windows, nats per token
    open_window: dict[str, Any] = field(default_factory=dict)  # the fields of an OpenWindow
    versions: dict[str, str] = field(default_factory=_versions)


def save(
    run_dir: Path,
    state: TrainerState,
    weights: Sequence[Share],
    optimizer: Sequence[Share],
    end_of_text: int | None = None,
    tokenizer_files: Path | None = None,
    parts: Sequence[Path] = (),
) -> Path:
    """Write the checkpoint of `state.step`, replacing one of the same step; return its folder.

    The shares are those of this process, under our names (`lm_head.weight` may be listed or not where it is tied); those
    of the other processes are awaited in the folders `parts`. No more than one tensor is copied at a time. The files in
    the folder `tokenizer_files` are copied in. Raises SaveError if the disk is full or may not be written.
    """
    final = run_dir / f"step-{state.step:08d}"
    config = from_dict(ModelConfig, state.config["model"])

    def fill(new: files.NewFolder) -> None:
        for file in sorted(tokenizer_files.iterdir()) if tokenizer_files else []:
            if file.is_file():
                new.write(file.name, [file.read_bytes()])
        new.write_json(CONFIG, hf.hugging_face_config(vocabulary_padding.unpadded(config), end_of_text))
        new.write_json(STATE, dataclasses.asdict(state))
        if parts:
            checkpoint_parts.write_shares(new, checkpoint_parts.OPTIMIZER, 0, optimizer)
        else:
            new.write_tensors(OPTIMIZER, *share_files(optimizer)[0])
        elsewhere = checkpoint_parts.take_in(new, parts)
        new.write_tensors(MODEL, hugging_face_entries([*weights, *elsewhere], config))

    try:
        files.remove_leftovers(run_dir, "step-*")
        number = 1 + max(map(files.save_number, checkpoints(run_dir)), default=0)
        files.write_folder(final, number, fill)
    except OSError as error:
        good = newest_good(run_dir, lambda _: None)
        rest = f"the last good one, {good.name}, is untouched" if good else "there is no earlier one"
        raise SaveError(f"could not save checkpoint {final}: {error.strerror or error}; {rest}") from error
    finally:
        checkpoint_parts.remove(parts)
    return final


def hugging_face_entries(weights: Sequence[Share], config: ModelConfig) -> list[Entry]:
    """The file that `transformers` reads; each tensor is put together and turned only when its turn comes.

    Rows that pad the vocabulary are left out.
    """
    entries = []
    for name, blocks in by_name(weights).items():
        whole = torch.empty(whole_shape(blocks), dtype=blocks[0].data.dtype, device="meta")
        like = vocabulary_padding.cut(name, whole, config)

        def read(theirs: str, name: str = name, blocks: Sequence[Share] = blocks) -> Tensor:
            tensor = vocabulary_padding.cut(name, put_together(blocks), config)
            return hf.to_hugging_face({name: tensor}, config)[theirs]

        for theirs, turned in hf.to_hugging_face({name: like}, config).items():  # none for a tied output layer
            entries.append(Entry(theirs, turned.dtype, tuple(turned.shape), partial(read, theirs)))
    return entries


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
    found = files.damage(
        path, {CONFIG, MODEL, STATE}, lambda name: not for_resume and name.startswith("trainer_state/optimizer")
    )
    if found:
        return found
    if not _optimizer_files(path):
        return [f"{path / OPTIMIZER} is missing"]
    for read in (read_weights, read_state, _check_model):
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
        say(f"warning: checkpoint {folder} is damaged: {'; '.join(why)}")
        passed_over = True
    return None


def resolve(path: str, say: Callable[[str], None] | None = None, for_resume: bool = False) -> Path:
    """The folder of weights that a user means: a checkpoint, a run's newest good one, a Hugging Face model's.

    Tells `say` (default: standard error) of damaged ones passed over. Raises UserError that starts with the
    path, so that a caller can put its flag before it.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{path}: {what}; expected a checkpoint folder (step-…) or a run folder that holds some")
    if _is_checkpoint(folder):
        found = problems(folder, for_resume)
        if found:
            raise UserError(f"{path} is a damaged checkpoint: {'; '.join(found)}")
        return folder
    if (folder / CONFIG).is_file() and all(file.is_file() for file in weight_files(folder)) and not for_resume:
        return folder
    good = newest_good(folder, say or _tell, for_resume)
    if good is None:
        state = "all are damaged" if checkpoints(folder) else f"there is neither a step-… folder nor {MODEL} in it"
        raise UserError(f"{path} holds no usable checkpoint: {state}")
    return good


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, good or bad, or a run that has some."""
    return _is_checkpoint(folder) or bool(checkpoints(folder))


def _is_checkpoint(folder: Path) -> bool:
    return STEP_FOLDER.fullmatch(folder.name) is not None or (folder / STATE).parent.is_dir()


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
        elif name in ("step", "samples") and not 0 <= value < 2**62:
            mistakes.append(f"{path / STATE}: {name!r} is {str(value)[:40]}; expected 0 or more, below 2^62")
        elif isinstance(value, int | float) and name not in ("step", "samples") and not is_number(value):
            mistakes.append(f"{path / STATE}: {name!r} is {str(value)[:40]}; expected a number")
        elif name == "recent_losses" and not all(map(is_number, value)):
            mistakes.append(f"{path / STATE}: {name!r} is {str(value)[:40]}; expected numbers")
        elif name == "open_window" and not is_open_window(value):
            mistakes.append(f"{path / STATE}: {name!r} is {str(value)[:40]}; expected the sums of a log window")
    if mistakes:
        raise UserError(sorted(mistakes))
    return TrainerState(**{name: saved[name] for name in hints if name in saved})


def _check_model(path: Path) -> None:
    """Raise UserError if the model that a resumed run would build is not that of config.json."""
    theirs, saved = read_model_config(path), read_state(path).config.get("model", {})
    ours = from_dict(ModelConfig, saved) if isinstance(saved, dict) else ModelConfig()
    differs = [
        f"{name} {str(getattr(ours, name))[:40]} instead of {getattr(theirs, name)}"
        for name in MODEL_OF_A_CHECKPOINT
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if differs:
        raise UserError(f"{path / STATE} tells of another model than {CONFIG}: {', '.join(differs)}")


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
    """The weights under our names, memory-mapped (matrices as transposed views); raises UserError.

    Their sizes are those that config.json tells: a model built from it is no larger than the file.
    """
    config = read_model_config(path)
    found: dict[str, Tensor] = {}
    for file in weight_files(path):
        found |= read_tensors(file)
    weights = hf.from_hugging_face(found, config)
    expected = {
        "wte.weight": (config.vocabulary, config.d_model),
        "blocks.0.attn.c_attn.weight": (config.d_model + 2 * config.kv_heads * config.head_dim, config.d_model),
        "blocks.0.mlp.c_fc.weight": (config.hidden_dim, config.d_model),
    }
    if config.position == "learned":
        expected["wpe.weight"] = (config.seq_length, config.d_model)
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    mistakes = [f"{path / CONFIG} tells of {config.num_layers} layers; {MODEL} has {layers}"]
    mistakes = mistakes if layers != config.num_layers else []
    for name, shape in expected.items():
        got = tuple(weights[name].shape) if name in weights else None
        if got != shape:
            mistakes.append(f"{path / CONFIG} tells of a {name} of {shape}; that in {MODEL} is {got or 'missing'}")
    if mistakes:
        raise UserError(mistakes)
    return weights


def weight_files(path: Path) -> list[Path]:
    """The file of the weights, or, where Hugging Face has cut a large model up, those that its index names."""
    index = path / f"{MODEL}.index.json"
    if (path / MODEL).is_file() or not index.is_file():
        return [path / MODEL]
    names = files.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_plain(name) for name in names.values()):
        raise UserError(f"{index} names no files beside it")
    return [path / name for name in sorted(set(names.values()))]


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) is not None


def _optimizer_files(path: Path) -> list[Path]:
    return sorted((path / OPTIMIZER).parent.glob("*.safetensors"))


@torch.no_grad()
def load_optimizer(path: Path, targets: dict[str, Tensor]) -> None:
    """Copy the optimizer's state into `targets`, named as by `optim.named_state`, however many processes saved it.

    Raises UserError, before anything is copied, if the files are malformed or a tensor is missing or of another shape.
    """
    found = _optimizer_files(path)
    if not found:
        raise UserError(f"{path / OPTIMIZER} is missing")
    shares.load(found, targets)


def check_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise UserError naming every weight that is missing, unexpected or of another shape than the model's."""
    parameters = dict(model.named_parameters())  # tied ones once, under their first name
    mistakes = [f"weight {name} is missing" for name in parameters if name not in weights]
    for name, value in weights.items():
        if name not in parameters:
            mistakes.append(f"weight {name} is not in the model")
        elif value.shape != parameters[name].shape:
            expected, got = (" x ".join(map(str, shape)) or "scalar" for shape in (parameters[name].shape, value.shape))
            mistakes.append(f"weight {name} is {got}; the model's is {expected}")
    if mistakes:
        raise UserError(mistakes[:8] + ([f"and {len(mistakes) - 8} more"] if len(mistakes) > 8 else []))


def prune(run_dir: Path, keep: int, spare: Collection[Path] = ()) -> None:
    """Delete all checkpoints but those `to_keep` and those to `spare`. Call after a save."""
    saved = {folder: (files.save_number(folder), _step(folder), _valid_loss(folder)) for folder in checkpoints(run_dir)}
    for folder in saved.keys() - to_keep(saved, keep) - set(spare):
        files.delete_folder(folder)


def to_keep(saved: Mapping[Kept, tuple[int, int, float | None]], keep: int) -> set[Kept]:
    """Of checkpoints, given with (save number, step, validation loss), the `keep` last written and the best one.

    Last written, not highest step: after a fallback over a damaged checkpoint the new ones have lower steps than it.
    """
    by_age = sorted(saved, key=lambda one: saved[one][:2], reverse=True)
    losses = {one: loss for one in by_age if (loss := saved[one][2]) is not None}
    return {*by_age[: max(keep, 1)], *([min(losses, key=losses.__getitem__)] if losses else [])}


def _valid_loss(folder: Path) -> float | None:
    """The recorded validation loss, unless unreadable."""
    try:
        return read_state(folder).valid_loss
    except UserError:
        return None
