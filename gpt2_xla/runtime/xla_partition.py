"""The marks by which XLA's partitioner (GSPMD) cuts a model up as meant, set from outside so that model.py knows no mesh.

Left alone, GSPMD computes a Linear whose weight is cut by its inputs on the whole batch, in parts that it then adds up. So
weights are marked whole where they are used, and activations cut by rows: each device gathers a layer's weights for its
own rows, as in FSDP, and the gradients come out summed and cut.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_xla.model import GPT, Attention, RMSNorm, rms_norm
from gpt2_xla.runtime.mesh import ROWS, Layout, MeshShape, layout_in_use, parameter_layout

WHOLE: tuple[str, ...] = ()  # a dimension that every device holds whole
BY_ROWS: Layout = (ROWS, WHOLE, WHOLE)  # (B, T, C)
BY_ROWS_AND_HEADS: Layout = (ROWS, WHOLE, ("tensor",))  # (B, T, C): C is (H, D)


class Partition:
    """Lays tensors out on a mesh."""

    def __init__(self, mesh: xs.Mesh, shape: MeshShape) -> None:
        self.mesh, self.shape = mesh, shape
        self._mesh_text = str(mesh)

    def mark(self, tensor: Tensor, layout: Layout) -> None:
        """Lay a tensor out that the device holds, or shall hold."""
        xs.mark_sharding(tensor, self.mesh, partition_spec(layout))

    def cut(self, x: Tensor, layout: Layout, gradient: Layout | None = None) -> Tensor:
        """x in that layout, wherever it is computed; its gradient in the same or in `gradient`."""
        layouts = (str(partition_spec(one)) for one in (layout, gradient or layout))
        return _Marked.apply(x, self._mesh_text, *layouts)

    def stored(self, name: str, parameter: Tensor) -> Layout:
        """How a parameter, its gradient and its optimizer state are held."""
        return parameter_layout(name, tuple(parameter.shape), self.shape)

    def cut_model(self, model: GPT) -> None:
        """Cut the parameters, and mark what the model computes from now on."""
        for name, parameter in model.named_parameters():
            self.mark(parameter, self.stored(name, parameter))
        for prefix, module in model.named_modules():
            if (forward := _FORWARDS.get(type(module))) is not None:
                module.forward = partial(forward, module, partial(self.in_use, module, prefix))
            if isinstance(module, Attention) and self.shape.tensor > 1:
                module.qkv = partial(self._qkv_by_heads, module, f"{prefix}.c_attn")  # type: ignore[method-assign]
        model.output_matrix = partial(self.in_use, model.lm_head, "lm_head", "weight")  # type: ignore[method-assign]
        model.loss_chunk *= self.shape.row_shards  # as many tokens on each device as were asked for
        for part in (model.drop, *model.blocks, model.ln_f):
            part.register_forward_hook(lambda _part, _inputs, x: self.cut(x, BY_ROWS))

    def in_use(self, module: nn.Module, prefix: str, name: str) -> Tensor:
        """A module's parameter, gathered for a computation."""
        parameter, stored = self._stored_for(module, prefix, name)
        return self.cut(parameter, layout_in_use(f"{prefix}.{name}", stored), gradient=stored)

    def _stored_for(self, module: nn.Module, prefix: str, name: str) -> tuple[Tensor, Layout]:
        """A parameter in the precision that the module computes in, still cut, and its layout."""
        parameter = getattr(module, name)
        stored = self.stored(f"{prefix}.{name}", parameter)
        if isinstance(module, nn.Linear) and torch.is_autocast_enabled("xla"):
            # Autocast would do it after the gather, of twice the bytes.
            parameter = self.cut(parameter.to(torch.get_autocast_dtype("xla")), stored)
        return parameter, stored

    def _qkv_by_heads(self, attention: Attention, prefix: str, x: Tensor) -> tuple[Tensor, ...]:
        """`Attention.qkv` where each device of a tensor group computes q, k and v of its own heads.

        In one matmul each: the fused one has the outputs [q | k | v], and equal parts of that are not those of some heads.
        """
        c_attn, widths = attention.c_attn, attention.widths
        weight, stored = self._stored_for(c_attn, prefix, "weight")  # cut by its inputs, so that split() moves nothing
        biases: Sequence[Tensor | None] = [None] * len(widths)
        if c_attn.bias is not None:
            biases = self._whole_bias(c_attn, prefix).split(widths)
        return tuple(
            self.cut(F.linear(x, self._by_outputs(part, stored), bias), BY_ROWS_AND_HEADS)
            for part, bias in zip(weight.split(widths), biases, strict=True)
        )

    def _by_outputs(self, weight: Tensor, stored: Layout) -> Tensor:
        """A weight (out, in) cut by its outputs over tensor, whole along its inputs: first turned, then gathered over fsdp.

        In one go GSPMD would gather it over both axes, and activations for its gradient.
        """
        turned = self.cut(weight, (("tensor",), ("fsdp",)), gradient=stored)
        return self.cut(turned, (("tensor",), WHOLE), gradient=(("tensor",), ("fsdp",)))

    def _whole_bias(self, linear: nn.Linear, prefix: str) -> Tensor:
        bias, stored = self._stored_for(linear, prefix, "bias")
        return self.cut(bias, (WHOLE,), gradient=stored)


class ByHeads:
    """Where each device runs a kernel on its own sequences and heads of (B, H, T, D); see `xla_splash.Mapped`."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._sharding = _op_sharding(str(partition.mesh), str(partition_spec((ROWS, ("tensor",), WHOLE, WHOLE))))

    def enter(self, x: Tensor) -> Tensor:
        """A device's part of x."""
        return torch_xla._XLAC._spmd_full_to_shard_shape(self._partition.cut(x, (ROWS, ("tensor",), WHOLE, WHOLE)))

    def leave(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The whole, from the parts. Private calls, those of xs.disable_manual_sharding on torch_xla 2.9.0."""
        manual = xs._mark_manual_sharding(part).global_tensor
        return torch_xla._XLAC._spmd_shard_to_full_shape(manual, self._sharding, shape, part.dtype)


class _Marked(torch.autograd.Function):
    """The identity, with one mark on the result and another on its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: str, spec: str, gradient_spec: str) -> Tensor:
        ctx.mesh, ctx.gradient_spec = mesh, gradient_spec
        return _marked_copy(x, mesh, spec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return _marked_copy(gradient, ctx.mesh, ctx.gradient_spec), None, None, None


# torch_xla has such an operator (xla::aot_mark_sharding), but that one refuses to mark a parameter otherwise than it is
# stored, and builds the mesh anew at every call. An operator, and not a function, so that AOTAutograd can trace it.
@torch.library.custom_op("gpt2_xla::marked_copy", mutates_args=())
def _marked_copy(x: Tensor, mesh: str, spec: str) -> Tensor:
    copied = x.clone()
    torch_xla._XLAC._xla_annotate_custom_sharding(copied, _op_sharding(mesh, spec))  # private, checked on 2.9.0
    return copied


@_marked_copy.register_fake
def _(x: Tensor, mesh: str, spec: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@functools.cache
def _op_sharding(mesh: str, spec: str) -> Any:
    found = xs.Mesh.from_str(mesh)
    assert found is not None
    return found.get_op_sharding(ast.literal_eval(spec))


Parameters = Callable[[str], Tensor]  # by name, gathered


def _linear(linear: nn.Linear, get: Parameters, x: Tensor) -> Tensor:
    return F.linear(x, get("weight"), get("bias") if linear.bias is not None else None)


def _embedding(_embedding: nn.Embedding, get: Parameters, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, get("weight"))


def _layer_norm(norm: nn.LayerNorm, get: Parameters, x: Tensor) -> Tensor:
    # In elementary operations: torch_xla lowers F.layer_norm to BatchNormTraining, which GSPMD cannot cut, so that every
    # device would gather the whole batch and normalize all of it.
    with torch.autocast("xla", enabled=False):
        x = x.float()
        centered = x - x.mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + norm.eps)
        normalized = centered * scale * get("weight")
        return normalized if norm.bias is None else normalized + get("bias")


def _rms_norm(norm: RMSNorm, get: Parameters, x: Tensor) -> Tensor:
    return rms_norm(x, get("weight"), norm.eps)


# How the modules that own parameters compute with gathered ones; see their forward() in torch.nn.
_FORWARDS: dict[type, Callable[[Any, Parameters, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    RMSNorm: _rms_norm,
}


def partition_spec(layout: Layout) -> tuple[Any, ...]:
    """A layout in torch_xla's words."""
    return tuple((axes if len(axes) > 1 else axes[0]) if axes else None for axes in layout)
