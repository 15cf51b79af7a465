"""What most would write instead of this program: GPT-2 and its loop on a page, for the benchmark to hold ours against.

In nanoGPT's way: plain modules, logits of all tokens at once, batches from random places of a memory-mapped file, a loss
fetched in every tenth step.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from gpt2_xla.config import ModelConfig, PretrainConfig
from gpt2_xla.schedule import learning_rate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class BareBlock(nn.Module):
    """Attention and MLP, each normalized before and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.heads, self.dropout = config.d_model, config.num_heads, config.dropout
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
        self.qkv = nn.Linear(width, 3 * width, config.bias)
        self.proj = nn.Linear(width, width, config.bias)
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
        self.up = nn.Linear(width, config.hidden_dim, config.bias)
        self.down = nn.Linear(config.hidden_dim, width, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(width, dim=2)
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v)
        )  # (B, T, C) -> (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(batch, length, width)  # (B, H, T, D) -> (B, T, C)
        x = x + F.dropout(self.proj(y), self.dropout, self.training)
        hidden = F.gelu(self.up(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class BareGPT(nn.Module):
    """GPT-2 with tied embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocabulary, config.d_model)
        self.wpe = nn.Embedding(config.seq_length, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BareBlock(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
        self.head = nn.Linear(config.d_model, config.vocabulary, bias=False)
        self.head.weight = self.wte.weight
        residual = 0.02 / math.sqrt(2 * config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=residual if name.endswith(("proj.weight", "down.weight")) else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, in nats, of the targets (B, T) after the tokens (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T) -> (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))  # (B, T, C) -> (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class BareTorchLoop:
    """Trains a `BareGPT` on one device."""

    def __init__(self, config: PretrainConfig, device: torch.device, compiled: bool) -> None:
        self._config, self._device = config, device
        self._path = next(Path(config.data.train_dir[0]).glob("*.npy"))
        precision = config.runtime.mixed_precision
        self._autocast = (
            contextlib.nullcontext() if precision == "no" else torch.autocast(device.type, dtype=DTYPES[precision])
        )
        self._scaler = GradScaler(device.type, enabled=precision == "fp16")
        torch.manual_seed(config.run.seed)
        model = BareGPT(config.model).to(device)
        self._parameters = list(model.parameters())
        groups = [
            {"params": [p for p in self._parameters if p.dim() >= 2], "weight_decay": config.optim.weight_decay},
            {"params": [p for p in self._parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.AdamW(
            groups, lr=config.optim.learning_rate, betas=config.optim.betas, fused=fused
        )
        self._model = torch.compile(model) if compiled else model
        self._step = 0
        self.loss = math.nan  # the last one fetched
        self._next = self._batch()

    def run(self, steps: int) -> None:
        """Train that many steps, and wait for the device."""
        optim, micro_steps = self._config.optim, self._config.data.gradient_accum_step
        for _ in range(steps):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self._step, optim, self._config.run.train_steps)
            for _ in range(micro_steps):
                tokens, targets = self._next
                with self._autocast:
                    loss = self._model(tokens, targets) / micro_steps
                self._next = self._batch()  # while the device still works on the forward pass
                self._scaler.scale(loss).backward()
            if optim.max_grad_norm:
                self._scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._parameters, optim.max_grad_norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
            if self._step % self._config.logging.log_interval == 0:
                self.loss = loss.item() * micro_steps
            self._step += 1
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) from random places."""
        data = np.load(self._path, mmap_mode="r")
        length = self._config.model.seq_length
        places = torch.randint(len(data) - length, (self._config.data.train_batch_size,))
        tokens = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in places])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in places])
        if self._device.type == "cuda":
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return tokens.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)
