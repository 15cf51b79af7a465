"""A decoder-only transformer, top to bottom: GPT-2 (Radford et al. 2019) by default, each later idea an option beside it.

Letters: B batch, T sequence length, C model dimension, H heads, D head dimension (C / H), V vocabulary; of keys and values
there are Hkv heads, H of them unless heads are grouped. GPT-2's weights are named as in Hugging Face's GPT2LMHeadModel.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_xla.config import ModelConfig
from gpt2_xla.loss import next_token_loss, sequence_losses, without_padding

# q (B, H, T, D), k and v (B, Hkv, T, D), and dropout -> (B, H, T, D). q and k are normalized and rotated already. Hkv divides
# H; query head h uses key head h // (H / Hkv), which an implementation sees to itself (`repeat_heads`).
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
# Blocks, their input (B, T, C) and the rotation that they share, None without RoPE -> (B, T, C).
RunBlocks = Callable[[Iterable[nn.Module], Tensor, Tensor | None], Tensor]


class GPT(nn.Module):
    """Pre-norm blocks between a token embedding and an output layer, which may be one matrix."""

    def __init__(self, config: ModelConfig, loss_chunk: int = 0, vocab_multiple: int = 1) -> None:
        super().__init__()
        self.config, self.loss_chunk, self.vocab_multiple = config, loss_chunk, vocab_multiple
        self.run_blocks: RunBlocks = in_turn
        self.fuses = False
        self.residual_dtype: torch.dtype | None = None  # of the stream between the blocks; None: the embeddings'
        self.wte = nn.Embedding(config.vocabulary, config.d_model)
        self.wpe = nn.Embedding(config.seq_length, config.d_model) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = norm(config)
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
        x, rotation = self.wte(tokens), None  # (B, T) -> (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            rotation = rotation_at(positions, self.config.head_dim, self.config.rope_theta)
        x = self.drop(x).to(self.residual_dtype)
        x = self.ln_f(self.run_blocks(self.blocks, x, rotation))
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

        Biases are 0, the scales of normalizations 1; a SwiGLU's gate is drawn as any other matrix. A pure function of the
        configuration and the seed; uses its own generator, so that replicas in threads agree.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                std = residual if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)


def in_turn(blocks: Iterable[nn.Module], x: Tensor, rotation: Tensor | None) -> Tensor:
    """The plain way through the blocks."""
    for block in blocks:
        x = block(x, rotation)
    return x


class Block(nn.Module):
    """One transformer block: attention and MLP, each normalized before and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.widths = [heads * config.head_dim for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
        self.c_attn = nn.Linear(config.d_model, sum(self.widths), config.bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.c_proj = nn.Linear(config.d_model, config.d_model, config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.attend: Attend = causal_attention

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(x)
        )  # (B, T, C) -> (B, H, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # Both come in float32, also under autocast: back to the precision of v, before they are kept for the backward pass.
        y = self.attend(q.to(v.dtype), k.to(v.dtype), v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.drop(self.c_proj(y))

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, T, H D), keys and values (B, T, Hkv D) of x (B, T, C); a method because a runtime may cut it by heads."""
        return self.c_attn(x).split(self.widths, dim=2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each position seeing itself and those before it; see `Attend`."""
    # is_causal needs no stored mask, and its lower triangle is cut from no buffer.
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, Hkv, T, D), each as often as query heads share it: (B, heads, T, D)."""
    if x.shape[1] == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def rotation_at(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of RoPE's angles (Su et al. 2021), float32: positions (T,) or (B, T) -> (2, [B, 1,] T, D / 2).

    Pair i of a head's dimensions turns by position · theta^(-2 i / D).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.unsqueeze(-1).float() * theta**-exponents
    rotation = torch.stack([angles.cos(), angles.sin()])
    return rotation if positions.dim() == 1 else rotation.unsqueeze(2)  # the same for all heads


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, H, T, D), of which dimensions i and i + D / 2 are a pair (as in Llama), rotated; float32."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MLP(nn.Module):
    """The position-wise feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gated = config.activation == "swiglu"
        self.c_gate = nn.Linear(config.d_model, config.hidden_dim, config.bias) if gated else None
        self.c_fc = nn.Linear(config.d_model, config.hidden_dim, config.bias)
        self.c_proj = nn.Linear(config.hidden_dim, config.d_model, config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.c_gate is not None:  # SwiGLU (Shazeer 2020)
            x = F.silu(self.c_gate(x)) * self.c_fc(x)
        elif self.activation == "gelu":
            x = gelu(self.c_fc(x))
        else:
            x = F.relu(self.c_fc(x))
            x = x * x if self.activation == "relu2" else x  # ReLU² (So et al. 2021)
        return self.drop(self.c_proj(x))


def gelu(x: Tensor) -> Tensor:
    """GELU's tanh approximation (Hendrycks and Gimpel 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # (1 + tanh u) / 2 = sigmoid(2 u), whose exponential compilers make faster than a tanh on CPUs; on GPUs they are alike.
    y = x.float()
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


def norm(config: ModelConfig) -> nn.Module:
    """A normalization over the model dimension."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.Module):
    """Division by the root of the mean square over the last dimension (Zhang and Sennrich 2019), in float32, and a scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `RMSNorm`; a result of the weight's dtype, whatever that of x."""
    x = x.float()
    return (x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight).to(weight.dtype)


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


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs of the matmuls of forward and backward for one token: 6 N + 12 L T C (PaLM, appendix B).

    N are the elements of the matrices that a token is multiplied with, the output layer's included. Attention counts
    whole T x T matrices, of which a causal kernel may skip half, and grouped heads save nothing in it.
    """
    width, kv_width = config.d_model, config.kv_heads * config.head_dim
    attention = 2 * width * (width + kv_width)
    mlp = (3 if config.activation == "swiglu" else 2) * width * config.hidden_dim
    matrices = config.num_layers * (attention + mlp) + config.vocabulary * width
    return 6 * matrices + 12 * config.num_layers * config.seq_length * width
