"""Four gloo processes train models that are cut up between them. Used by test_sharding.py, which trains them alone.

python -m torch.distributed.run --standalone --nproc_per_node=4 tests/sharded_training.py FOLDER
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh

from gpt2_xla import checkpoint, checkpoint_parts, loading, optim
from gpt2_xla.config import ModelConfig, OptimConfig, PretrainConfig, TorchConfig, to_dict
from gpt2_xla.held_blocks import held
from gpt2_xla.model import build_model
from gpt2_xla.runtime.process_mesh import process_mesh

STEPS = 6
EVEN = dict(vocab_size=64, seq_length=16, d_model=32, num_layers=2, num_heads=4)
# Four processes can't quarter the vocabulary, and two of them have nothing of the heads' normalizations, of 2 elements.
UNEVEN = dict(
    vocab_size=61, seq_length=16, d_model=8, num_layers=2, num_heads=4, num_kv_heads=2, position="rope", norm="rmsnorm",
    activation="swiglu", qk_norm=True, bias=False,
)  # fmt: skip
# Model, runtime and optimizer of each case.
CASES = {
    "untied, clipped": (EVEN | {"tie_weights": False}, {}, {"max_grad_norm": 0.1}),
    "checkpointed": (EVEN, {"activation_checkpointing": "block"}, {}),
    "uneven": (UNEVEN, {}, {}),
    "muon": (UNEVEN, {"activation_checkpointing": "selective"}, {"optim_type": "muon"}),
    "compiled": (EVEN | {"tie_weights": False}, {"compile": True}, {}),
    "bf16": (EVEN, {"mixed_precision": "bf16", "activation_checkpointing": "block"}, {}),
    "fp16": (EVEN, {"mixed_precision": "fp16"}, {}),
    "fp8": (EVEN, {"mixed_precision": "fp8", "activation_checkpointing": "block"}, {}),
    "fp16, two copies": (  # the last: from then on the processes stand like that
        UNEVEN,
        {"mixed_precision": "fp16", "sharding": "hsdp", "mesh": "data=2,fsdp=2"},
        {"max_grad_norm": 0.1},
    ),
}
POSSIBLE = [case for case in CASES if case != "fp8" or importlib.util.find_spec("torchao")]


def configs(case):
    model, runtime, optimizer = CASES[case]
    runtime = {"device": "cpu", "mixed_precision": "no", "sharding": "fsdp", **runtime}
    return ModelConfig(**model), TorchConfig(**runtime), OptimConfig(learning_rate=1e-2, **optimizer)


class Training:
    """A model in training on random tokens, of which each process sees its rows."""

    def __init__(self, case, runtime):
        self.runtime, self.config = runtime, configs(case)[2]
        runtime.config = replace(configs(case)[1], compile=configs(case)[1].compile and runtime.world_size > 1)
        runtime._scaler = GradScaler("cpu", enabled=runtime.config.mixed_precision == "fp16")
        if runtime.config.sharding == "hsdp" and runtime.world_size > 1:
            runtime.shape, runtime.writers = process_mesh(runtime.config), 2
            runtime._mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "fsdp"))
        self.model = build_model(configs(case)[0], 48, seed=1)
        self.forward = runtime.place(self.model)
        self.optimizer = runtime.build_optimizer(self.model, self.config)
        self.random = torch.Generator().manual_seed(2)

    def batch(self):
        tokens = torch.randint(0, 61, (2, 8, 17), generator=self.random)  # (A, B, T+1)
        return tokens.chunk(self.runtime.world_size, dim=1)[self.runtime.rank]

    def step(self, spoil=1.0):
        """Loss and gradient norm of a step whose gradients this process multiplies by `spoil`."""
        batch = self.batch()
        loss = self.runtime.compute_gradients(self.forward, batch)
        for parameter in self.model.parameters():
            held(parameter.grad).mul_(spoil)
        return self.runtime.update(self.model, self.optimizer, self.config.max_grad_norm, loss).tolist()

    @torch.no_grad()
    def evaluate(self):
        tokens = self.batch()[0]
        with self.runtime.autocast():
            loss = self.forward(tokens[:, :-1], tokens[:, 1:])
        return self.runtime.mean(loss).item()

    def watched(self):
        """Of a step's forward and backward passes: how often gradients were cut up, and the precision of some weights in use."""
        dtypes = {}

        def look(name):
            return lambda module, _: dtypes.update({name: str(module.weight.dtype)})

        names = ("ln_f", "blocks.0.ln_1", "blocks.1.attn.c_proj", "blocks.1.mlp.c_fc")
        hooks = [self.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
        with torch.profiler.profile() as profile:
            self.runtime.compute_gradients(self.forward, self.batch())
        self.optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
        averaged = [event.count for event in profile.key_averages() if event.key.startswith("c10d::_reduce_scatter")]
        float8 = any("_scaled_mm" in event.key for event in profile.key_averages())
        return {"averaged": sum(averaged), "dtypes": dtypes, "float8": float8}

    def tensors(self):
        return [dict(self.model.named_parameters()), optim.named_state(self.model, self.optimizer)]

    def copies(self):
        return [held(value).clone() for named in self.tensors() for value in named.values()]


def save(training, path):
    """Write a checkpoint as the run's savers do."""
    rank, writers = training.runtime.rank, training.runtime.writers
    shares = [training.runtime.to_host(named, {}) for named in training.tensors()]
    parts = [checkpoint_parts.part_folder(path.parent, STEPS, 1, other) for other in range(1, writers)]
    if 0 < rank < writers:
        checkpoint_parts.write_part(parts[rank - 1], rank, *shares)
    elif rank == 0:
        state = checkpoint.TrainerState(STEPS, 0, to_dict(PretrainConfig(model=training.model.config)))
        assert checkpoint.save(path.parent, state, *shares, parts=parts) == path
    assert training.runtime.agree_on(0)  # waits for the others


def main(folder):
    from gpt2_xla.runtime import torch_sharding

    # Inductor's code takes half a minute to compile; what it is given is what is tried here.
    torch_sharding.compiled = lambda called: torch.compile(called, backend="aot_eager", dynamic=False)
    runtime = torch_sharding.open_torch_runtime(configs("uneven")[1])
    assert runtime.writers == runtime.world_size == 4
    found = {}
    for case in POSSIBLE:
        training = Training(case, runtime)
        steps = [training.step() for _ in range(STEPS)]
        path = folder / case / f"step-{STEPS:08d}"
        save(training, path)
        bytes_held = [
            sum(block.numel() * block.element_size() for block in map(held, named.values()) if block.dim())
            for named in training.tensors()
        ]
        before = training.copies()
        skipped = training.step(spoil=float("nan") if runtime.rank == 2 else 1.0)
        unchanged = all(map(torch.equal, before, training.copies()))
        after = training.step()  # what a spoiled one leaves is no gradient
        losses = [training.evaluate()]
        # Other weights, loaded when those of an evaluation have just been put together.
        loading.load(training.model, path)
        checkpoint.load_optimizer(path, training.tensors()[1])
        restored = all(map(torch.equal, before, training.copies()))
        losses += [training.evaluate()]
        found[case] = dict(
            steps=steps, bytes=bytes_held, skipped=skipped, unchanged=unchanged, after=after, restored=restored,
            losses=losses, **training.watched(),
        )  # fmt: skip
    (folder / f"{runtime.rank}.json").write_text(json.dumps(found))
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
