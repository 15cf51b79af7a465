"""Continuing several texts at once, each new token for one token's work.

A decoder runs two kinds of program: one reads prompts, one adds a token to every row. Where shapes are compiled, prompts
are padded to a power of two, so that each such length (a bucket) is compiled once, and adding a token once.

Past the model's context the window slides: the model sees the last `seq_length` tokens, counted from position 0 again, so
nothing that was computed for a token still holds, and each further token costs the reading of a whole context.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gpt2_xla.errors import UserError
from gpt2_xla.kv_cache import KVCache
from gpt2_xla.model import GPT
from gpt2_xla.sampling import Sampling, choose, gumbel_noise

SMALLEST_BUCKET = 16  # tokens
Finish = Literal["end_of_text", "length"]


@dataclass(frozen=True)
class Machine:
    """Where a model decodes, as far as decoding must know."""

    device: torch.device
    compiles: bool = False  # whether each new shape is compiled
    launch: Callable[[], None] = lambda: None  # starts the work that was queued
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


class Decoder:
    """Up to `rows` texts of one model in evaluation mode, and the logits that follow them."""

    def __init__(self, model: GPT, machine: Machine, rows: int, max_new_tokens: int) -> None:
        self._model, self._machine, self._rows = model, machine, rows
        self._room = max_new_tokens  # for which a cache that can have any size has slots
        self._cache: KVCache | None = None
        self._texts: list[list[int]] = []

    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these texts, at least a token each, no more than `rows`; logits (B, V) of the next tokens.

        Float32 on the CPU. The model sees the last `seq_length` tokens of each.
        """
        self._texts = [list(text) for text in texts]
        return self._read()

    def add(self, tokens: Sequence[int | None]) -> Tensor:
        """Add a token to each text; None ends the row, whose logits mean nothing from then on. See `read`."""
        for text, token in zip(self._texts, tokens, strict=True):
            if token is None:
                del text[:-1]  # a row that nobody reads shall not make the window slide
            else:
                text.append(token)
        assert self._cache is not None
        if max(map(len, self._texts)) > self._cache.slots:
            return self._read()
        positions = self._cache.decode([len(text) - 1 for text in self._all_rows()], self._machine.device)
        return self._run(self._cache, [text[-1:] for text in self._all_rows()], positions)

    def _read(self) -> Tensor:
        context = self._model.config.seq_length
        self._texts = [text[-context:] for text in self._texts]
        longest = max(map(len, self._texts))
        length = min(_bucket(longest), context) if self._machine.compiles else longest
        slots = context if self._machine.compiles else min(context, longest + self._room)
        if self._cache is None or self._cache.slots != slots:
            self._cache = KVCache(self._model, slots, fixed=self._machine.compiles)
        self._cache.read_prompts()
        padded = [text + [0] * (length - len(text)) for text in self._all_rows()]
        return self._run(self._cache, padded, None)

    def _all_rows(self) -> list[list[int]]:
        """The texts; where shapes must not change also those of rows that are not used."""
        missing = self._rows - len(self._texts) if self._machine.compiles else 0
        return [*self._texts, *[[0]] * missing]

    def _run(self, cache: KVCache, tokens: list[list[int]], positions: Tensor | None) -> Tensor:
        """Logits (B, V) after the last token of each text that is among these tokens, float32 on the CPU."""
        ends = [min(len(text), len(row)) - 1 for text, row in zip(self._all_rows(), tokens, strict=True)]
        device = self._machine.device
        # Between two calls the caller's mode is in force. Inference mode spares bookkeeping that only eager devices feel.
        with torch.no_grad(), torch.inference_mode(not self._machine.compiles):
            with (
                self._machine.autocast(),
                cache.attached(),
                _output_at(self._model.lm_head, torch.tensor(ends).to(device)),
            ):
                logits = self._model(torch.tensor(tokens).to(device), positions=positions)[:, 0]  # (B, 1, V) -> (B, V)
            self._machine.launch()  # outside of autocast, which keeps weights that it cast: they would become results
            return logits.cpu()[: len(self._texts)].float()


@contextlib.contextmanager
def _output_at(output: nn.Module, ends: Tensor) -> Iterator[None]:
    """Have the output layer compute one position of each row (B,), not all: most of a short prompt's work otherwise."""

    def pick(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        if x.shape[1] == 1:
            return inputs
        return (x.gather(1, ends[:, None, None].expand(-1, 1, x.shape[2])),)  # (B, T, C) -> (B, 1, C)

    hook = output.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def _bucket(length: int) -> int:
    """The padded length of prompts: the next power of two."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class Drawn(NamedTuple):
    """A token that was drawn for a row; with it, or instead of it, why the row ends."""

    row: int
    token: int | None  # None: end-of-text, which is no part of the text
    finish: Finish | None


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    end_of_text: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Drawn]:
    """Continue the prompts, at least a token each, side by side, as tokens are drawn; rows end on their own.

    A row's tokens are a function of its prompt, its seed and the options. Drawing is on the CPU in float32, whatever the
    device. Ids from `vocab_size` on, a padded vocabulary's, are never drawn. Raises UserError for logits that are NaN.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    active = list(range(len(prompts)))
    logits = decoder.read(prompts)[:, :vocab_size]
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt)] = True
    for count in range(1, max_new_tokens + 1):
        if logits[active].isnan().any():
            raise UserError("the model's logits are not numbers (NaN): the training that made it has diverged")
        noise = None
        if sampling.temperature > 0:
            noise = torch.stack([gumbel_noise(logits.shape[1], generators[row]) for row in active])
        drawn = choose(logits[active], sampling, noise, seen[active] if seen is not None else None).tolist()
        tokens: list[int | None] = [None] * len(prompts)
        for row, token in zip(active, drawn, strict=True):
            if token == end_of_text:
                yield Drawn(row, None, "end_of_text")
                continue
            yield Drawn(row, token, "length" if count == max_new_tokens else None)
            tokens[row] = token
            if seen is not None:
                seen[row, token] = True
        active = [row for row in active if tokens[row] is not None]
        if not active or count == max_new_tokens:
            return
        logits = decoder.add(tokens)[:, :vocab_size]
