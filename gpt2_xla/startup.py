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
from gpt2_xla.errors import UserError
from gpt2_xla.validation import config_mistakes

Config = TypeVar("Config", bound=PretrainConfig)


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
        saved = cli.from_dict(config_type, state.config)
        parsed = cli.parse(config_type, argv, description, base=saved, mistakes=[])
        mistakes += _model_conflicts(parsed.config, saved, source)
        parsed = dataclasses.replace(parsed, config=_with_folder(parsed, source))
        mistakes += _steps_mistakes(parsed.config, state.step)
    mistakes += _folder_mistakes(parsed.config, source)
    config = _with_vocabulary(parsed.config, mistakes)
    mistakes += [*config_mistakes(config), *machine_mistakes(config)]
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
    """Read both manifests, note what is wrong with them, and take the vocabulary size from the tokenizer if none is given."""
    found: dict[str, Manifest] = {}
    run_trains = not config.run.do_test
    if not run_trains:  # the training data may be gone by then
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_dir=None))
    for flag, folder, needed in (
        ("--train-dir", config.data.train_dir, run_trains),
        ("--valid-dir", config.data.valid_dir, not run_trains),
    ):
        if folder is None:
            if needed:
                mistakes.append(
                    f"{flag} is missing: a folder of token shards, for example from python scripts/prepare_text.py"
                )
            continue
        try:
            found[flag] = manifests.read(Path(folder))
        except UserError as error:
            mistakes += [f"{flag}: {mistake}" for mistake in error.mistakes]
    hashes = {m.tokenizer_hash for m in found.values() if m.tokenizer_hash}
    if len(hashes) > 1:
        names = " and ".join(str(m.tokenizer) for m in found.values())
        mistakes.append(
            f"--train-dir and --valid-dir were prepared with different tokenizers: {names}; prepare them together"
        )
    if config.model.vocab_size is not None:
        return config
    sizes = [m.vocab_size for m in found.values() if m.vocab_size]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=max(sizes, default=None)))
