"""Runs with Muon: the same losses on every runtime, resumed bit for bit, one program, checkpoints for all of them."""

import shutil

import pytest
from commands import PYTHON, QUICK_XLA, ROOT, TINY, TRAIN_XLA, data_flags, losses, printed_json, records, run, torchrun
from safetensors import safe_open
from small_runs import run_here, said_here

import run_pretrain

STEPS = 40
FLAGS = [
    *TINY,
    *("--optim-type", "muon", "--independent-weight-decay", "--weight-decay", "1e-4", "--decay-method", "wsd-sqrt"),
    *("--num-heads", "4", "--vocab-size", "260", "--warmup-steps", "20", "--train-steps", str(STEPS)),
    *("--save-interval", "20"),
]
STATE = ("model.safetensors", "trainer_state/optimizer.safetensors")
TOLERANCE = 1e-5  # float32; measured 1.5e-6
EIGHT = {"CPU_NUM_DEVICES": "8", **QUICK_XLA}


def final_bytes(run_dir):
    return [(run_dir / f"step-{STEPS:08d}" / name).read_bytes() for name in STATE]


def all_losses(run_dir):
    return [*losses(run_dir), *losses(run_dir, "valid")]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, text_data):
    """The run of one torch process on the CPU."""
    folder = tmp_path_factory.mktemp("one_process") / "run"
    flags = (*FLAGS, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", folder)
    output = said_here(run_pretrain.main, *flags)
    assert "muon for the blocks' matrices, adamw for the rest, independent weight decay 0.0001, lr" in output
    assert losses(folder)[-1] < 0.7 * losses(folder)[0]
    return folder


def test_a_resumed_run_is_bit_for_bit_and_holds_one_buffer_for_each_matrix(tmp_path, monkeypatch, one_process):
    shutil.copytree(one_process / "step-00000020", tmp_path / "step-00000020")
    assert run_here(monkeypatch, run_pretrain.main, "--checkpoints-dir", tmp_path) == 0
    assert final_bytes(tmp_path) == final_bytes(one_process)
    assert losses(tmp_path) == losses(one_process)[20:]
    with safe_open(tmp_path / "step-00000040" / STATE[1], "numpy") as file:
        kinds = {name: kind for kind, name in (key.split(".", 1) for key in file.keys())}  # noqa: SIM118
    muon = {name for name, kind in kinds.items() if kind == "momentum_buffer"}
    assert muon == {
        f"blocks.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_checkpoint_of_another_optimizer_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, one_process):
    shutil.copytree(one_process / "step-00000020", tmp_path / "step-00000020")
    assert run_here(monkeypatch, run_pretrain.main, "--checkpoints-dir", tmp_path, "--optim-type", "adamw") == 2
    said = "--optim-type adamw conflicts with step-00000020, which has muon: their states are different; leave the flag out"
    assert said in capsys.readouterr().err


def test_gloo_processes_equal_one_process(tmp_path, text_data, one_process):
    flags = ("--train-batch-size", "4", "--gradient-accum-step", "2", "--device", "cpu")
    run(*torchrun(2), *FLAGS, *flags, *data_flags(text_data), "--checkpoints-dir", tmp_path)
    assert all_losses(tmp_path) == pytest.approx(all_losses(one_process), abs=TOLERANCE)


@pytest.mark.xla
def test_xla_equals_torch_compiles_once_resumes_bit_for_bit_and_torch_continues_it(tmp_path, text_data, one_process):
    flags = [*FLAGS, *data_flags(text_data), "--max-recompiles", "0"]
    run(*TRAIN_XLA, *flags, "--checkpoints-dir", tmp_path / "xla", **QUICK_XLA)
    assert all_losses(tmp_path / "xla") == pytest.approx(all_losses(one_process), abs=TOLERANCE)
    found = records(tmp_path / "xla")
    assert found[0]["compiles"] == found[-1]["compiles"] == 2  # the optimizer's zeros, the step
    # One a step, counted when it ends: the step after a record's may have ended by then, or not.
    assert found[18]["executions"] - found[8]["executions"] == pytest.approx(10, abs=1)
    for name in ("again", "torch"):
        shutil.copytree(tmp_path / "xla" / "step-00000020", tmp_path / name / "step-00000020")
    run(*TRAIN_XLA, "--checkpoints-dir", tmp_path / "again", **QUICK_XLA)
    said_here(run_pretrain.main, "--device", "cpu", "--checkpoints-dir", tmp_path / "torch")
    assert final_bytes(tmp_path / "again") == final_bytes(tmp_path / "xla")
    assert losses(tmp_path / "torch") == pytest.approx(losses(tmp_path / "xla")[20:], abs=TOLERANCE)


@pytest.mark.xla
def test_a_mesh_equals_one_process_and_continues_its_checkpoint(tmp_path, text_data, one_process):
    sharded = (*TRAIN_XLA, "--sharding", "fsdp", "--mesh", "fsdp=4,tensor=2", "--max-recompiles", "0")
    run(*sharded, *FLAGS, *data_flags(text_data), "--checkpoints-dir", tmp_path / "mesh", **EIGHT)
    assert all_losses(tmp_path / "mesh") == pytest.approx(all_losses(one_process), abs=TOLERANCE)
    shutil.copytree(one_process / "step-00000020", tmp_path / "on" / "step-00000020")
    run(*sharded, "--checkpoints-dir", tmp_path / "on", **EIGHT)
    assert losses(tmp_path / "on") == pytest.approx(losses(one_process)[20:], abs=TOLERANCE)


@pytest.mark.xla
def test_a_step_that_is_not_finite_is_skipped_on_the_device(text_data):
    output = run(*PYTHON, str(ROOT / "tests" / "xla_muon_steps.py"), **QUICK_XLA)
    # Good, NaN and good gradients, and an infinite loss; and the steps of a schedule that reaches 0 and a NaN: all one program.
    assert printed_json(output) == {
        "changed_nothing": [False, True, False, True],
        "finite": True,
        "compiles": 0,
    }
