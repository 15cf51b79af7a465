"""Four gloo processes: two save a state that is cut up between them, then one, two and four load it. Used by test_shares.py.

python tests/sharded_state.py FOLDER starts them and prints "equal" for each load.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gpt2_xla import checkpoint, checkpoint_parts
from gpt2_xla.config import ModelConfig, PretrainConfig, to_dict
from gpt2_xla.model import GPT
from gpt2_xla.shares import Share

MODEL = ModelConfig(vocab_size=61, seq_length=16, d_model=32, num_layers=2, num_heads=2)


def tensors(fill):
    """Weights and optimizer state: matrices, vectors, a matrix that two processes can't halve, scalars."""
    model = GPT(MODEL)
    model.initialize(fill)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    random = torch.Generator().manual_seed(fill)
    state = {f"exp_avg.{name}": torch.randn(value.shape, generator=random) for name, value in weights.items()}
    steps = {f"step.{name}": torch.tensor(float(fill)) for name in weights}
    return weights, {**state, **steps}


def cut(values, mesh):
    """The tensors cut along their first dimension, as FSDP does; scalars are copied."""
    return {
        name: distribute_tensor(value, mesh, [Shard(0) if value.dim() else Replicate()])
        for name, value in values.items()
    }


def own_shares(values, rank):
    """What one process holds."""
    found = []
    for name, value in values.items():
        if value.dim():
            shape, at = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            assert tuple(value.to_local().shape) == tuple(shape)
            found.append(Share(name, value.to_local(), tuple(at), tuple(value.shape)))
        elif rank == 0:
            found.append(Share.whole(name, value.to_local()))
    return found


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    weights, optimizer = tensors(1)
    path = Path(folder) / "run" / "step-00000007"
    two = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    if rank < 2:
        shares = own_shares(cut(weights, two), rank), own_shares(cut(optimizer, two), rank)
        part = checkpoint_parts.part_folder(path.parent, 7, 1, 1)
        if rank == 1:
            checkpoint_parts.write_part(part, 1, *shares)
        else:
            state = checkpoint.TrainerState(7, 56, to_dict(PretrainConfig(model=MODEL)))
            assert checkpoint.save(path.parent, state, *shares, parts=[part]) == path
    dist.barrier()
    for size in (1, 2, 4):
        mesh = dist.device_mesh.DeviceMesh("cpu", list(range(size)))
        if rank >= size:
            continue
        _, empty = tensors(2)
        targets = cut(empty, mesh) if size > 1 else empty
        checkpoint.load_optimizer(path, targets)
        for name, value in targets.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(whole, optimizer[name]), (size, name)
        if rank == 0:
            print(f"{size} equal\n", end="", flush=True)  # at once: the others may write into the same pipe
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1],), nprocs=4)
