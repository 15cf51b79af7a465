"""The weights of a folder into a model, a few tensors at a time: never a second copy of them all in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gpt2_xla import checkpoint, vocabulary_padding
from gpt2_xla.config import ModelConfig
from gpt2_xla.held_blocks import copy_held
from gpt2_xla.model import GPT

TOGETHER = 0.03  # share of the weights that are read from one mapping of the file, whose pages count as memory in use


@torch.no_grad()
def load(model: GPT, folder: Path) -> None:
    """Copy the weights of a checkpoint or Hugging Face folder into the model, whatever its device and layout.

    A longer context is cut to the model's, and a vocabulary that the model pads gets its rows of padding. Raises UserError
    naming every weight that is missing, unexpected or of another shape; then nothing was copied.
    """
    parameters = dict(model.named_parameters())
    weights = checkpoint.read_weights(folder)
    shapes = {name: torch.empty_like(value, device="meta") for name, value in weights.items()}
    if model.config.tie_weights:
        shapes.pop("lm_head.weight", None)  # as transformers does
    checkpoint.check_weights(model, {name: _fitted(name, value, model.config) for name, value in shapes.items()})
    for names in _groups(parameters):
        del weights  # unmaps the file, and with it the pages that were read
        weights = checkpoint.read_weights(folder)
        for name in names:
            copy_held(parameters[name], _fitted(name, weights[name], model.config))


def _fitted(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """A file's weight as the model has it."""
    if name == "wpe.weight":
        return weight[: config.seq_length]
    return vocabulary_padding.pad(name, weight, config)


def _groups(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The names in order, as many together as have TOGETHER of all elements, or one that has more."""
    limit = TOGETHER * sum(parameter.numel() for parameter in parameters.values())
    group: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        if group and size + parameter.numel() > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += parameter.numel()
    if group:
        yield group
