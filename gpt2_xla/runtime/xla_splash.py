"""Causal attention by jax's Pallas kernel for TPUs ("splash"), which never stores the (B, H, T, T) matrices.

Of the forward pass only the output and one log-sum-exp a row (float32 (B, H, T)) are kept; the stock flash kernel keeps two
float32 (B, H, T, 128). Checked on jax 0.7.1 and torch_xla 2.9.0, whose own wrapper of this kernel needs a mesh and runs the
forward pass a second time.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
from torch import Tensor

from gpt2_xla.model import repeat_heads

BLOCK_BYTES = (
    2048  # of a block's queries, for each of their D elements: 1024 in bf16, and no more than v2 has memory for
)


class Mapped(Protocol):
    """Into the part of a program that each device of a mesh runs on its own sequences and heads, and out of it."""

    def enter(self, x: Tensor) -> Tensor:
        """A device's part of x (B, H, T, D)."""
        ...

    def leave(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of that shape which the devices have the parts of."""
        ...


class OneDevice:
    """Where a device has all of a tensor."""

    def enter(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def leave(self, part: Tensor, shape: torch.Size) -> Tensor:  # noqa: ARG002
        """The part."""
        return part


def splash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    mapped: Mapped | None = None,
    interpret: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `Attend`; `mapped` says who holds which part of q, k, v and of the result.

    Grouped keys and values are repeated: the (B, H, T, D) that this takes is little beside the T x T that the kernel saves.
    `dtype` is that of the kernel's arrays, default autocast's. `interpret` runs the kernel's steps as plain XLA, on any device.
    """
    assert dropout == 0.0
    if dtype is None:
        dtype = torch.get_autocast_dtype("xla") if torch.is_autocast_enabled("xla") else q.dtype
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    # The kernel has no scale of its own.
    q = (q * (1 / math.sqrt(q.shape[-1]))).to(dtype)
    return _Splash.apply(q, k.to(dtype), v.to(dtype), mapped or OneDevice(), interpret)


class _Splash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mapped: Mapped, interpret: bool) -> Tensor:
        parts = [mapped.enter(tensor.contiguous()) for tensor in (q, k, v)]
        kernel = _kernel(tuple(parts[0].shape), str(q.dtype).removeprefix("torch."), interpret)
        out, *residuals = kernel.forward(*parts)
        ctx.save_for_backward(*residuals)
        ctx.kernel, ctx.mapped = kernel, mapped
        return mapped.leave(out, q.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        parts = ctx.kernel.backward(ctx.mapped.enter(gradient.contiguous()), *ctx.saved_tensors)
        return *(ctx.mapped.leave(part, gradient.shape) for part in parts), None, None


@dataclass(frozen=True)
class _Kernel:
    """The forward and the backward pass for one shape, as XLA computations."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


@functools.cache
def _kernel(shape: tuple[int, int, int, int], dtype: str, interpret: bool) -> _Kernel:
    """Trace the kernel with jax. What jax.vjp keeps for the backward pass becomes results of the forward computation."""
    import jax
    import jax.export

    jax.config.update("jax_platforms", "cpu")  # jax traces only; it must not take the TPU from torch_xla
    block = math.gcd(shape[2], BLOCK_BYTES // jax.numpy.dtype(dtype).itemsize)
    kernel = jax.vmap(_splash(*shape[1:], block, interpret))
    rebuild: list[Any] = []

    def forward(q: Any, k: Any, v: Any) -> Any:
        out, pullback = jax.vjp(kernel, q, k, v)
        residuals, structure = jax.tree.flatten(pullback)
        rebuild.append(structure)
        return out, *residuals

    def backward(gradient: Any, *residuals: Any) -> Any:
        return jax.tree.unflatten(rebuild[-1], residuals)(gradient)

    # Exporting, unlike lowering, writes the kernel in the version that the pinned libtpu reads.
    export = functools.partial(jax.export.export, platforms=("cpu" if interpret else "tpu",))
    one = jax.ShapeDtypeStruct(shape, dtype)
    there = export(jax.jit(forward))(one, one, one)
    residuals = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in there.out_avals[1:])
    back = export(jax.jit(backward, keep_unused=True))(one, *residuals)
    return _Kernel(_as_function("xla::splash_forward", there), _as_function("xla::splash_backward", back))


def _splash(heads: int, length: int, head_dim: int, block: int, interpret: bool) -> Any:
    """The kernel for q, k, v (H, T, D), of which it takes so many queries and keys at once."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    layouts = splash_attention_kernel.QKVLayout
    # A TPU's memory is laid out in rows of 128: with D = 64 in the rows half of it would be filling.
    layout = layouts.HEAD_DIM_MINOR if head_dim % 128 == 0 else layouts.SEQ_MINOR
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    return splash_attention_kernel.make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)


def _as_function(name: str, exported: Any) -> Callable[..., tuple[Tensor, ...]]:
    """An exported jax function on XLA tensors. jaxlib's and torch_xla's private parts, checked on the versions above."""
    from jax._src.lib import xla_client

    computation = xla_client._xla.mlir.mlir_module_to_xla_computation(
        exported.mlir_module(), use_tuple_args=False, return_tuple=True
    )
    program = xb.computation_from_module_proto(name, computation.as_serialized_hlo_module_proto())
    return lambda *tensors: torch_xla._XLAC._xla_user_computation(name, list(tensors), program)
