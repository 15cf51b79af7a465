"""Models to start from or to evaluate: a run of ours, a Hugging Face folder, a name on the hub."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from gpt2_xla import checkpoint
from gpt2_xla.config import ModelConfig
from gpt2_xla.data.inputs import network_errors
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer

# OpenAI's models were moved on the hub; older caches hold them under the short names.
MOVED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
WANTED = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
ANSWER_SECONDS = 10  # for the hub to answer at all


def find(name: str, say: Callable[[str], None] | None = None, for_resume: bool = False) -> Path:
    """The folder of weights that a user means; a name on the hub is downloaded, or found in Hugging Face's cache.

    Of a run of ours it is the newest good checkpoint (see `checkpoint.resolve`). Raises UserError that starts with the name.
    """
    folder = Path(name)
    in_a_folder = folder.parent != Path() and folder.parent.is_dir()  # a mistyped runs/NAME is no name on the hub
    if not folder.exists() and not in_a_folder and HUB_NAME.fullmatch(name):
        return _with_weights(_downloaded(name), name)
    if folder.is_dir() and not checkpoint.is_ours(folder) and any((folder / file).exists() for file in _traces(folder)):
        return _with_weights(folder, name)
    return checkpoint.resolve(name, say, for_resume)


def find_model(name: str) -> tuple[Path, ModelConfig]:
    """The same for --model, which the sentences name; and the model that the folder's configuration tells of."""
    try:
        folder = find(name)
        return folder, checkpoint.read_model_config(folder)
    except UserError as error:
        raise UserError([f"--model {mistake}" for mistake in error.mistakes]) from error


def _traces(folder: Path) -> list[str]:
    """Files by which a folder is meant to be a Hugging Face model, be it one that can't be read."""
    return [checkpoint.CONFIG, checkpoint.MODEL, *(path.name for path in _pickles(folder))]


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))


def _with_weights(folder: Path, name: str) -> Path:
    """The folder, if it holds a configuration and weights that can be read; raises UserError that says what is missing."""
    missing = [file.name for file in checkpoint.weight_files(folder) if not file.is_file()]
    if missing and (pickles := _pickles(folder)):
        raise UserError(_pickle_sentence(name, pickles[0].name))
    if missing:
        raise UserError(f"{name} has no weights: there is no {missing[0]} in {folder}")
    if not (folder / checkpoint.CONFIG).is_file():
        raise UserError(f"{name} has no {checkpoint.CONFIG}, which tells the model's sizes, in {folder}")
    return folder


def _pickle_sentence(name: str, file: str) -> str:
    target = f"{name.rstrip('/').rsplit('/', 1)[-1]}-safetensors"
    command = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{name}').save_pretrained('{target}')"
    )
    return (
        f"{name} has its weights in {file} alone, a pickle, which can run any program when it is read; if you trust it, "
        f'convert it with: python -c "{command}" and give the folder {target}'
    )


def _downloaded(name: str) -> Path:
    """The local copy of a model of the hub: its configuration, safetensors and tokenizer, nothing else."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    host = constants.ENDPOINT.removeprefix("https://")
    failures: tuple[type[Exception], ...] = (
        *network_errors(),
        ValueError,
    )  # ValueError: no name that the hub could have
    names = [MOVED[name], name] if name in MOVED else [name]
    for repository in names:
        try:
            folder = Path(
                snapshot_download(repository, allow_patterns=[*WANTED, *TOKENIZER_FILES], etag_timeout=ANSWER_SECONDS)
            )
        except RepositoryNotFoundError as error:
            raise UserError(
                f"{name} is no folder here and no model on {host}, or a private one; give its name there or a local folder"
            ) from error
        except LocalEntryNotFoundError as error:
            reason = _reason(error)
        except failures as error:
            reason = _reason(error)
            break
        else:
            if file := _only_pickled(repository, folder):
                raise UserError(_pickle_sentence(name, file))
            return folder
    raise UserError(
        f"{name} is no folder here, and it can't be fetched from {host} ({reason}); check the name and the network, or "
        "download the model elsewhere and give its local folder"
    )


def _reason(error: Exception) -> str:
    if "HF_HUB_OFFLINE" in f"{error}":
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    lines = f"{error}".splitlines()
    return lines[0].removeprefix("Got: ")[:160] if lines else type(error).__name__


def _only_pickled(repository: str, folder: Path) -> str | None:
    """The hub's pickled weights of a model that has no safetensors; None where it has, or the hub does not say."""
    if any(folder.glob("*.safetensors")):
        return None
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repository)
    except network_errors():
        return None
    return next((name for name in names if name.endswith(".bin") and name.startswith("pytorch_model")), None)


def fitted(asked: ModelConfig, theirs: ModelConfig, explicit: Collection[str], name: str) -> ModelConfig:
    """The model of a run that begins with weights of the model `theirs`: a shorter context, a padded vocabulary.

    `asked` is theirs with the command's own options, which `explicit` names. Raises UserError for a longer context and a
    smaller vocabulary; all other differences are the caller's to find.
    """
    mistakes = []
    if asked.seq_length > theirs.seq_length:
        mistakes.append(
            f"--seq-length {asked.seq_length} is more than the {theirs.seq_length} positions of {name}; "
            f"use --seq-length {theirs.seq_length} or less"
        )
    padding = asked.vocabulary - theirs.vocabulary
    if padding < 0:
        mistakes.append(
            f"--vocab-size {asked.vocabulary} is less than the {theirs.vocabulary} tokens of {name}; leave the flag out, "
            f"or pad with more"
        )
    elif "vocab_padding" in explicit and asked.vocab_padding != padding:
        mistakes.append(
            f"--vocab-padding {asked.vocab_padding} conflicts with {name}, whose {theirs.vocabulary} tokens leave {padding} "
            f"of --vocab-size {asked.vocabulary}; leave the flag out"
        )
    if mistakes:
        raise UserError(mistakes)
    return dataclasses.replace(asked, vocab_padding=padding)


def tokenizer_mistakes(folder: Path, known: int, found: Iterable[tuple[str, Manifest]], name: str) -> list[str]:
    """Data whose tokens mean other text to the model of `folder`, which knows `known` ids; `found` names each manifest.

    Vocabularies are compared id by id, so that tiktoken's gpt2 and Hugging Face's are one. What names no tokenizer passes.
    """
    mistakes = []
    theirs = load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None
    for where, manifest in found:
        if manifest.vocab_size is not None and manifest.vocab_size > known:
            mistakes.append(
                f"{where} was prepared with the tokenizer {manifest.tokenizer}, which has {manifest.vocab_size} ids, but "
                f"{name} knows {known}; prepare it with the model's tokenizer"
            )
        elif theirs is not None and manifest.tokenizer is not None and theirs.hash != manifest.tokenizer_hash:
            try:
                difference = _first_difference(theirs, load_tokenizer(manifest.tokenizer))
            except UserError:  # it is no longer where it was: what is left to compare are the sizes
                difference = None
            if difference is not None:
                mistakes.append(
                    f"{where} was prepared with the tokenizer {manifest.tokenizer}, which is not that of {name}: "
                    f"{difference}; prepare it with --tokenizer {folder}"
                )
    return mistakes


def _first_difference(theirs: Tokenizer, ours: Tokenizer) -> str | None:
    """Where the data's vocabulary, `ours`, is not the beginning of the model's."""
    for token in range(ours.vocab_size):
        in_theirs = theirs.decode_bytes([token]) if token < theirs.vocab_size else None
        if (in_ours := ours.decode_bytes([token])) != in_theirs:
            return f"id {token} is {_shown(in_ours)} in the data and {_shown(in_theirs)} in the model"
    return None


def _shown(text: bytes | None) -> str:
    return "nothing" if text is None else repr(text.decode(errors="replace")[:40])
