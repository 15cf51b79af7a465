"""Logits → the next token: temperature, top-k, top-p; and generation, one token at a time."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.tokenizer import REPLACEMENT, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Filters apply in the order of the fields."""

    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int | None = None
    top_p: float | None = None


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k largest set to -inf; those equal to the k-th are kept too."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) with all but the nucleus set to -inf (Holtzman et al. 2020).

    The nucleus is the fewest tokens, most likely first, whose probabilities sum to p or more: the token that crosses p
    is in it, and the most likely one always. Among equals the lower id comes first.
    """
    if p >= 1:
        return logits  # rounding must not cut the tail off
    order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = order.values.softmax(dim=-1)
    outside = probabilities.cumsum(dim=-1) - probabilities >= p  # what came before reached p already
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, order.indices, outside), -torch.inf)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw a token for each row: float32 logits (B, V) -> (B,). The generator lives on the logits' device."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Subtracting the maximum changes no probability and keeps tiny temperatures from overflowing.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def generate(
    model: GPT,
    tokens: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    end_of_text: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Continue `tokens` (at least one), yielding one id at a time; ends before `end_of_text` or at `max_new_tokens`.

    The model sees the last `seq_length` tokens. Ids from `vocab_size` on, a padded vocabulary's, are never drawn. Drawing
    is on the CPU in float32, with a CPU generator, whatever the model's device. Raises UserError for logits that are NaN.
    """
    tokens, context = list(tokens), model.config.seq_length
    for _ in range(max_new_tokens):
        logits = next_logits(model, tokens[-context:])[:, :vocab_size]
        if logits.isnan().any():
            raise UserError("the model's logits are not numbers (NaN): the training that made it has diverged")
        token = int(sample(logits, sampling, generator))
        if token == end_of_text:
            return
        tokens.append(token)
        yield token


@torch.inference_mode()
def next_logits(model: GPT, tokens: list[int]) -> Tensor:
    """Logits (1, V) of the token after `tokens`, float32 on the CPU. The model must be in evaluation mode."""
    device = next(model.parameters()).device
    return model(torch.tensor([tokens], device=device))[:, -1].float().cpu()  # (1, T) -> (1, T, V) -> (1, V)


class CharacterStream:
    """Turns a stream of tokens into text, holding back the bytes of a character until it is whole.

    Bytes that can't become UTF-8 come out as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # bytes of self._ids that the decoder has seen
        self._held = 0  # tokens whose bytes it has not
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; often empty inside of a character."""
        self._ids.append(token)
        new = self._tokenizer.decode_bytes(self._ids)[self._done :]
        # Tokenizers that are not byte-level show an unfinished character as U+FFFD until its last byte (of at most 4).
        self._held += 1
        if new.endswith(REPLACEMENT) and self._held < 4:
            return ""
        # A token's bytes can depend on those before it (a leading space): keep a few.
        self._ids, self._held = self._ids[-8:], 0
        self._done = len(self._tokenizer.decode_bytes(self._ids))
        return self._decoder.decode(new)

    def finish(self) -> str:
        """What was held back; U+FFFD for a character that was not finished."""
        new = self._tokenizer.decode_bytes(self._ids)[self._done :]
        return self._decoder.decode(new, final=True)
