"""The blocks as a loop inside the XLA program (--scan-layers), so that the program holds one block, whatever their number.

Checked on torch 2.9 and torch_xla 2.9. torch_xla.experimental.scan_layers is not used itself: it either traces the block
again in every step, or keeps one trace for training, evaluation, autocast and no_grad alike.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from functorch.compile import default_partition, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy
from torch_xla.experimental.scan import scan, value_and_grad_partitioned

# The stream and one layer's inputs: its parameters and, with RoPE, the rotation.
Inputs = tuple[dict[str, Tensor], *tuple[Tensor, ...]]
Body = Callable[[Tensor, Inputs], tuple[Tensor, None]]
_tracing = threading.Lock()  # replicas may be threads of one process, and AOTAutograd's tracer is not made for that


class ScannedBlocks:
    """A way through equal blocks (see `GPT.use`): traced once for each mode it runs in, with the parameters stacked.

    Blocks without dropout: the loop over micro-steps would take the seed inside this one for a constant, the same in every
    step.
    """

    def __init__(self, keep_activations: bool) -> None:
        """Without `keep_activations` the backward pass computes each block again from its input."""
        self._partition = _save_activations if keep_activations else _save_inputs
        self._bodies: dict[tuple[bool, bool, torch.dtype | None], Body] = {}

    def __call__(self, blocks: Iterable[nn.Module], x: Tensor, rotation: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        blocks = list(blocks)
        parameters = [dict(block.named_parameters()) for block in blocks]
        stacked = {name: _Stack.apply(*(one[name] for one in parameters)) for name in parameters[0]}  # (L, ...)
        # Looped over, and not carried: what is carried gets a gradient, which nobody wants of this.
        shared = () if rotation is None else (rotation.expand(len(blocks), *rotation.shape),)
        dtype = torch.get_autocast_dtype("xla") if torch.is_autocast_enabled("xla") else None
        body = self._body(blocks[0], dtype)
        with torch.autocast("xla", enabled=False):  # the traces hold their casts
            with _tracing:
                value_and_grad_partitioned(body, x, (stacked, *shared), partition_fn=self._partition, is_fn_pure=True)
            x, _ = scan(body, x, (stacked, *shared), partition_fn=self._partition, is_fn_pure=True)
        return x

    def _body(self, block: nn.Module, dtype: torch.dtype | None) -> Body:
        """The function that is looped over: one object, hence one trace, for each of the states a trace depends on."""
        mode = (block.training, torch.is_grad_enabled(), dtype)
        if mode not in self._bodies:

            def body(x: Tensor, inputs: Inputs) -> tuple[Tensor, None]:
                parameters, *shared = inputs
                with torch.autocast("xla", dtype, enabled=dtype is not None, cache_enabled=False):
                    return torch.func.functional_call(block, parameters, (x, *shared), strict=True), None

            self._bodies[mode] = body
        return self._bodies[mode]


class _Stack(torch.autograd.Function):
    """torch.stack, whose own gradients are views of one tensor: xm.all_reduce, which works in place, misses those."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:  # noqa: ARG004
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(grad.clone() for grad in grad_outputs[0])


def _save_activations(joint: GraphModule, inputs: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    """Split a block's joint graph so that its backward pass computes nothing again."""
    forward, backward = default_partition(joint, inputs, **options)
    for node in reversed(backward.graph.nodes):  # it leaves a draw there that nothing uses
        if _is_random(node) and not node.users:
            backward.graph.erase_node(node)
    backward.recompile()
    return forward, backward


def _save_inputs(joint: GraphModule, inputs: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    """Split a block's joint graph so that its backward pass needs its inputs and its dropout masks alone."""
    for node in joint.graph.nodes:
        if node.op == "call_function" and not _is_random(node):
            is_mask = any(_is_random(source) for source in node.all_input_nodes)
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if is_mask else CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
    return min_cut_rematerialization_partition(joint, inputs, **options)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
