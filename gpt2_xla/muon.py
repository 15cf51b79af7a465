"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024), for a model's hidden matrices.

The same arithmetic as torch.optim.Muon, which XLA, replicas and this loop can't use: it always rounds to bf16, takes a fused
[q | k | v] for one matrix, works matrix by matrix (a program of thousands of small products) and can't skip a step on the
device. `tests/test_muon.py` compares the two.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Newton–Schulz steps x ← a x + b (x xᵀ) x + c (x xᵀ)² x. The coefficients are those of Keller Jordan's
# https://kellerjordan.github.io/posts/muon/: five steps take singular values from 0.003 to 1 to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
SMALLEST_NORM = 1e-7
# Root mean square of an update's elements per unit of learning rate: about that of AdamW's, so that AdamW's learning rate and
# weight decay carry over (Liu et al. 2025, "Muon is Scalable for LLM Training"; torch's match_rms_adamw).
UPDATE_RMS = 0.2
STACKED_ELEMENTS = 2**26  # of matrices orthogonalized together, which bounds the temporary memory

Rows = tuple[int, ...]  # how many rows each of the matrices has that one parameter is made of


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, Rows]:
    """The blocks' matrices; embeddings, output layer and vectors are not Muon's.

    A fused c_attn (Q + 2 KV, C) is three matrices, as they are to the model: one orthogonal matrix would tie their scales.
    """
    found: dict[nn.Parameter, Rows] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.dim() == 2:
            rows, columns = parameter.shape
            fused = name.endswith("c_attn.weight")  # queries have C rows: H heads of C / H
            found[parameter] = (columns, *[(rows - columns) // 2] * 2) if fused else (rows,)
    return found


@dataclass(frozen=True)
class _Piece:
    """A matrix: some rows of a parameter."""

    parameter: nn.Parameter
    first: int
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """Lying down: no more rows than columns."""
        columns = self.parameter.shape[1]
        return min(self.rows, columns), max(self.rows, columns)

    @property
    def stands(self) -> bool:
        return self.rows > self.parameter.shape[1]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay. State: `momentum_buffer`, in float32."""

    def __init__(
        self,
        matrices: Mapping[nn.Parameter, Rows],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        matmul_dtype: torch.dtype,
    ) -> None:
        """`matrices` are (out, in), each with the rows of its parts. `matmul_dtype` is the Newton–Schulz steps' precision."""
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._stacks = list(_stacks(matrices))
        self._matmul_dtype = matmul_dtype
        # How a runtime whose tensors are cut up makes one whole, orthogonalizes (N, R, C), and cuts an update like its parameter.
        self.whole: Callable[[Tensor], Tensor] = lambda direction: direction
        self.orthogonalize: Callable[[Tensor], Tensor] = orthogonalized
        self.cut: Callable[[Tensor, Tensor], Tensor] = lambda update, _parameter: update

    @torch.no_grad()
    def step(self, closure: None = None, found_inf: Tensor | None = None) -> None:  # type: ignore[override]
        """One step, which changes nothing where `found_inf`, a scalar on the device, is not 0. The host waits for nothing."""
        assert closure is None
        (group,) = self.param_groups
        directions = {
            parameter: self._direction(parameter, group["momentum"], found_inf) for parameter in group["params"]
        }
        pieces: dict[Tensor, dict[int, Tensor]] = {}
        for stack in self._stacks:
            whole = {piece.parameter: self.whole(directions[piece.parameter]) for piece in stack}
            stacked = torch.stack([_lying(piece, whole[piece.parameter]) for piece in stack])  # (N, R, C)
            scale = UPDATE_RMS * math.sqrt(stacked.shape[2])
            for piece, matrix in zip(stack, self.orthogonalize(stacked).unbind(), strict=True):
                parts = pieces.setdefault(piece.parameter, {})
                update = matrix.float() * scale
                parts[piece.first] = update.mT if piece.stands else update
                if sum(map(len, parts.values())) == len(piece.parameter):  # at once: a whole update takes room
                    del pieces[piece.parameter]
                    self._change(piece.parameter, torch.cat([parts[first] for first in sorted(parts)]), found_inf)

    def _change(self, parameter: Tensor, update: Tensor, found_inf: Tensor | None) -> None:
        """Take a step of one parameter in the update's direction."""
        (group,) = self.param_groups
        # Not parameter * (1 - lr * decay): that factor may become 1, which XLA would compile in.
        changed = parameter - (parameter * group["weight_decay"] + self.cut(update, parameter)) * group["lr"]
        parameter.copy_(_unless(found_inf, changed, parameter))

    def _direction(self, parameter: Tensor, momentum: float, found_inf: Tensor | None) -> Tensor:
        """Update the momentum; where it leads, a gradient further."""
        assert parameter.grad is not None
        buffer = self.state[parameter]["momentum_buffer"]
        ahead = buffer.lerp(parameter.grad, 1 - momentum)
        direction = parameter.grad.lerp(ahead, momentum).to(self._matmul_dtype)
        buffer.copy_(_unless(found_inf, ahead, buffer))
        return direction


def orthogonalized(matrices: Tensor) -> Tensor:
    """Nearly U Vᵀ of each matrix U S Vᵀ of (N, R, C), R ≤ C, in the matrices' own precision.

    Singular values under a few thousandths of the matrix's norm stay below 0.7.
    """
    a, b, c = COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices.float(), dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    x = (matrices.float() / norms).to(matrices.dtype)
    for _ in range(STEPS):
        gram = x @ x.mT  # (N, R, C) -> (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _stacks(matrices: Mapping[nn.Parameter, Rows]) -> Iterator[list[_Piece]]:
    """The matrices in groups of one shape, none with more than STACKED_ELEMENTS unless a matrix is larger itself."""
    by_shape: dict[tuple[int, int], list[_Piece]] = {}
    for parameter, sizes in matrices.items():
        for number, rows in enumerate(sizes):
            piece = _Piece(parameter, sum(sizes[:number]), rows)
            by_shape.setdefault(piece.shape, []).append(piece)
    for shape, pieces in by_shape.items():
        together = max(1, STACKED_ELEMENTS // math.prod(shape))
        for first in range(0, len(pieces), together):
            yield pieces[first : first + together]


def _lying(piece: _Piece, direction: Tensor) -> Tensor:
    """The piece of a parameter's direction, turned if it is taller than wide: that makes the smaller Gram matrix."""
    rows = direction[piece.first : piece.first + piece.rows]
    return rows.mT if piece.stands else rows


def _unless(skip: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if skip is None else torch.where(skip > 0, old, new)
