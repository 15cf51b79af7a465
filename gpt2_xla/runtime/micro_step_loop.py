"""Forward and backward of all micro-steps as one XLA loop: the program's size does not grow with their number.

The model is traced once; after that a step only hands the loop its inputs, which takes the host a tenth of the time.
torch_xla.experimental.gradient_accumulation has the same loop, but traces and lowers the model again in every step, launches
an execution of its own for it and waits for the device.

The private calls below were checked on torch_xla 2.9.0; `torch_xla.experimental.scan` rests on the same ones.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
from torch import Tensor, nn

# A step's micro-steps take seeds this far apart, replicas take neighbouring ones. 2^61 - 1.
SEED_STRIDE = 2_305_843_009_213_693_951
# Each random operation of a trace takes the seed of the one before it times MULTIPLIER plus INCREMENT, modulo 2^64.
MULTIPLIER, INCREMENT = 214_013, 2_531_011
Autocast = Callable[[], AbstractContextManager[Any]]


class MicroStepLoop:
    """Mean gradients of A micro-steps; made for one shape of batch.

    What the model's forward computes is fixed when this is made: it must be a function of parameters, tokens and dropout
    seed alone.
    """

    def __init__(self, forward: nn.Module, batch: Tensor, autocast: Autocast) -> None:
        self._device = str(batch.device)
        self._parameters = list(forward.parameters())
        body = _MicroStep(forward, batch, autocast)
        self._constants, self._seeded = body.constants, bool(body.seeds)
        self._loop = self._build(body, batch)

    def __call__(self, batch: Tensor) -> Tensor:
        """Leave the mean gradients of batch (A, B, T+1) in .grad; return the mean loss, a float32 scalar on the device."""
        totals = self._totals()
        results = torch_xla._XLAC._xla_user_computation("xla::micro_steps", [*totals, *self._inputs(batch)], self._loop)
        _count, loss, *gradients = results[: len(totals)]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _totals(self) -> list[Tensor]:
        """What the loop adds up: the number of micro-steps done, the loss, the gradients."""
        count = torch.zeros((), dtype=torch.int32, device=self._device)
        loss = torch.zeros((), dtype=torch.float32, device=self._device)
        return [count, loss, *(_zero_gradient(parameter) for parameter in self._parameters)]

    def _inputs(self, batch: Tensor) -> list[Tensor]:
        """What the loop only reads."""
        seed = [torch_xla._XLAC._get_base_seed_as_tensor(self._device)] if self._seeded else []
        return [batch, *self._parameters, *self._constants, *seed]

    def _build(self, body: "_MicroStep", batch: Tensor) -> Any:
        totals, inputs = self._totals(), self._inputs(batch)
        builder = xb.create_builder("micro_steps")
        operands = [xb.mkparam(builder, i, xb.tensor_shape(t)) for i, t in enumerate([*totals, *inputs])]

        def more(count: xb.Op, *_: xb.Op) -> xb.Op:
            return count < _scalar(count, batch.shape[0], xb.Type.S32)

        def micro_step(count: xb.Op, *state: xb.Op) -> tuple[xb.Op, ...]:
            sums, read = state[: len(totals) - 1], state[len(totals) - 1 :]
            results = body.call(count, read)
            added = (total + result for total, result in zip(sums, results, strict=True))
            return (count + _scalar(count, 1, xb.Type.S32), *added, *read)

        root = xb.Op.tuple(micro_step(*operands)) if batch.shape[0] == 1 else xb.Op.mkwhile(operands, more, micro_step)
        return root.build("micro_steps")


class _MicroStep:
    """One micro-step as an XLA computation: tokens, parameters, constants, seed -> loss / A, gradients / A."""

    def __init__(self, forward: nn.Module, batch: Tensor, autocast: Autocast) -> None:
        parameters = dict(forward.named_parameters())
        first_seed = xm.get_rng_state(str(batch.device))
        # Stand-ins without memory. A model may change a parameter in place (activation checkpointing does): only a copy.
        inputs = [_stand_in(batch[0]), *map(_stand_in, parameters.values())]
        copies = [(tensor * 1).detach().requires_grad_() for tensor in inputs[1:]]
        named = {f"forward_pass.{name}": copy for name, copy in zip(parameters, copies, strict=True)}
        loss = torch.func.functional_call(_LossAndBackward(forward, len(batch), autocast), named, (inputs[0],))
        outputs = [loss, *(copy.grad for copy in copies)]

        context = torch_xla._XLAC.lowering.LoweringContext("micro_step")
        context.build(outputs)
        self._computation = xb.computation_from_module_proto("micro_step", context.hlo())
        self._results = len(outputs)
        self._inputs = [context.tensor_parameter_id(tensor) for tensor in inputs]  # -1: the loss does not depend on it
        # All else that the trace met became a parameter too: the random seeds, and numbers that are constants.
        others = dict(context.device_parameter_id_tensor_mapping())
        for number in self._inputs:
            others.pop(number, None)
        self.seeds = {
            number: _draws_between(first_seed, int(others.pop(number))) for number in _seed_parameters(context, outputs)
        }
        xm.set_rng_state(first_seed, str(batch.device))  # the trace drew from it
        self._others = sorted(others)  # the mapping's own order differs between replicas, whose programs must not
        self.constants = [others[number].to(batch.device) for number in self._others]

    def call(self, count: xb.Op, read: Sequence[xb.Op]) -> list[xb.Op]:
        """The loss and the gradients of micro-step number `count` of the loop's inputs."""
        batch, *rest = read
        positions = [*self._inputs, *self._others]
        placed = dict(zip(positions, [_slice(batch, count), *rest[: len(positions) - 1]], strict=True))
        for number, draws in self.seeds.items():
            stride = _scalar(count, SEED_STRIDE, xb.Type.S64)
            multiplier, increment = (_scalar(count, factor, xb.Type.S64) for factor in _after(draws))
            placed[number] = (rest[-1] + count.cast(xb.Type.S64) * stride) * multiplier + increment
        placed.pop(-1, None)
        result = xb.Op.call(self._computation, [placed[number] for number in range(len(placed))])
        return [result.get_tuple_element(number) for number in range(self._results)]


class _LossAndBackward(nn.Module):
    """Both in one call: a checkpointed block runs again in the backward pass, and must find the same parameters there."""

    def __init__(self, forward: nn.Module, micro_steps: int, autocast: Autocast) -> None:
        super().__init__()
        self.forward_pass, self._micro_steps, self._autocast = forward, micro_steps, autocast

    def forward(self, tokens: Tensor) -> Tensor:
        with self._autocast():
            loss = self.forward_pass(tokens[:, :-1], tokens[:, 1:])
        loss = loss / self._micro_steps
        loss.backward()
        return loss.detach()


def _stand_in(tensor: Tensor) -> Tensor:
    return xb.create_placeholder_tensor(tensor.shape, tensor.dtype)


def _scalar(like: xb.Op, value: int, kind: Any) -> xb.Op:
    return xb.Op.scalar(like.builder(), value, dtype=kind)


def _slice(stacked: xb.Op, index: xb.Op) -> xb.Op:
    """stacked[index], without the leading dimension."""
    sizes = list(stacked.shape().sizes)
    starts = [index, *(index.zeros_like() for _ in sizes[1:])]
    return stacked.dynamic_slice(starts, [1, *sizes[1:]]).reshape(sizes[1:])


def _zero_gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros, sharded as the parameter is."""
    zeros = torch.zeros_like(parameter, requires_grad=False)
    if sharding := torch_xla._XLAC._get_xla_op_sharding(parameter):
        torch_xla._XLAC._xla_mark_sharding(zeros, sharding)
    return zeros


def _seed_parameters(context: Any, outputs: list[Tensor]) -> list[int]:
    """The numbers of the computation's parameters that are random seeds.

    There is one if there is dropout, and more with activation checkpointing, which sets the seed back to draw a mask again.
    """
    ids, values = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)
    seed = torch_xla._XLAC._get_seed_info_id()
    return [context.tensor_parameter_id(value) for number, value in zip(ids, values, strict=True) if number == seed]


def _draws_between(first_seed: int, seed: int) -> int:
    """After how many random operations `first_seed` became `seed`."""
    value = first_seed % 2**64
    for draws in range(1_000_000):
        if value == seed % 2**64:
            return draws
        value = (value * MULTIPLIER + INCREMENT) % 2**64
    raise RuntimeError("the model sets a random seed of its own, which would be the same in every step")


def _after(draws: int) -> tuple[int, int]:
    """What to multiply a seed with, and to add, for the seed after that many random operations; as signed 64-bit numbers."""
    multiplier, increment = 1, 0
    for _ in range(draws):
        multiplier, increment = multiplier * MULTIPLIER % 2**64, (increment * MULTIPLIER + INCREMENT) % 2**64
    return _signed(multiplier), _signed(increment)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
