"""What a training step costs without this program around it: the loop that a torch_xla tutorial would write."""

import contextlib
import math
from collections.abc import Iterable

import torch
import torch_xla
from torch import Tensor
from torch_xla.amp import syncfree

from gpt2_xla import optim as optimizers
from gpt2_xla.config import PretrainConfig
from gpt2_xla.model import build_model
from gpt2_xla.schedule import learning_rate


class BareXlaLoop:
    """One device, the same model, loss, optimizer and clipping; all batches lie on the device beforehand."""

    def __init__(self, config: PretrainConfig, host_batches: Iterable[Tensor]) -> None:
        self._config, self._device = config, torch_xla.device()
        self._model = build_model(config.model, config.runtime.loss_chunk, config.run.seed).to(self._device)
        self._model.tie_weights()
        kind = syncfree.AdamW if config.optim.optim_type == "adamw" else syncfree.Adam
        groups = optimizers.parameter_groups(list(self._model.parameters()), config.optim.weight_decay)
        self._optimizer = kind(groups, **optimizers.optimizer_arguments(config.optim))
        self._batches = [batch.to(self._device) for batch in host_batches]
        self._bf16 = config.runtime.mixed_precision == "bf16"
        self._step = 0
        self.loss = math.nan  # of the last step
        torch_xla.sync()

    def run(self, steps: int) -> None:
        """Train that many steps, and wait for the device."""
        for _ in range(steps):
            total = self._train_step()
        self.loss = total.item()

    def _train_step(self) -> Tensor:
        """Queue the next step; its loss, on the device."""
        config, batch = self._config, self._batches[self._step]
        rate = learning_rate(self._step, config.optim, config.run.train_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self._device)
        for tokens in batch:
            with torch.autocast("xla", dtype=torch.bfloat16) if self._bf16 else contextlib.nullcontext():
                loss = self._model(tokens[:, :-1], tokens[:, 1:]) / len(batch)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), config.optim.max_grad_norm)
        self._optimizer.step(found_inf=(~torch.isfinite(norm)).float())
        self._optimizer.zero_grad(set_to_none=True)
        torch_xla.sync()
        self._step += 1
        return total
