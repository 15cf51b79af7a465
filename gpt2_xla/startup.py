"""From a command line to a checked configuration: recipes, resume, the vocabulary of the data, all mistakes at once."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gpt2_xla import checkpoint, cli
from gpt2_xla.config import PretrainConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.train_dirs import parse_train_dirs
from gpt2_xla.errors import UserError
from gpt2_xla.profiling import profile_mistakes
from gpt2_xla.validation import config_mistakes

Config = TypeVar("Config", bound=PretrainConfig)
ASKED_ANEW = {"profile_steps": None}  # saved options that --resume does not take over


def pretrain_config(
    config_type: type[Config],
    argv: list[str],
    description: str,
    machine_mistakes: Callable[[Config], list[str]] = lambda _: [],
) -> Config:
    """The configuration of a training command; `run.from_checkpoint` names the checkpoint to continue from, or is None.

    Raises `UserError` with all mistakes of flags, recipe, saved configuration, data and machine together.
    """
    mistakes: list[str] = []
    parsed = cli.parse(config_type, argv, description, mistakes=mistakes)
    try:
        source = _checkpoint_to_continue(parsed)
    except UserError as error:  # what follows depends on the checkpoint
        raise UserError([*mistakes, *error.mistakes]) from error
    if source is not None:
        # The run's own options are the defaults now, so that --resume alone continues it.
        state = checkpoint.read_state(source)
        saved = cli.replace_fields(cli.from_dict(config_type, state.config), ASKED_ANEW)
        parsed = cli.parse(config_type, argv, description, base=saved, mistakes=[])
        mistakes += _model_conflicts(parsed.config, saved, source)
        parsed = dataclasses.replace(parsed, config=_with_folder(parsed, source))
        mistakes += [*_steps_mistakes(parsed.config, state.step), *profile_mistakes(parsed.config, state.step)]
    mistakes += _folder_mistakes(parsed.config, source)
    config = _with_vocabulary(parsed.config, mistakes)
    mistakes += [*config_mistakes(config, parsed.explicit), *machine_mistakes(config)]
    if mistakes:
        raise UserError(list(dict.fromkeys(mistakes)))
    return config


def _checkpoint_to_continue(parsed: cli.Parsed[Config]) -> Path | None:
    """The checkpoint that --from-checkpoint, --resume or --do-test asks for; None for a new run."""
    run = parsed.config.run
    if run.from_checkpoint is not None:
        if run.resume:
            raise UserError(
                "--resume takes the newest checkpoint of --checkpoints-dir, --from-checkpoint a given one; use one of them"
            )
        try:
            return checkpoint.resolve(run.from_checkpoint, _say, for_resume=True)
        except UserError as error:
            raise UserError([f"--from-checkpoint {mistake}" for mistake in error.mistakes]) from error
    folder = Path(run.checkpoints_dir)
    if run.resume or run.do_test:
        newest = checkpoint.newest_good(folder, _say)
        if newest is None:
            flag = "--resume" if run.resume else "--do-test"
            raise UserError(f"{flag}: there is no good checkpoint in --checkpoints-dir {folder}")
        return newest
    return None


def _folder_mistakes(config: PretrainConfig, source: Path | None) -> list[str]:
    """What forbids a run to write into its folder: the checkpoints of another run, which it would prune."""
    folder = Path(config.run.checkpoints_dir)
    own = source is not None and source.parent.resolve() == folder.resolve()
    if own or config.run.do_test or not (existing := checkpoint.checkpoints(folder)):
        return []
    return [
        f"--checkpoints-dir {folder} already holds {existing[0].name} of another run; "
        "add --resume to continue it, or choose another folder"
    ]


def _steps_mistakes(config: PretrainConfig, done: int) -> list[str]:
    """A run that would end before it starts."""
    if config.run.do_test or config.run.train_steps >= done:
        return []
    return [f"--train-steps {config.run.train_steps} is below the {done} steps that the checkpoint has done; raise it"]


def _say(text: str) -> None:
    """Print once, not once per process of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _with_folder(parsed: cli.Parsed[Config], source: Path) -> Config:
    """The configuration with the checkpoint found, writing where the command says, else beside the checkpoint."""
    run = dataclasses.replace(parsed.config.run, from_checkpoint=str(source))
    if "checkpoints_dir" not in parsed.explicit:
        run = dataclasses.replace(run, checkpoints_dir=str(source.parent))
    return dataclasses.replace(parsed.config, run=run)


def _model_conflicts(config: PretrainConfig, saved: PretrainConfig, source: Path) -> list[str]:
    """One sentence for each model option that differs from the checkpoint's."""
    same = {"dropout"}  # not a property of the weights
    if config.model.hidden_dim == saved.model.hidden_dim:
        same.add("d_ff")  # the default, spelled out
    return [
        f"--{field.name.replace('_', '-')} {_shown(ours)} conflicts with {source.name}, which has {_shown(theirs)}; "
        "leave the flag out"
        for field in dataclasses.fields(saved.model)
        if (ours := getattr(config.model, field.name)) != (theirs := getattr(saved.model, field.name))
        and field.name not in same
    ]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "the default" if value is None else str(value)


def _with_vocabulary(config: Config, mistakes: list[str]) -> Config:
    """Read all manifests, note what is wrong with them, and take the vocabulary size from the tokenizer if none is given."""
    if config.run.do_test:  # the training data may be gone by then
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_dir=()))
    found: list[tuple[str, Manifest]] = []
    for flag, folder in _data_folders(config, mistakes):
        try:
            found.append((f"{flag} {folder}", manifests.read(folder)))
        except UserError as error:
            mistakes += [f"{flag}: {mistake}" for mistake in error.mistakes]
    # The first folder of each tokenizer; one without a manifest may be of any.
    tokenizers = {m.tokenizer_hash: (where, m.tokenizer) for where, m in reversed(found) if m.tokenizer_hash}
    if len(tokenizers) > 1:
        folders, names = zip(*reversed(tokenizers.values()), strict=True)
        mistakes.append(
            f"{' and '.join(folders)} were prepared with different tokenizers: {' and '.join(map(str, names))}; "
            "prepare them with one"
        )
    if config.model.vocab_size is not None:
        return config
    sizes = [m.vocab_size for _, m in found if m.vocab_size]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=max(sizes, default=None)))


def _data_folders(config: PretrainConfig, mistakes: list[str]) -> list[tuple[str, Path]]:
    """The folders that the options name, each with its flag; notes what is wrong with the options."""
    folders: list[tuple[str, Path]] = []
    try:
        folders += [("--train-dir", one.folder) for one in parse_train_dirs(config.data.train_dir)]
    except UserError as error:
        mistakes += error.mistakes
    if config.data.valid_dir is not None:
        folders.append(("--valid-dir", Path(config.data.valid_dir)))
    needed, given = (
        ("--valid-dir", config.data.valid_dir) if config.run.do_test else ("--train-dir", config.data.train_dir)
    )
    if not given:
        mistakes.append(
            f"{needed} is missing: a folder of token shards, for example from python scripts/prepare_text.py"
        )
    return folders
