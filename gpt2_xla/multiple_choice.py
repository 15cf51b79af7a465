"""Questions with several endings: a model chooses the one that it finds most likely (HellaSwag, Zellers et al. 2019).

The prompts, the scores and the choice are those of EleutherAI's lm-eval, so that the numbers are the published ones.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2_xla.data.inputs import network_errors
from gpt2_xla.errors import UserError
from gpt2_xla.loss import IGNORED
from gpt2_xla.tokenizer import Tokenizer

HELLASWAG = "Rowan/hellaswag"  # on the hub
FIELDS: dict[str, type] = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list}


@dataclass(frozen=True)
class Question:
    """A context and its possible endings, the right one by number."""

    context: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions answered rightly, by the endings' log-likelihoods as they are and per length."""

    acc: float
    acc_norm: float  # per character: lm-eval's acc_norm
    acc_bytes: float  # per byte of UTF-8: lm-eval's acc_bytes
    standard_error: float  # of acc_norm
    questions: int


def read_hellaswag(file: Path, limit: int | None = None) -> list[Question]:
    """The questions of a .jsonl file in HellaSwag's published form; raises UserError naming the lines that are odd."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--file {file} can't be read: {getattr(error, 'strerror', None) or error}") from error
    questions: list[Question] = []
    mistakes: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (limit is not None and len(questions) >= limit):
            continue
        try:
            questions.append(hellaswag_question(json.loads(line)))
        except (ValueError, RecursionError) as error:
            mistakes.append(f"--file {file}, line {number}: {error}")
    if mistakes:
        raise UserError(mistakes[:8] + ([f"and {len(mistakes) - 8} more"] if len(mistakes) > 8 else []))
    if not questions:
        raise UserError(f"--file {file} holds no questions")
    return questions


def hellaswag_from_hub(limit: int | None = None) -> list[Question]:
    """The validation split, through `datasets` and its cache; raises UserError without a network."""
    import datasets

    failures: tuple[type[Exception], ...] = (*network_errors(), ValueError)  # ValueError: not in the cache, offline
    try:
        rows = datasets.load_dataset(HELLASWAG, split="validation")
    except failures as error:
        reason = f"{error}".splitlines()[0][:160]
        raise UserError(
            f"--task hellaswag: {HELLASWAG} can't be fetched from the hub ({reason}); check the network, or give the "
            "questions as --file PATH"
        ) from error
    return [hellaswag_question(row) for row, _ in zip(rows, range(limit or len(rows)), strict=False)]


def hellaswag_question(row: Any) -> Question:
    """A published row as lm-eval asks it; raises ValueError that says what is wrong with the row."""
    if not isinstance(row, Mapping):
        raise ValueError("expected a JSON object")
    for name, kind in FIELDS.items():
        if not isinstance(row.get(name), kind):
            raise ValueError(f"{name} is {str(row.get(name))[:40]!r}, expected {'text' if kind is str else 'a list'}")
    endings = row["endings"]
    if not endings or not all(isinstance(ending, str) for ending in endings):
        raise ValueError("endings must be texts, one at least")
    label = str(row.get("label"))
    if not (label.isascii() and label.isdigit() and int(label) < len(endings)):
        raise ValueError(f"label is {label[:40]!r}, expected the number of one of the {len(endings)} endings")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(_tidy(context), tuple(map(_tidy, endings)), int(label))


def _tidy(text: str) -> str:
    """Without the marks that WikiHow's articles left in the texts."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_pair(tokenizer: Tokenizer, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of what follows it; a space between the two belongs to the ending.

    They are encoded together and cut where the context alone would end, as lm-eval does.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(f"{stripped}{context[len(stripped) :]} {ending}")
    first = tokenizer.encode(stripped) if stripped else [tokenizer.end_of_text]
    return first, whole[len(first) :] if stripped else whole


def evaluate_choices(
    forward: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    context: int,
    batch_tokens: int,
    to_device: Callable[[Tensor], Tensor],
) -> Accuracy:
    """Let a model answer. It sees the last `context` tokens; a batch has up to `batch_tokens`, padding included."""
    pairs = [encode_pair(tokenizer, question.context, ending) for question in questions for ending in question.endings]
    scores = iter(log_likelihoods(forward, pairs, context, batch_tokens, to_device))
    right = np.zeros((len(questions), 3), bool)
    for row, question in zip(right, questions, strict=True):
        likelihood = np.array([next(scores) for _ in question.endings])
        characters = np.array([float(len(ending)) for ending in question.endings])
        in_bytes = np.array([float(len(ending.encode())) for ending in question.endings])
        with np.errstate(divide="ignore", invalid="ignore"):  # an empty ending is infinitely unlikely
            chosen = (likelihood, likelihood / characters, likelihood / in_bytes)
        row[:] = [int(np.argmax(values)) == question.answer for values in chosen]
    acc, acc_norm, acc_bytes = right.mean(axis=0).tolist()
    error = math.sqrt(acc_norm * (1 - acc_norm) / max(len(questions) - 1, 1))
    return Accuracy(acc, acc_norm, acc_bytes, error, len(questions))


@torch.no_grad()
def log_likelihoods(
    forward: nn.Module,
    pairs: Sequence[tuple[list[int], list[int]]],
    context: int,
    batch_tokens: int,
    to_device: Callable[[Tensor], Tensor],
) -> list[float]:
    """The log-likelihood, in nats, of each second list of tokens after its first."""
    found = [0.0] * len(pairs)
    windows = [_window(first, second, context) for first, second in pairs]
    for batch in _batches([len(inputs) for inputs, _ in windows], batch_tokens):
        length = len(windows[batch[0]][0])  # the longest comes first
        rows = torch.zeros(len(batch), 2, length, dtype=torch.int64)
        rows[:, 1] = IGNORED
        for row, index in zip(rows, batch, strict=True):
            inputs, targets = windows[index]
            row[0, : len(inputs)], row[1, : len(targets)] = torch.tensor(inputs), torch.tensor(targets)
        inputs_, targets_ = to_device(rows).unbind(dim=1)  # (B, 2, T) -> 2 × (B, T)
        for index, loss in zip(batch, forward(inputs_, targets_, by_sequence=True).tolist(), strict=True):
            found[index] = -loss
    return found


def _window(first: list[int], second: list[int], context: int) -> tuple[list[int], list[int]]:
    """Inputs and targets of the last `context` positions; only the second list's tokens are targets."""
    tokens = (first + second)[-(context + 1) :]
    unscored = max(0, len(tokens) - 1 - len(second))
    return tokens[:-1], [IGNORED] * unscored + tokens[1 + unscored :]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, as many together as fit: neighbours are of about one length, so little is padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
