"""torchrun's processes with the model cut up between them: one process's losses, a share of its memory, its checkpoints."""

import json
import os
import shutil
import signal

import pytest
import torch
from commands import PYTHON, ROOT, TINY, data_flags, finish, losses, records, run, start, torchrun, wait_for_step
from sharded_training import CASES, POSSIBLE, STEPS, Training
from small_runs import FOUR_STEPS, run_here, said_here
from stopping import PAUSING

import run_pretrain
from gpt2_xla import checkpoint, loading
from gpt2_xla.cli import from_dict, parse
from gpt2_xla.config import TorchConfig, TorchPretrainConfig, XlaPretrainConfig, to_dict
from gpt2_xla.runtime.process_mesh import sharding_mistakes, sharding_note
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.validation import config_mistakes

PROCESSES = 4
needs_torchao = pytest.mark.skipif("fp8" not in POSSIBLE, reason="needs torchao")
EACH = [pytest.param(case, marks=needs_torchao) if case == "fp8" else case for case in CASES]
TOLERANCE = 1e-5  # float32: sums in another order; measured 1e-6
ROUNDED = {"bf16": 1e-2, "fp16": 1e-2, "fp8": 3e-2}  # of losses; measured 2e-3, 4e-4, 8e-3
DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp8": "torch.bfloat16"}  # of weights under way
LAST = 40
FLAGS = [*TINY, "--device", "cpu", "--train-steps", str(LAST), "--save-interval", "10", "--valid-interval", "20"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of four processes found (tests/sharded_training.py), and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("together")
    launch = [*PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    run(*launch, str(ROOT / "tests" / "sharded_training.py"), str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)], folder


def precision(case):
    return CASES[case][1].get("mixed_precision")


def alone(case):
    """The same training, in this process."""
    return Training(case, TorchRuntime(TorchConfig(device="cpu", mixed_precision="no")))


@pytest.mark.parametrize("case", EACH)
def test_four_processes_train_as_one_and_one_loads_what_they_saved(case, together):
    found, folder = together
    path = folder / case / f"step-{STEPS:08d}"
    assert checkpoint.problems(path) == []
    training, tolerance = alone(case), ROUNDED.get(precision(case), TOLERANCE)
    steps = [training.step() for _ in range(STEPS)]
    before = training.copies()
    loading.load(training.model, path)
    checkpoint.load_optimizer(path, training.tensors()[1])
    pairs = zip(before, training.copies(), strict=True)
    # Looser than for losses: Adam makes steps of gradients that are but rounding errors, as those of the keys' biases.
    assert precision(case) or all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)
    training.batch()  # that of the step that was skipped there
    values = [*steps, training.step(), [training.evaluate()]]
    loading.load(training.model, path)
    values[-1].append(training.evaluate())
    for process in found:
        theirs = [*process[case]["steps"], process[case]["after"], process[case]["losses"]]
        assert all(a == pytest.approx(b, abs=tolerance) for a, b in zip(theirs, values, strict=True))
        assert theirs == [*found[0][case]["steps"], found[0][case]["after"], found[0][case]["losses"]]  # to the bit


@pytest.mark.parametrize("case", EACH)
def test_each_process_holds_a_quarter_of_parameters_and_optimizer_state(case, together):
    whole = [sum(4 * value.numel() for value in named.values() if value.dim()) for named in alone(case).tensors()]
    shares = [process[case]["bytes"] for process in together[0]]
    copies = 2 if CASES[case][1].get("sharding") == "hsdp" else 1
    assert [sum(kind) for kind in zip(*shares, strict=True)] == [copies * size for size in whole]
    uneven = CASES[case][0]["vocab_size"] % PROCESSES  # 61 rows are 16, 16, 16 and 13
    limit = [copies * size / PROCESSES * (1.02 if uneven else 1.0) for size in whole]
    assert all(size <= most for share in shares for size, most in zip(share, limit, strict=True))


@pytest.mark.parametrize("case", EACH)
def test_what_is_not_finite_on_one_process_changes_nothing_on_any(case, together):
    for process in together[0]:
        assert torch.tensor(process[case]["skipped"]).isnan().tolist() == [False, True]
        assert process[case]["unchanged"]


@pytest.mark.parametrize("case", EACH)
def test_weights_loaded_after_an_evaluation_are_those_that_were_saved(case, together):
    assert all(process[case]["restored"] for process in together[0])


@pytest.mark.parametrize("case", EACH)
def test_gradients_travel_once_a_step_and_only_the_matmuls_weights_are_rounded(case, together):
    rounded_to = DTYPES.get(precision(case))
    for process in together[0]:
        # Two micro-steps; two blocks, what is around them, and the blocks' normalizations where those stay exact.
        assert process[case]["averaged"] == (5 if rounded_to else 3)
        rounded = {name for name, dtype in process[case]["dtypes"].items() if dtype != "torch.float32"}
        assert rounded == ({"blocks.1.attn.c_proj", "blocks.1.mlp.c_fc"} if rounded_to else set())
        assert {process[case]["dtypes"][name] for name in rounded} == ({rounded_to} if rounded_to else set())
        # In compiled blocks nobody looks: they were compiled before there was anyone to.
        assert len(process[case]["dtypes"]) == (1 if case == "compiled" else 4)


@needs_torchao
def test_float8_reaches_the_layers_that_are_cut_up(together):
    fp8, bf16 = (together[0][0][case] for case in ("fp8", "bf16"))
    assert fp8["steps"][0] != bf16["steps"][0]
    assert fp8["float8"]
    assert not bf16["float8"]


def last_losses(run_dir, kind="train"):
    """The loss that was logged last of each step, in the steps' order."""
    return [loss for _, loss in sorted({r["step"]: r["loss"] for r in records(run_dir, kind)}.items())]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, text_data):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one_process") / "run"
    flags = (*FLAGS, *data_flags(text_data), "--sample-interval", "20", "--checkpoints-dir", folder)
    said_here(run_pretrain.main, *flags)
    return folder


def test_a_run_of_two_processes_is_that_of_one_with_accumulation_recomputation_and_samples(
    tmp_path, text_data, one_process
):
    flags = [*FLAGS, "--sharding", "fsdp", "--train-batch-size", "2", "--gradient-accum-step", "4"]
    flags += ["--activation-checkpointing", "block", "--sample-interval", "20", "--checkpoints-dir", tmp_path]
    output = run(*torchrun(2), *flags, *data_flags(text_data))
    # 118,592 parameters and two moments of each, 4 bytes; one row of the 257 more than half.
    assert "mesh fsdp=2, parameters and optimizer state: 0.71 MB in the first process" in output
    for kind in ("train", "valid"):
        assert losses(tmp_path, kind) == pytest.approx(losses(one_process, kind), abs=TOLERANCE)
    texts = [[record["text"] for record in records(folder, "sample")] for folder in (tmp_path, one_process)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    ours, theirs = (checkpoint.read_weights(folder / f"step-{LAST:08d}") for folder in (tmp_path, one_process))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_killed_it_goes_on_with_other_processes_cut_in_another_way_and_then_with_one(tmp_path, text_data, one_process):
    folder, after = tmp_path / "run", tmp_path / "after"
    flags = (*FLAGS, *data_flags(text_data), "--sharding", "fsdp", "--checkpoints-dir", folder)
    process = start(*torchrun(2, PAUSING), *flags, PAUSE_AT="24")  # for ever
    wait_for_step(process, folder, 23)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    output = run(*torchrun(4), "--sharding", "hsdp", "--mesh", "data=2,fsdp=2", "--checkpoints-dir", folder)
    assert "mesh data=2,fsdp=2, parameters and optimizer state: 0.71 MB" in output
    for kind in ("train", "valid"):
        assert last_losses(folder, kind) == pytest.approx(losses(one_process, kind), abs=TOLERANCE)
    shutil.copytree(folder / "step-00000030", after / "step-00000030")
    names = [file.name for file in sorted((after / "step-00000030" / "trainer_state").glob("*.safetensors"))]
    assert names == ["optimizer-00000-000.safetensors", "optimizer-00001-000.safetensors"]  # of the first copy alone
    output = said_here(run_pretrain.main, "--checkpoints-dir", after)
    assert "note: the run's --sharding hsdp is pointless with one process" in output
    assert losses(after) == pytest.approx(losses(one_process)[30:], abs=TOLERANCE)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp", "hsdp"])
def test_sharding_with_one_process_is_a_note(sharding, monkeypatch, capsys, tmp_path, text_data):
    flags = [*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", tmp_path]
    assert run_here(monkeypatch, run_pretrain.main, *flags, "--sharding", sharding) == 0
    assert f"note: the run's --sharding {sharding} is pointless with one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processes", "per_host", "options", "sentence"),
    [
        (4, 4, {}, None),
        (4, 4, {"sharding": "fsdp", "mesh": "data=3"}, None),  # a checkpoint's --mesh says nothing
        (4, 2, {"sharding": "hsdp"}, None),
        (4, 4, {"sharding": "hsdp", "mesh": "data=2,fsdp=2"}, None),
        (2, 2, {"sharding": "none"}, "--sharding none is for one process, but torchrun starts 2"),
        (
            4,
            4,
            {"sharding": "hsdp", "mesh": "data=2,fsdp=3"},
            "is for 6 processes, but torchrun starts 4; use --mesh data=2,fsdp=2,",
        ),
        (5, 3, {"sharding": "hsdp"}, "5 processes are no whole number of hosts with 3 each; use --mesh fsdp=5,"),
        (1, 1, {"sharding": "hsdp", "mesh": "data=2,fsdp=3"}, None),
    ],
)
def test_processes_that_cannot_be_arranged_are_told(processes, per_host, options, sentence, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_host))
    found = sharding_mistakes(TorchConfig(**options))
    assert len(found) == (sentence is not None)
    assert all(sentence in mistake for mistake in found)


def test_one_copy_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sharding_note(TorchConfig(sharding="hsdp")).startswith("--sharding hsdp with one copy is fsdp")
    assert sharding_note(TorchConfig(sharding="hsdp", mesh="data=2,fsdp=2")) is None
    assert sharding_note(TorchConfig(sharding="fsdp")) is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--sharding fsdp --mesh data=2",
            "--mesh data=2 says how --sharding hsdp copies and cuts; add --sharding hsdp",
        ),
        ("--sharding hsdp --mesh tensor=2", "only run_pretrain_xla.py cuts along tensor"),
        ("--sharding hsdp --mesh dat=2", "unknown axis 'dat', did you mean data?"),
    ],
)
def test_options_that_do_not_go_together_are_told(flags, sentence):
    found = parse(TorchPretrainConfig, flags.split(), "")
    assert [mistake for mistake in config_mistakes(found.config, found.explicit) if sentence in mistake]


@pytest.mark.parametrize(
    ("ours", "theirs"), [(TorchPretrainConfig, XlaPretrainConfig), (XlaPretrainConfig, TorchPretrainConfig)]
)
def test_the_other_entry_points_sharding_is_not_taken_over(ours, theirs):
    flags = ["--sharding", "fsdp", "--mesh", "data=2,fsdp=2", "--seed", "7"]
    saved = to_dict(parse(theirs, flags, "").config)
    assert from_dict(ours, saved) == parse(ours, ["--seed", "7"], "").config
    assert from_dict(theirs, saved).runtime.sharding == "fsdp"
