"""GPT-2, top to bottom, in the order of the paper (Radford et al. 2019; weights as in Hugging Face's GPT2LMHeadModel).

Letters: B batch, T sequence length, C model dimension, H heads, D head dimension (C / H), V vocabulary.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_xla.config import ModelConfig
from gpt2_xla.loss import next_token_loss, sequence_losses, without_padding

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v (B, H, T, D) and dropout -> (B, H, T, D)
RunBlocks = Callable[[Iterable[nn.Module], Tensor], Tensor]  # blocks and their input (B, T, C) -> (B, T, C)


class GPT(nn.Module):
    """A decoder-only transformer: pre-norm blocks, learned positions, output layer tied to the token embedding."""

    def __init__(self, config: ModelConfig, loss_chunk: int = 0, vocab_multiple: int = 1) -> None:
        super().__init__()
        self.config, self.loss_chunk, self.vocab_multiple = config, loss_chunk, vocab_multiple
        self.run_blocks: RunBlocks = in_turn
        self.fuses = False
        self.residual_dtype: torch.dtype | None = None  # of the stream between the blocks; None: the embeddings'
        self.wte = nn.Embedding(config.vocabulary, config.d_model)
        self.wpe = nn.Embedding(config.seq_length, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.d_model, eps=1e-5)
        self.lm_head = nn.Linear(config.d_model, config.vocabulary, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output layer the token embedding, if so configured (again after a move to an XLA device)."""
        if self.config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        by_sequence: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of the tokens (B, T); with targets (B, T), their mean loss in nats (a float32 scalar).

        A target of -100 is not counted. `positions` (T,) or (B, T) are those of the tokens; default: 0 to T - 1.
        `by_sequence` gives the summed loss of each sequence instead, float32 (B,), without gradients.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions)).to(self.residual_dtype)  # (B, T) -> (B, T, C)
        x = self.ln_f(self.run_blocks(self.blocks, x))
        known = self.config.tokens_known
        if targets is None:
            return without_padding(self.lm_head(x), known)  # (B, T, C) -> (B, T, V)
        loss = sequence_losses if by_sequence else next_token_loss
        return loss(x, self.output_matrix(), targets, self.loss_chunk, self.vocab_multiple, self.fuses, known)

    def output_matrix(self) -> Tensor:
        """The output layer's weight (V, C); a method because a runtime may have to gather it."""
        return self.lm_head.weight

    def use(
        self,
        attend: Attend | None = None,
        run_blocks: RunBlocks | None = None,
        fuses: bool | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        """Compute attention, the way through the blocks, or the loss by other means: the same values for other memory or time.

        `fuses` says that a compiler makes one pass over memory of several elementwise operations (see `next_token_loss`).
        `residual_dtype` rounds the residual stream, for use under autocast.
        """
        self.run_blocks = run_blocks or self.run_blocks
        self.residual_dtype = residual_dtype or self.residual_dtype
        self.fuses = self.fuses if fuses is None else fuses
        for module in self.modules():
            if attend is not None and isinstance(module, Attention):
                module.attend = attend

    def initialize(self, seed: int) -> None:
        """Draw the initial weights as GPT-2 did: N(0, 0.02), residual projections scaled by 1/sqrt(2 num_layers).

        A pure function of the configuration and the seed; uses its own generator, so that replicas in threads agree.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" in name:
                nn.init.ones_(parameter)
            else:
                std = residual if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)


def in_turn(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The plain way through the blocks."""
    for block in blocks:
        x = block(x)
    return x


class Block(nn.Module):
    """One transformer block: attention and MLP, each normalized before and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.attend: Attend = causal_attention

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(x))  # (B, T, C) -> (B, H, T, D)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(batch, length, width)  # (B, H, T, D) -> (B, T, C)
        return self.drop(self.c_proj(y))

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x, each (B, T, C); their own method because a runtime may cut them by heads."""
        return self.c_attn(x).split(x.shape[2], dim=2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each position seeing itself and those before it."""
    # is_causal needs no stored mask, and its lower triangle is cut from no buffer.
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class MLP(nn.Module):
    """The position-wise feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.d_model, config.hidden_dim)
        self.c_proj = nn.Linear(config.hidden_dim, config.d_model)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = F.relu(x) if self.activation == "relu" else F.gelu(x, approximate="tanh")
        return self.drop(self.c_proj(x))


def build_model(config: ModelConfig, loss_chunk: int, seed: int, vocab_multiple: int = 1) -> GPT:
    """A model on the CPU with initial weights drawn from the seed."""
    with torch.device("meta"):  # no torch default initialization, which takes seconds and draws from a global generator
        model = GPT(config, loss_chunk, vocab_multiple)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.initialize(seed)
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: ModelConfig, parameters: int) -> int:
    """FLOPs of forward and backward for one token: 6 N + 12 L T C (PaLM, appendix B), N without the embeddings.

    The output layer multiplies by V x C whether tied or not, so that matrix is counted once in N.
    """
    embeddings = (config.vocabulary + config.seq_length) * config.d_model
    output_layer = config.vocabulary * config.d_model
    matrices = parameters - embeddings - (0 if config.tie_weights else output_layer) + output_layer
    return 6 * matrices + 12 * config.num_layers * config.seq_length * config.d_model
