"""From a command line to a checked configuration: recipes, resume, the vocabulary of the data, all mistakes at once."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from gpt2_xla import checkpoint, cli, pretrained
from gpt2_xla.config import ENTRY_POINTS, DataConfig, PretrainConfig, RunConfig, TorchConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.train_dirs import parse_train_dirs
from gpt2_xla.errors import UserError
from gpt2_xla.profiling import profile_mistakes
from gpt2_xla.remote_checkpoints import newest_checkpoint, remote_mistakes
from gpt2_xla.remote_store import address_mistakes, redacted
from gpt2_xla.run_folder import await_others, contents
from gpt2_xla.saved_options import with_origin
from gpt2_xla.validation import config_mistakes

Config = TypeVar("Config", bound=PretrainConfig)
ASKED_ANEW = {"profile_steps": None, "resume": "auto"}  # saved options that a resume does not take over


@dataclass(frozen=True)
class Start(Generic[Config]):
    """What a training command asks for."""

    config: Config
    source: Path | None  # the checkpoint to continue, or the weights to begin with; None for a run from scratch
    seen: Mapping[str, int]  # what the run folder held when the source was chosen; see `run_folder.contents`


def pretrain_start(
    config_type: type[Config],
    argv: list[str],
    description: str,
    machine_mistakes: Callable[[Config], list[str]] = lambda _: [],
) -> Start[Config]:
    """The configuration of a training command, and the checkpoint that it continues from.

    Raises `UserError` with all mistakes of flags, recipe, saved configuration, data and machine together.
    """
    mistakes: list[str] = []
    parsed = cli.parse(config_type, argv, description, mistakes=mistakes, others=ENTRY_POINTS)
    try:
        source, seen = _begin(parsed, wait=not mistakes)
    except UserError as error:  # the data depends on the checkpoint; the options speak for themselves
        own = config_mistakes(parsed.config, parsed.explicit)
        raise UserError(list(dict.fromkeys([*mistakes, *error.mistakes, *own]))) from error
    weights = source if source is not None and not checkpoint.has_state(source) else None
    if weights is not None:
        parsed = _with_model_of(weights, parsed, config_type, argv, description, mistakes)
    elif source is not None:
        # The run's own options are the defaults now, so that --checkpoints-dir alone continues it.
        state = checkpoint.read_state(source)
        saved = cli.replace_fields(cli.from_dict(config_type, state.config), ASKED_ANEW)
        parsed = cli.parse(config_type, argv, description, base=saved, mistakes=[])
        mistakes += _model_conflicts(parsed.config, saved, source.name)
        mistakes += _optimizer_conflict(parsed.config, saved, source)
        parsed = dataclasses.replace(parsed, config=_with_folder(parsed, source))
        parsed = dataclasses.replace(parsed, config=_with_remote_dir(parsed, source))
        parsed = dataclasses.replace(parsed, config=_with_found_batch(parsed.config, saved, source))
        mistakes += [*_steps_mistakes(parsed.config, state.step), *profile_mistakes(parsed.config, state.step)]
    occupied = _folder_mistakes(parsed.config, source)
    mistakes += [*occupied, *_remote_mistakes(parsed.config, source)]
    config = parsed.config
    if config.run.do_test:  # the training data may be gone by then
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_dir=()))
    found = _manifests(config, mistakes, needed=not occupied)
    config = _with_vocabulary(config, found)
    if weights is not None:
        mistakes += _tokenizer_mistakes(config, weights, found)
    own = [*config_mistakes(config, parsed.explicit), *machine_mistakes(config)]
    mistakes += own if source is None or weights is not None else with_origin(own, config, parsed.explicit, source)
    if mistakes:
        raise UserError(list(dict.fromkeys(mistakes)))
    if source is not None and weights is None and not config.run.do_test:
        _say(f"resuming after step {state.step} of {config.run.train_steps} from {source}")
    return Start(config, source, seen)


def _with_model_of(
    weights: Path,
    parsed: cli.Parsed[Config],
    config_type: type[Config],
    argv: list[str],
    description: str,
    mistakes: list[str],
) -> cli.Parsed[Config]:
    """The command's configuration with the model of a Hugging Face folder; notes the flags that contradict it."""
    name = str(parsed.config.run.from_checkpoint)
    try:
        checkpoint.read_weights(weights)  # nothing is copied yet: a file that is none shows before anything slow
        theirs = checkpoint.read_model_config(weights)
        base = dataclasses.replace(config_type(), model=theirs)
        parsed = cli.parse(config_type, argv, description, base=base, mistakes=[])
        mistakes += _model_conflicts(parsed.config, base, name, ("seq_length", "vocab_size", "vocab_padding"))
        model = pretrained.fitted(parsed.config.model, theirs, parsed.explicit, name)
    except UserError as error:
        mistakes += [
            f"--from-checkpoint: {mistake}" if str(weights) in mistake else mistake for mistake in error.mistakes
        ]
        return parsed
    return dataclasses.replace(parsed, config=dataclasses.replace(parsed.config, model=model))


def _tokenizer_mistakes(config: PretrainConfig, weights: Path, found: list[tuple[str, Manifest]]) -> list[str]:
    try:
        known = checkpoint.read_model_config(weights).vocabulary
    except UserError:  # `_with_model_of` told of it
        return []
    try:
        name = f"--from-checkpoint {config.run.from_checkpoint}"
        return pretrained.tokenizer_mistakes(weights, known, found, name)
    except UserError as error:  # the checkpoint's own tokenizer can't be read
        return [mistake.replace("--tokenizer", "--from-checkpoint", 1) for mistake in error.mistakes]


def _begin(parsed: cli.Parsed[Config], wait: bool) -> tuple[Path | None, dict[str, int]]:
    """The checkpoint, or weights, to begin with, and what the run folder held when it was chosen.

    It is chosen when no other run holds the folder. A run that takes it later on, before this one does, alters what is there.
    """
    run, folder = parsed.config.run, _run_folder(parsed)
    if wait and not run.do_test:
        await_others(folder, _say)
    seen = contents(folder)
    source = _checkpoint_to_continue(parsed)
    if run.remote_dir is not None and source is not None and source.parent == folder:  # it may have been downloaded now
        seen |= {name: number for name, number in contents(folder).items() if name == source.name}
    return source, seen


def _run_folder(parsed: cli.Parsed[Config]) -> Path:
    """Where the run will write: what the command says, else beside the checkpoint that it gives."""
    run = parsed.config.run
    own = Path(run.checkpoints_dir)
    if run.from_checkpoint is None or "checkpoints_dir" in parsed.explicit:
        return own
    given = Path(run.from_checkpoint)
    if not checkpoint.is_ours(given):
        return own
    return given if checkpoint.checkpoints(given) else given.parent


def _checkpoint_to_continue(parsed: cli.Parsed[Config]) -> Path | None:
    """The checkpoint, or weights, that --resume, --from-checkpoint or --do-test asks for; None for a run from scratch."""
    run = parsed.config.run
    if mistakes := _address_mistakes(run):
        raise UserError(mistakes)
    folder = Path(run.checkpoints_dir)
    if run.from_checkpoint is not None:
        if run.resume == "must":
            raise UserError(
                "--resume must takes the newest checkpoint of --checkpoints-dir, --from-checkpoint a given one; use one of them"
            )
        continues = run.resume == "auto" and not run.do_test
        if continues and not Path(run.from_checkpoint).is_dir():  # a run that is under way needs the hub no more
            newest = newest_checkpoint(folder, run.remote_dir, _say)
            if newest is not None and _began_with(newest, run.from_checkpoint):
                return newest
        try:
            given = pretrained.find(run.from_checkpoint, _say, for_resume=True)
        except UserError as error:
            raise UserError([f"--from-checkpoint {mistake}" for mistake in error.mistakes]) from error
        newest = None
        if continues:
            own = folder if "checkpoints_dir" in parsed.explicit or not checkpoint.has_state(given) else given.parent
            newest = newest_checkpoint(own, run.remote_dir, _say)
        return newest if newest is not None and _began_with(newest, run.from_checkpoint) else given
    if run.resume == "never" and not run.do_test:
        return None
    newest = newest_checkpoint(folder, run.remote_dir, _say)
    if newest is None and (run.do_test or run.resume == "must"):
        flag = "--do-test" if run.do_test else "--resume must"
        raise UserError(f"{flag}: there is no good checkpoint in --checkpoints-dir {folder}")
    return newest


def _began_with(newest: Path, from_checkpoint: str) -> bool:
    """Whether the run that wrote checkpoint `newest` was begun with this --from-checkpoint."""
    origin = checkpoint.read_state(newest).config.get("run", {}).get("from_checkpoint")
    return origin is not None and Path(origin).resolve() == Path(from_checkpoint).resolve()


def _is_own(config: PretrainConfig, source: Path | None) -> bool:
    """Whether the run continues what is in its folder, and is no new one."""
    if source is None or not checkpoint.has_state(source):
        return False
    return source.parent.resolve() == Path(config.run.checkpoints_dir).resolve()


def _folder_mistakes(config: PretrainConfig, source: Path | None) -> list[str]:
    """What forbids a run to write into its folder: the checkpoints of another run, which it would prune."""
    folder = Path(config.run.checkpoints_dir)
    if _is_own(config, source) or config.run.do_test or not (existing := checkpoint.checkpoints(folder)):
        return []
    if source is None and config.run.resume == "auto":
        return [
            f"--checkpoints-dir {folder} holds checkpoints, {existing[0].name} the newest, but all are damaged; "
            "move them away to begin anew, or choose another folder"
        ]
    return [
        f"--checkpoints-dir {folder} already holds {existing[0].name} of another run; "
        f"{_in_the_way(source)} to continue that one, or choose another folder"
    ]


def _in_the_way(source: Path | None) -> str:
    """The flag that makes this another run than the one that is there already."""
    return "leave --resume never out" if source is None else "leave --from-checkpoint out"


def _address_mistakes(run: RunConfig) -> list[str]:
    """An address where a folder belongs, or the other way round."""
    mistakes = []
    if "://" in run.checkpoints_dir:
        mistakes.append(
            f"--checkpoints-dir {redacted(run.checkpoints_dir)} is an address; checkpoints are written to a local folder "
            "first: give one, and the address as --remote-dir beside it"
        )
    if run.remote_dir is not None:
        mistakes += [f"--remote-dir {mistake}" for mistake in address_mistakes(run.remote_dir)]
    return mistakes


def _remote_mistakes(config: PretrainConfig, source: Path | None) -> list[str]:
    """What forbids to copy checkpoints to --remote-dir. Only the process that will do so tries it."""
    run = config.run
    if run.remote_dir is None or run.do_test or os.environ.get("RANK", "0") != "0":
        return []
    return remote_mistakes(run.remote_dir, None if _is_own(config, source) else _in_the_way(source))


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
    """The configuration, writing where the command says, else beside the checkpoint found."""
    if "checkpoints_dir" in parsed.explicit:
        return parsed.config
    run = dataclasses.replace(parsed.config.run, checkpoints_dir=str(source.parent))
    return dataclasses.replace(parsed.config, run=run)


def _with_remote_dir(parsed: cli.Parsed[Config], source: Path) -> Config:
    """The configuration without the remote folder of the checkpoint's run, unless it is this run's own."""
    if "remote_dir" in parsed.explicit or _is_own(parsed.config, source):
        return parsed.config
    return dataclasses.replace(parsed.config, run=dataclasses.replace(parsed.config.run, remote_dir=None))


def _with_found_batch(config: Config, saved: PretrainConfig, source: Path) -> Config:
    """The configuration with what --find-batch found when the run began, unless its steps shall see other batches now."""
    runtime, data = config.runtime, saved.data
    if not (isinstance(runtime, TorchConfig) and runtime.find_batch and _is_own(config, source)):
        return config
    if _sequences(config.data) != _sequences(data):
        return config
    found = {"train_batch_size": data.train_batch_size, "gradient_accum_step": data.gradient_accum_step}
    return cli.replace_fields(config, {**found, "find_batch": False})


def _sequences(data: DataConfig) -> str | int:
    """What says how many sequences a step sees."""
    return data.batch_size_schedule or data.train_batch_size * data.gradient_accum_step


def _model_conflicts(config: PretrainConfig, saved: PretrainConfig, name: str, free: Sequence[str] = ()) -> list[str]:
    """One sentence for each model option that differs from the checkpoint's; those that may are `free`."""
    same = {"dropout", *free}  # dropout is not a property of the weights
    # Defaults, spelled out.
    if config.model.hidden_dim == saved.model.hidden_dim:
        same.add("d_ff")
    if config.model.kv_heads == saved.model.kv_heads:
        same.add("num_kv_heads")
    return [
        f"--{field.name.replace('_', '-')} {_shown(ours)} conflicts with {name}, which has {_shown(theirs)}; "
        "leave the flag out"
        for field in dataclasses.fields(saved.model)
        if (ours := getattr(config.model, field.name)) != (theirs := getattr(saved.model, field.name))
        and field.name not in same
    ]


def _optimizer_conflict(config: PretrainConfig, saved: PretrainConfig, source: Path) -> list[str]:
    """Muon's state is not Adam's; that of adam and adamw is one and the same."""
    ours, theirs = config.optim.optim_type, saved.optim.optim_type
    if config.run.do_test or (ours == "muon") == (theirs == "muon"):
        return []
    return [
        f"--optim-type {ours} conflicts with {source.name}, which has {theirs}: their states are different; leave the flag out"
    ]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "the default" if value is None else str(value)


def _manifests(config: PretrainConfig, mistakes: list[str], needed: bool) -> list[tuple[str, Manifest]]:
    """All manifests, each with the flag and folder that it belongs to; notes what is wrong with them.

    That none is given is no mistake of its own unless `needed`: the run that is in the folder already knows its data.
    """
    found: list[tuple[str, Manifest]] = []
    for flag, folder in _data_folders(config, mistakes, needed):
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
    return found


def _with_vocabulary(config: Config, found: list[tuple[str, Manifest]]) -> Config:
    """The configuration with the vocabulary size of the data's tokenizer, if none is given."""
    if config.model.vocab_size is not None:
        return config
    sizes = [m.vocab_size for _, m in found if m.vocab_size]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=max(sizes, default=None)))


def _data_folders(config: PretrainConfig, mistakes: list[str], needed: bool) -> list[tuple[str, Path]]:
    """The folders that the options name, each with its flag; notes what is wrong with the options."""
    folders: list[tuple[str, Path]] = []
    try:
        folders += [("--train-dir", one.folder) for one in parse_train_dirs(config.data.train_dir)]
    except UserError as error:
        mistakes += error.mistakes
    if config.data.valid_dir is not None:
        folders.append(("--valid-dir", Path(config.data.valid_dir)))
    flag, given = (
        ("--valid-dir", config.data.valid_dir) if config.run.do_test else ("--train-dir", config.data.train_dir)
    )
    if needed and not given:
        mistakes.append(f"{flag} is missing: a folder of token shards, for example from python scripts/prepare_text.py")
    return folders
