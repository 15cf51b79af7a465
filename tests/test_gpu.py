"""On a CUDA device: no host sync in a step, precisions that agree with float32 on the CPU, clear refusals."""

import json

import pytest
import torch
from commands import TINY, TRAIN, data_flags, finish, losses, records, run, start, torchrun

from gpt2_xla.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TorchConfig, TorchPretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.model import build_model
from gpt2_xla.open_window import OpenWindow
from gpt2_xla.runtime.fp8 import float8_mistakes
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.train import Run, train_step
from gpt2_xla.training_log import TrainingLog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_float8 = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(float8_mistakes("cuda")), reason="needs a GPU with float8 units, and torchao"
)
STEPS = ["--train-steps", "60"]


@pytest.fixture(scope="module")
def cpu_float32(tmp_path_factory, text_data):
    folder = tmp_path_factory.mktemp("cpu") / "run"
    run(*TRAIN, *TINY, *data_flags(text_data), *STEPS, "--device", "cpu", "--checkpoints-dir", folder)
    return losses(folder)


@pytest.mark.parametrize(
    "flags, tolerance",
    [
        (["--mixed-precision", "no"], 1e-4),
        (["--mixed-precision", "bf16"], 3e-2),
        (["--mixed-precision", "fp16"], 1e-2),
        (["--mixed-precision", "bf16", "--compile"], 3e-2),
        (["--mixed-precision", "bf16", "--loss-chunk", "48"], 3e-2),
        pytest.param(["--mixed-precision", "fp8"], 5e-2, marks=needs_float8),
        pytest.param(["--mixed-precision", "fp8", "--compile"], 5e-2, marks=needs_float8),
    ],
)
def test_losses_agree_with_float32_on_the_cpu(flags, tolerance, tmp_path, text_data, cpu_float32):
    run(*TRAIN, *TINY, *data_flags(text_data), *STEPS, "--checkpoints-dir", tmp_path, *flags)
    assert losses(tmp_path) == pytest.approx(cpu_float32, abs=tolerance)


def test_the_batch_found_is_the_largest_that_fits_and_changes_no_loss(tmp_path, text_data):
    heavy = [*TINY, "--vocab-size", "32768", "--loss-chunk", "0", "--seq-length", "256", *data_flags(text_data)]
    heavy += [
        "--train-batch-size",
        "128",
        "--train-steps",
        "2",
        "--valid-interval",
        "0",
    ]  # 4 GiB of float32 logits at once
    run(*TRAIN, *heavy, "--checkpoints-dir", tmp_path / "whole")
    limit = ("--find-batch", "--memory-limit", "2")
    output = run(*TRAIN, *heavy, *limit, "--checkpoints-dir", tmp_path / "found")
    assert "  128: does not fit" in output
    assert "found --train-batch-size " in output
    assert losses(tmp_path / "found") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16", pytest.param("fp8", marks=needs_float8)])
def test_a_step_never_waits_for_the_device(precision, text_data, tmp_path):
    config = TorchPretrainConfig(
        ModelConfig(257, 32, 64, 2, 2, dropout=0.1),
        DataConfig((f"{text_data}/train",), train_batch_size=4, gradient_accum_step=2),
        OptimConfig(warmup_steps=5),
        RunConfig(train_steps=40, checkpoints_dir=str(tmp_path)),
        runtime=TorchConfig(mixed_precision=precision, device="cuda"),
    )
    runtime = TorchRuntime(config.runtime)
    model = build_model(config.model, 64, 1)
    data = PretrainingData.open(config, 0, 1)
    training = Run(config, runtime, data, model, runtime.place(model), runtime.build_optimizer(model, config.optim))
    log = TrainingLog(config, runtime, training.metrics, 1.0, data.train.epochs, OpenWindow())
    batches = runtime.batches(data.training(0, 40), rows_dim=1)
    for step in range(40):
        if step == 5:
            torch.cuda.set_sync_debug_mode("error")
        log.add(train_step(training, log.next_batch(batches)))
        training.step += 1
        log.step_done(training.step, 0)
    torch.cuda.set_sync_debug_mode("default")
    batches.close()


def test_fp16_resumes_with_its_scaler(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), *STEPS, "--mixed-precision", "fp16", "--save-interval", "30"]
    run(*TRAIN, *flags, "--checkpoints-dir", tmp_path)
    state = json.loads((tmp_path / "step-00000060" / "trainer_state" / "state.json").read_text())
    assert state["scaler"]["scale"] > 1
    run(*TRAIN, "--checkpoints-dir", tmp_path, "--train-steps", "70")
    assert len(records(tmp_path)) == 70


def test_more_processes_than_devices_is_one_sentence(tmp_path, text_data):
    count = torch.cuda.device_count() + 1
    flags = [*TINY, *data_flags(text_data), *STEPS, "--train-batch-size", str(8 * count)]
    process = start(*torchrun(count), *flags, "--eval-batch-size", str(8 * count), "--checkpoints-dir", tmp_path)
    output = finish(process)
    assert process.returncode != 0
    assert f"start at most {count - 1} processes" in output


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "flags, tolerance",
    [
        (["--mixed-precision", "no"], 1e-4),
        (["--mixed-precision", "bf16", "--activation-checkpointing", "block"], 3e-2),
        (["--mixed-precision", "bf16", "--compile"], 3e-2),
        (["--mixed-precision", "fp16"], 1e-2),
        pytest.param(["--mixed-precision", "fp8", "--compile"], 5e-2, marks=needs_float8),
    ],
)
def test_a_model_cut_up_over_two_devices_agrees_with_float32_on_the_cpu(
    flags, tolerance, tmp_path, text_data, cpu_float32
):
    command = [*torchrun(2), *TINY, *data_flags(text_data), *STEPS, "--sharding", "fsdp", "--checkpoints-dir", tmp_path]
    run(*command, *flags)
    assert losses(tmp_path) == pytest.approx(cpu_float32, abs=tolerance)


def test_memory_and_mfu_are_reported(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), *STEPS, "--mixed-precision", "bf16"]
    run(*TRAIN, *flags, "--checkpoints-dir", tmp_path)
    last = records(tmp_path)[-1]
    assert last["peak_memory_bytes"] > 2**20
    assert last["mfu"] is None or 0 < last["mfu"] < 1
