"""The sharded path: the losses of one process, a share of the memory, one program, checkpoints for every runtime."""

import re
import shutil
import signal

import pytest
from commands import (
    PYTHON,
    QUICK_XLA,
    ROOT,
    TINY,
    TRAIN_XLA,
    data_flags,
    finish,
    losses,
    printed_json,
    records,
    run,
    start,
    wait_for_step,
)
from small_runs import said_here
from stopping import PAUSING_XLA, stop_paused

import run_pretrain
from gpt2_xla.config import DataConfig, ModelConfig, PretrainConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT, build_model
from gpt2_xla.runtime.mesh import MeshShape, layout_in_use, mesh_mistakes, parameter_layout, parse_mesh

EIGHT = {"CPU_NUM_DEVICES": "8", **QUICK_XLA}
STEPS = 50
# An even vocabulary, so that tensor can cut it; 25 steps of warm-up keep the losses' differences from growing.
FLAGS = [
    *TINY,
    *("--num-heads", "4", "--vocab-size", "260", "--warmup-steps", "25", "--train-steps", str(STEPS)),
    *("--save-interval", "25", "--valid-interval", "25"),
]
TOLERANCE = 1e-5  # float32; measured 1e-6
LOSSES = STEPS + 3  # three validations
STATE = ("model.safetensors", "trainer_state/optimizer.safetensors")


def sharded(*flags):
    """The command of a run on a mesh."""
    return [*TRAIN_XLA, "--sharding", "fsdp", *flags]


def final_bytes(run_dir):
    return [(run_dir / f"step-{STEPS:08d}" / name).read_bytes() for name in STATE]


def all_losses(run_dir):
    return [*losses(run_dir), *losses(run_dir, "valid")]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, text_data):
    """The run of one torch process on the CPU."""
    folder = tmp_path_factory.mktemp("one_process") / "run"
    said_here(run_pretrain.main, *FLAGS, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", folder)
    assert len(all_losses(folder)) == LOSSES
    return folder


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory, text_data):
    """The same run on eight devices without --mesh: all of them on fsdp; and what it printed."""
    folder = tmp_path_factory.mktemp("eight_devices") / "run"
    return folder, run(*sharded(*FLAGS), *data_flags(text_data), "--checkpoints-dir", folder, **EIGHT)


def assert_same_run(folder, one_process):
    assert all_losses(folder) == pytest.approx(all_losses(one_process), abs=TOLERANCE)
    # The optimizer's zeros, the evaluation, the training step; nothing for saving, nothing later.
    assert [record["compiles"] for record in records(folder)] == [3] * STEPS


@pytest.mark.xla
def test_fsdp_on_eight_devices_equals_one_process_with_an_eighth_of_the_memory(eight_devices, one_process):
    folder, output = eight_devices
    assert_same_run(folder, one_process)
    parameters = sum(p.numel() for p in build_model(model_config(), 0, 1).parameters())
    megabytes = 3 * 4 * parameters / 8 / 1e6  # weights and two moments in float32
    assert f"mesh fsdp=8, parameters and optimizer state: {megabytes:.2f} MB per device" in output


@pytest.mark.xla
@pytest.mark.parametrize(
    ("mesh", "levers"),
    [
        ("data=8", ["--activation-checkpointing", "block", "--no-use-syncfree-optim"]),
        ("data=2,fsdp=2,tensor=2", ["--activation-checkpointing", "selective", "--vocab-multiple", "128"]),
    ],
)
def test_other_meshes_levers_and_optimizer_equal_one_process(mesh, levers, tmp_path, text_data, one_process):
    flags = [*FLAGS, "--mesh", mesh, *levers]
    run(*sharded(*flags), *data_flags(text_data), "--checkpoints-dir", tmp_path / "run", **EIGHT)
    assert_same_run(tmp_path / "run", one_process)


@pytest.mark.xla
def test_a_signal_saves_and_resume_is_bit_for_bit(tmp_path, text_data, eight_devices):
    folder, go_on = tmp_path / "run", tmp_path / "go_on"
    command = [*PYTHON, PAUSING_XLA, "--sharding", "fsdp", *FLAGS, *data_flags(text_data), "--checkpoints-dir", folder]
    process = start(*command, **EIGHT, PAUSE_AT="4", PAUSE_UNTIL=str(go_on))
    wait_for_step(process, folder, 3)
    output = stop_paused(process, signal.SIGTERM, go_on)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    stopped = max(int(path.name[5:]) for path in folder.glob("step-*"))
    assert f"stopped at step {stopped} of {STEPS}" in output
    run(*TRAIN_XLA, "--checkpoints-dir", folder, **EIGHT)  # sharded is one of the checkpoint's options
    assert final_bytes(folder) == final_bytes(eight_devices[0])


@pytest.mark.xla
@pytest.mark.parametrize("runtime", ["torch", "xla"])
def test_other_runtimes_continue_a_sharded_checkpoint(runtime, tmp_path, eight_devices, one_process):
    shutil.copytree(eight_devices[0] / "step-00000025", tmp_path / "step-00000025")
    if runtime == "torch":
        said_here(run_pretrain.main, "--device", "cpu", "--checkpoints-dir", tmp_path)
    else:
        run(*TRAIN_XLA, "--sharding", "none", "--checkpoints-dir", tmp_path, **QUICK_XLA)
    assert losses(tmp_path) == pytest.approx(losses(one_process)[25:], abs=TOLERANCE)


@pytest.mark.xla
def test_the_sharded_path_continues_the_checkpoint_of_one_process(tmp_path, one_process):
    shutil.copytree(one_process / "step-00000025", tmp_path / "step-00000025")
    run(*sharded("--mesh", "fsdp=4,tensor=2"), "--checkpoints-dir", tmp_path, **EIGHT)
    assert losses(tmp_path) == pytest.approx(losses(one_process)[25:], abs=TOLERANCE)


@pytest.fixture(scope="module")
def counted(tmp_path_factory, text_data):
    """A few steps in bf16 with dropout, accumulation and a chunked loss on data=2,fsdp=2,tensor=2; with the programs' text."""
    script, dump = str(ROOT / "tests" / "spmd_step_counters.py"), tmp_path_factory.mktemp("hlo")
    flags = f"{EIGHT['XLA_FLAGS']} --xla_dump_to={dump} --xla_dump_hlo_as_text"
    output = run(*PYTHON, script, str(text_data), "data=2,fsdp=2,tensor=2", **{**EIGHT, "XLA_FLAGS": flags})
    return {**printed_json(output), "programs": sorted(dump.glob("*after_optimizations.txt"))}


@pytest.mark.xla
def test_a_sharded_step_is_one_execution_without_compiling_or_fetching(counted):
    assert counted["first_step"]["CompileTime"] == 1
    assert counted["steps"] == {"CompileTime": 0, "ExecuteReplicatedTime": 10, "TransferFromDeviceTime": 0}
    assert counted["compiles_after_warm_up"] == 0


@pytest.mark.xla
def test_weights_and_optimizer_state_are_still_cut_after_training_and_saving(counted):
    tiles = counted["tiles"]
    assert tiles["blocks.0.mlp.c_fc.weight"] == tiles["exp_avg_sq.blocks.0.mlp.c_fc.weight"] == [2, 2]
    assert counted["bytes_per_device"] == 3 * counted["bytes"] / 4  # fsdp × tensor; data holds copies


@pytest.mark.xla
def test_devices_gather_weights_and_never_each_others_activations(counted):
    training = max(counted["programs"], key=lambda path: path.stat().st_size).read_text()
    found = re.findall(r"= \(?(?:f32|bf16)\[([\d,]*)\]\S* (all-gather|all-reduce)\(", training)
    collectives = {(kind, tuple(map(int, filter(None, sizes.split(","))))) for sizes, kind in found}
    # Of 8 sequences of 20 tokens a device has a quarter, and of 128 hidden units a half; C is 32.
    assert ("all-gather", (64, 32)) in collectives  # the MLP's first matrix, over fsdp
    assert ("all-reduce", (40, 32)) in collectives  # the MLP's outputs, over tensor
    assert not [shape for _, shape in collectives if 160 in shape or 80 in shape or shape[:2] == (8, 20)]


@pytest.mark.xla
def test_the_ways_of_several_hosts_come_to_the_same_on_one(counted):
    assert counted["cut_alike"]
    assert counted["sent_alike"]


def model_config(**changes):
    return ModelConfig(**{**dict(vocab_size=260, seq_length=32, d_model=64, num_layers=2, num_heads=4), **changes})


def test_each_device_holds_an_equal_share_of_every_parameter():
    shape = MeshShape(data=2, fsdp=4, tensor=2)
    for name, parameter in GPT(model_config()).named_parameters():
        layout = parameter_layout(name, tuple(parameter.shape), shape)
        assert sorted(axis for axes in layout for axis in axes) == ["fsdp", "tensor"], name


def test_matrices_are_cut_as_in_megatron_and_gathered_over_fsdp_alone():
    shape = MeshShape(fsdp=2, tensor=2)
    found = {}
    for name in ("mlp.c_fc.weight", "mlp.c_proj.weight", "attn.c_attn.weight", "wte.weight"):
        stored = parameter_layout(name, (8, 8), shape)
        found[name] = (stored, layout_in_use(name, stored))
    assert found == {
        "mlp.c_fc.weight": ((("tensor",), ("fsdp",)), (("tensor",), ())),
        "mlp.c_proj.weight": ((("fsdp",), ("tensor",)), ((), ("tensor",))),
        "attn.c_attn.weight": (((), ("fsdp", "tensor")), ((), ())),
        "wte.weight": ((("tensor",), ("fsdp",)), (("tensor",), ())),
    }
    # A vocabulary that tensor does not divide: the embedding is cut by C, and whole where it is used.
    assert parameter_layout("wte.weight", (7, 8), shape) == ((), ("fsdp", "tensor"))
    assert layout_in_use("wte.weight", ((), ("fsdp", "tensor"))) == ((), ())


def test_what_divides_nothing_is_not_cut():
    assert parameter_layout("ln_f.weight", (7,), MeshShape(fsdp=2)) == ((),)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fsdq=8", "unknown axis 'fsdq', did you mean fsdp?; axes are data, fsdp, tensor"),
        ("fsdp=0", "fsdp needs a number of devices, 1 or more"),
        ("fsdp", "fsdp needs a number of devices"),
        ("fsdp=4,fsdp=2", "names the axis fsdp twice"),
    ],
)
def test_a_mesh_that_is_none_is_told(text, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("mesh", "hosts", "eval_batch", "sentences"),
    [
        ("fsdp=8", 1, 8, []),
        ("data=2,tensor=2", 1, 8, ["is for 4 devices, but there are 8; use --mesh data=2,fsdp=2,tensor=2"]),
        ("tensor=8", 1, 8, ["--num-heads 4 is not divisible by tensor=8", "--d-ff 100 is not divisible by tensor=8"]),
        ("fsdp=2,tensor=4", 1, 4, []),
        # Several hosts: a tensor group's devices, too, are sent rows of their own.
        ("fsdp=2,tensor=4", 2, 4, ["--eval-batch-size 4 is not divisible by the 8 devices"]),
        # Heads of keys and values are cut too; two of them are too few for four devices.
        (
            "fsdp=2,tensor=4",
            1,
            8,
            ["--num-kv-heads 2 is not divisible by tensor=4 of --mesh fsdp=2,tensor=4; use tensor=1 or 2"],
        ),
        (None, 1, 4, ["--eval-batch-size 4 is not divisible by the 8 devices of the mesh's data × fsdp axes"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_with_one_that_does(mesh, hosts, eval_batch, sentences):
    groups = 2 if any("kv-heads" in sentence for sentence in sentences) else None
    config = PretrainConfig(
        model_config(d_ff=100, num_kv_heads=groups), DataConfig(train_batch_size=8, eval_batch_size=eval_batch)
    )
    found = mesh_mistakes(config, mesh, devices=8, hosts=hosts)
    assert len(found) == len(sentences)
    assert all(sentence in mistake for sentence, mistake in zip(sentences, found, strict=True))


def test_a_mesh_on_one_device_is_told_how_to_try_it():
    (found,) = mesh_mistakes(PretrainConfig(model_config()), "data=2", devices=1, hosts=1)
    assert found.endswith("there is one; leave --mesh out (or, to try it on the CPU, set CPU_NUM_DEVICES=2)")


@pytest.mark.xla
def test_mistakes_of_mesh_and_options_are_told_together_before_anything_is_built(tmp_path, text_data):
    flags = ["--mesh", "fsdp=4", "--mp-start-method", "fork", "--checkpoints-dir", tmp_path / "run"]
    process = start(*sharded(*FLAGS, *flags), *data_flags(text_data), **EIGHT)
    output = finish(process)
    assert process.returncode == 2
    assert "--mp-start-method fork has no meaning with --sharding fsdp" in output
    assert "--mesh fsdp=4 is for 4 devices, but there are 8; use --mesh fsdp=8" in output
    assert "Traceback" not in output
    assert "XLA_USE_SPMD" not in output  # torch_xla's warning, where SPMD is switched on twice
    assert not (tmp_path / "run").exists()
