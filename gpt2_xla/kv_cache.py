"""Keys and values of the tokens so far, so that a new token costs one token's work: attention for decoding.

A slot of the cache is a position of the row: the key of a row's token at position p lies in slot p, and the token sees the
slots up to its own. Prompts of different lengths are padded on the right; what a pad left in a slot is not seen before a
token of the row takes the slot's place. Letters as in model.py; K heads of keys and values (K divides H), S slots.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_xla.model import GPT, Attention, in_turn


class KVCache:
    """The caches of all layers of a model, and what a forward pass through them has in common.

    `fixed` keeps every shape the same, for devices that compile each new one; else no work is done for empty slots.
    """

    def __init__(self, model: GPT, slots: int, fixed: bool) -> None:
        self.slots, self.fixed = slots, fixed
        self.positions: Tensor | None = None  # (B, 1) of the tokens to decode; None while prompts are read
        self.filled = 0  # slots that some row uses, the tokens to decode included
        self.even = False  # whether all rows are at one position
        self._model = model
        self._layers = [(module, _Layer(self)) for module in model.modules() if isinstance(module, Attention)]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Have the model attend through this cache; afterwards it is as it was."""
        plain, run_blocks = [attention.attend for attention, _ in self._layers], self._model.run_blocks
        try:
            self._model.run_blocks = in_turn  # other ways are made for training: scanned, recomputed
            for attention, layer in self._layers:
                attention.attend = layer
            yield
        finally:
            self._model.run_blocks = run_blocks
            for (attention, _), attend in zip(self._layers, plain, strict=True):
                attention.attend = attend

    def read_prompts(self) -> None:
        """The next forward pass reads prompts from position 0 on, and forgets what was there."""
        self.positions = None

    def decode(self, positions: list[int], device: torch.device) -> Tensor:
        """The next forward pass reads one token of each row, at these positions: (B, 1) on the device."""
        self.positions = torch.tensor(positions).unsqueeze(1).to(device)
        self.filled = max(positions) + 1
        self.even = min(positions) + 1 == self.filled
        return self.positions


class _Layer:
    """One layer's cache, called in place of its attention: see `Attend`, but k and v are (B, K, T, D)."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._keys, self._values = torch.empty(0), torch.empty(0)  # (B, K, S, D) once prompts were read

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:  # noqa: ARG002 - there is none here
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast rotations and norms may have left them in float32
        if self._cache.positions is None:
            return self._read_prompts(q, k, v)
        if self._cache.fixed:
            return self._decode_fixed(q, k, v, self._cache.positions)
        return self._decode(q, k, v, self._cache.positions)

    def _read_prompts(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        empty = (0, 0, 0, self._cache.slots - k.shape[2])
        self._keys, self._values = F.pad(k, empty), F.pad(v, empty)  # (B, K, T, D) -> (B, K, S, D)
        shared = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # pads are on the right: no token sees one

    def _decode_fixed(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """All slots, those not in use masked; written by selection, which needs no index that a program would fix."""
        slots = torch.arange(self._cache.slots, device=positions.device)
        here = (slots == positions)[:, None, :, None]  # (B, 1, S, 1)
        self._keys, self._values = torch.where(here, k, self._keys), torch.where(here, v, self._values)
        return _attend_to(q, self._keys, self._values, (slots <= positions)[:, None, None])

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """The slots in use, written in place."""
        filled = self._cache.filled
        if self._cache.even:
            self._keys[:, :, filled - 1 : filled] = k
            self._values[:, :, filled - 1 : filled] = v
            return _attend_to(q, self._keys[:, :, :filled], self._values[:, :, :filled], None)
        rows = torch.arange(len(positions), device=positions.device)
        self._keys[rows, :, positions[:, 0]] = k[:, :, 0]
        self._values[rows, :, positions[:, 0]] = v[:, :, 0]
        seen = torch.arange(filled, device=positions.device) <= positions
        return _attend_to(q, self._keys[:, :, :filled], self._values[:, :, :filled], seen[:, None, None])


def _attend_to(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of one token a row, q (B, H, 1, D), to keys and values (B, K, S, D) where `seen` (B, 1, 1, S); (B, H, 1, D)."""
    batch, heads, _, width = q.shape
    groups = q.reshape(
        batch, keys.shape[1], -1, width
    )  # the heads that share a key are queries of one head: (B, K, H/K, D)
    y = F.scaled_dot_product_attention(groups, keys, values, attn_mask=seen)
    return y.reshape(batch, heads, 1, width)
