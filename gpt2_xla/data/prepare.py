"""Both commands that prepare data: their options become one Job, which gpt2_xla.data.pipeline runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gpt2_xla.data import hub
from gpt2_xla.data.encoder import can_cut
from gpt2_xla.data.inputs import describe, text_inputs
from gpt2_xla.data.output import check_published, claim, clear_os_errors, remove, work_folder
from gpt2_xla.data.pipeline import Config, Job, identity, make, print_plan
from gpt2_xla.data.prepare_report import report
from gpt2_xla.data.units import Columns, plan_units
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import FinewebConfig, PrepareConfig
from gpt2_xla.tokenizer import load_tokenizer

Value = TypeVar("Value")


def prepare_text(config: PrepareConfig) -> None:
    """Prepare pydoc, stdlib, files and folders. valid/ is the last --valid-fraction of the token stream.

    Raises UserError for mistakes in the options, the sources and the output folder, and if nothing can be written.
    """
    mistakes = _number_mistakes(config)
    if not 0 <= config.valid_fraction < 1:
        mistakes.append(f"--valid-fraction {config.valid_fraction} must be at least 0 and below 1")
    if not config.source:
        mistakes.append("--source needs at least one of pydoc, stdlib, a file or a folder")
    tokenizer = _attempt(mistakes, lambda: load_tokenizer(config.tokenizer))
    files = _attempt(mistakes, lambda: text_inputs(config.source))
    if mistakes or tokenizer is None or files is None:
        raise UserError(mistakes)
    columns = Columns(config.text_column, whole_documents=config.dedup != "no" or not can_cut(tokenizer))
    source = tuple(describe(source) for source in config.source)
    _prepare(Job(config, "prepare_text.py", source, files, tokenizer, columns))


def prepare_fineweb(config: FinewebConfig) -> None:
    """Prepare FineWeb or a dataset of its schema. valid/ is whole documents, chosen by the hash of their ids.

    Raises UserError for mistakes in the options, the dataset and the output folder, without network, and if nothing can be
    written.
    """
    mistakes = _number_mistakes(config)
    if config.valid_tokens < 0:
        mistakes.append(f"--valid-tokens {config.valid_tokens} must be 0 or more")
    if not 2**-64 <= config.valid_share < 1:
        mistakes.append(f"--valid-share {config.valid_share} must be above 0 and below 1")
    tokenizer = _attempt(mistakes, lambda: load_tokenizer(config.tokenizer))
    # Asking the hub may take long, so only for a command that is right otherwise.
    files = _attempt(mistakes, lambda: hub.dataset_inputs(config)) if not mistakes else None
    if mistakes or tokenizer is None or files is None:
        raise UserError(mistakes)
    dataset = hub.dataset_name(config)
    is_path = "://" in dataset or Path(dataset).exists()
    source = (dataset,) if is_path else (f"{dataset} {config.name} {config.split}",)
    columns = Columns(config.text_column, config.id_column, config.streaming, config.cache_dir)
    _prepare(Job(config, "prepare_fineweb.py", source, files, tokenizer, columns))


def _number_mistakes(config: Config) -> list[str]:
    mistakes = []
    if config.shard_size < 1:
        mistakes.append(f"--shard-size {config.shard_size} must be 1 or more tokens")
    if config.num_workers is not None and config.num_workers < 1:
        mistakes.append(f"--num-workers {config.num_workers} must be 1 or more")
    return mistakes


def _attempt(mistakes: list[str], make: Callable[[], Value]) -> Value | None:
    """What `make` returns; None, and its mistakes on the list, if it raises UserError."""
    try:
        return make()
    except UserError as error:
        mistakes += error.mistakes
        return None


def _prepare(job: Job) -> None:
    expected = {"tokenizer_hash": job.tokenizer.hash, "command": job.command, "source": list(job.source)}
    with clear_os_errors(job.output_dir):
        splits = {"train", "valid"} if job.has_valid else {"train"}
        published = check_published(job.output_dir, expected, job.inputs)
        if published == splits:
            print(f"{job.output_dir} already holds this data; delete the folder to prepare it again")
            _forget_work(job)
        else:
            plan = plan_units(job.files, job.columns, job.config.skip_bad_files)
            plan = replace(plan, download=hub.bytes_to_download(job.files, job.columns))
            print_plan(job, plan)
            if job.config.dry_run:
                return
            with work_folder(job.output_dir) as work:
                claim(work, identity(job))
                make(job, plan, work)
    report(job.output_dir)


def _forget_work(job: Job) -> None:
    """A run that was killed at its very end leaves its folder."""
    if not job.config.dry_run and (job.output_dir / ".preparing").exists():
        with work_folder(job.output_dir) as work:
            remove(work)
