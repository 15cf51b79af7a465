"""scripts/evaluate.py's work: the loss of several models on the same tokens, and their answers to the same questions."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpt2_xla import checkpoint, pretrained
from gpt2_xla.config import ModelConfig, TorchConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.data_mistakes import valid_data_mistakes
from gpt2_xla.data.loader import TokenWindows, evaluation_batches, predicted_tokens
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.errors import UserError, attempt
from gpt2_xla.evaluate import bits_per_byte, evaluate
from gpt2_xla.generation import load_model, recorded_tokenizer
from gpt2_xla.model import parameter_count
from gpt2_xla.multiple_choice import Question, evaluate_choices, hellaswag_from_hub, read_hellaswag
from gpt2_xla.runtime.process_mesh import world_size
from gpt2_xla.runtime.rendezvous import environment_mistakes
from gpt2_xla.runtime.torch_runtime import TorchRuntime, device_mistakes
from gpt2_xla.script_config import EvaluateConfig
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer

LOSS_CHUNK = 2048  # tokens whose float32 logits are held at a time


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, not loaded yet."""

    name: str
    folder: Path
    model: ModelConfig
    context: int  # T
    tokenizer: Tokenizer | None  # where there are questions


@dataclass(frozen=True)
class LossRow:
    """A line of the table of losses."""

    model: str
    parameters: int
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    standard_error: float | None  # of the loss


@dataclass(frozen=True)
class ChoiceRow:
    """A line of the table of answers."""

    model: str
    parameters: int
    acc: float
    acc_norm: float
    acc_bytes: float
    standard_error: float  # of acc_norm
    questions: int


def run(config: EvaluateConfig) -> None:
    """Evaluate, and print the tables; raises UserError with all mistakes together, before any weights are read."""
    torch_config = TorchConfig(device=config.device, mixed_precision=config.mixed_precision)
    mistakes = environment_mistakes(os.environ) or [*_option_mistakes(config), *device_mistakes(torch_config)]
    data = attempt(lambda: _open_data(str(config.data)), mistakes) if config.data is not None else None
    questions = attempt(lambda: _questions(config), mistakes) if config.task is not None else None
    candidates = [attempt(lambda name=name: _candidate(name, config, data), mistakes) for name in config.model]  # type: ignore[misc]
    if mistakes:
        raise UserError(list(dict.fromkeys(mistakes)))
    runtime = TorchRuntime(torch_config)
    try:
        losses, answers = [], []
        for candidate in candidates:
            assert candidate is not None
            loss, answer = _evaluate(candidate, config, runtime, data, questions)
            losses += loss
            answers += answer
    finally:
        runtime.close()
    if runtime.rank == 0:
        print(_as_json(config, losses, answers) if config.json else _as_tables(losses, answers))


def _option_mistakes(config: EvaluateConfig) -> list[str]:
    """The mistakes that the options alone show."""
    numbers = {
        "--eval-batch-size": config.eval_batch_size,
        "--valid-steps": config.valid_steps,
        "--seq-length": config.seq_length,
        "--limit": config.limit,
    }
    mistakes = [
        f"{flag} {value} must be at least 1" for flag, value in numbers.items() if value is not None and value < 1
    ]
    if not config.model:
        mistakes.append("--model names no model")
    if config.data is None and config.task is None:
        mistakes.append("nothing to measure: give --data DIR, token shards, or --task hellaswag, or both")
    mistakes += [
        f"{flag} belongs to --task; add --task hellaswag, or leave it out"
        for flag, value in (("--file", config.file), ("--limit", config.limit))
        if value is not None and config.task is None
    ]
    if world_size() > 1 and config.task is not None:
        mistakes.append(f"--task runs in one process, not in {world_size()}; start it without torchrun")
    if config.eval_batch_size % world_size():
        mistakes.append(f"--eval-batch-size {config.eval_batch_size} is not divisible by the {world_size()} processes")
    return mistakes


def _open_data(name: str) -> tuple[Path, Manifest]:
    """The folder of shards that --data means, and its manifest."""
    folder = Path(name)
    if not (folder / manifests.FILE_NAME).exists() and (folder / "valid" / manifests.FILE_NAME).exists():
        folder = folder / "valid"
    try:
        manifest = manifests.read(folder)
        manifests.verify(folder, manifest, full=False)
    except UserError as error:
        raise UserError([f"--data: {mistake}" for mistake in error.mistakes]) from error
    return folder, manifest


def _questions(config: EvaluateConfig) -> list[Question]:
    return read_hellaswag(Path(config.file), config.limit) if config.file else hellaswag_from_hub(config.limit)


def _candidate(name: str, config: EvaluateConfig, data: tuple[Path, Manifest] | None) -> Candidate:
    """Find a model and check that it can be asked; raises UserError with all that is wrong."""
    (folder, model), mistakes = pretrained.find_model(name), []
    if config.seq_length is not None and config.seq_length > model.seq_length:
        mistakes.append(
            f"--seq-length {config.seq_length} is more than the {model.seq_length} positions of --model {name}"
        )
    if data is not None:
        where, label = f"--data {data[0]}", f"--model {name}"
        other = pretrained.tokenizer_mistakes(folder, model.tokens_known, [(where, data[1])], label)
        mistakes += other or _trained_on_other_tokens(folder, data[1], where, label)
        mistakes += valid_data_mistakes(data[0], data[1], flag="--data")
    tokenizer = None
    if config.task is not None:
        tokenizer = attempt(
            lambda: load_tokenizer(config.tokenizer) if config.tokenizer else recorded_tokenizer(folder), mistakes
        )
        if tokenizer is not None and tokenizer.vocab_size > model.tokens_known:
            mistakes.append(
                f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but --model {name} knows {model.tokens_known}"
            )
    if mistakes:
        raise UserError(mistakes)
    return Candidate(name, folder, model, config.seq_length or model.seq_length, tokenizer)


def _trained_on_other_tokens(folder: Path, manifest: Manifest, where: str, label: str) -> list[str]:
    """The mistake of measuring one of our runs on data of another tokenizer than its training data's."""
    if not checkpoint.has_state(folder) or (folder / "tokenizer.json").is_file():
        return []
    state = checkpoint.read_state(folder)
    if not state.tokenizer_hash or not manifest.tokenizer_hash or state.tokenizer_hash == manifest.tokenizer_hash:
        return []
    return [
        f"{label} was trained on tokens of {state.tokenizer}, but {where} was prepared with {manifest.tokenizer}; "
        "prepare it with the model's tokenizer"
    ]


def _evaluate(
    candidate: Candidate,
    config: EvaluateConfig,
    runtime: TorchRuntime,
    data: tuple[Path, Manifest] | None,
    questions: Sequence[Question] | None,
) -> tuple[list[LossRow], list[ChoiceRow]]:
    """The lines of one model, which is in memory during this call only."""
    if runtime.rank == 0:
        print(f"evaluating {candidate.name} ({candidate.folder})", file=sys.stderr, flush=True)
    model = load_model(candidate.folder, runtime.device)
    model.loss_chunk = LOSS_CHUNK
    forward, parameters = runtime.place(model), parameter_count(model)
    losses, answers = [], []
    if data is not None:
        windows = TokenWindows(data[0], data[1], candidate.context)
        batches = evaluation_batches(
            windows,
            steps=config.valid_steps,
            batch_size=config.eval_batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            vocab_size=candidate.model.tokens_known,
        )
        tokens = predicted_tokens(windows, config.eval_batch_size, config.valid_steps)
        found = evaluate(forward, batches, runtime, tokens)
        assert found is not None
        bits = bits_per_byte(found.loss, data[1])
        losses.append(
            LossRow(candidate.name, parameters, found.loss, found.perplexity, bits, tokens, found.standard_error)
        )
    if questions is not None and candidate.tokenizer is not None:
        batch_tokens = config.eval_batch_size * candidate.context
        with runtime.autocast():
            result = evaluate_choices(
                model, candidate.tokenizer, questions, candidate.context, batch_tokens, _to(runtime.device)
            )
        answers.append(ChoiceRow(candidate.name, parameters, **asdict(result)))
    return losses, answers


def _to(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(device)


def _as_json(config: EvaluateConfig, losses: Sequence[LossRow], answers: Sequence[ChoiceRow]) -> str:
    tables: dict[str, object] = {}
    if losses:
        tables |= {"data": config.data, "losses": [asdict(row) for row in losses]}
    if answers:
        tables |= {"task": config.task, "answers": [asdict(row) for row in answers]}
    return json.dumps(tables, indent=2)


def _as_tables(losses: Sequence[LossRow], answers: Sequence[ChoiceRow]) -> str:
    """Markdown, aligned to be read as it is."""
    tables = []
    if losses:
        rows = [["model", "parameters", "loss", "± ", "PPL", "bits per byte", "tokens"]]
        rows += [
            [
                row.model,
                f"{row.parameters:,}",
                f"{row.loss:.4f}",
                "–" if row.standard_error is None else f"{row.standard_error:.4f}",
                f"{row.perplexity:.2f}",
                "–" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
                f"{row.tokens:,}",
            ]
            for row in losses
        ]
        tables.append(_table(rows))
    if answers:
        rows = [["model", "parameters", "acc", "acc_norm", "± ", "acc_bytes", "questions"]]
        rows += [
            [
                row.model,
                f"{row.parameters:,}",
                f"{row.acc:.4f}",
                f"{row.acc_norm:.4f}",
                f"{row.standard_error:.4f}",
                f"{row.acc_bytes:.4f}",
                f"{row.questions:,}",
            ]
            for row in answers
        ]
        tables.append(_table(rows))
    return "\n\n".join(tables)


def _table(rows: list[list[str]]) -> str:
    """Rows, the first of them the head, as a Markdown table; all columns but the first are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
