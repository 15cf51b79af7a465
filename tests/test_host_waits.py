"""The host asks the device for nothing between two lines of the log: counted in the program's own loop."""

import threading
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_xla.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TorchConfig,
    TorchPretrainConfig,
)
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.metrics import open_metrics
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.train import start_run, train

STEPS, LOG_INTERVAL = 22, 5
METHODS = ("item", "tolist", "cpu", "numpy")
# Their results, or the shapes of these, depend on values, for which a device must be waited. bool(), int() and float() are
# the first one.
OPERATIONS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


class Waits(TorchDispatchMode):
    """Counts what this thread asks of tensors, by step: (step, what) → times. Also a metrics sink, to hear of the steps.

    `read` counts what the thread asks that waits for the log's sums, of which the loop takes no notice.
    """

    def __init__(self):
        super().__init__()
        self.found, self.read, self.step, self.written = Counter(), Counter(), 1, []
        self._thread, self._patches = threading.current_thread(), ExitStack()

    def __enter__(self):
        for name in METHODS:
            self._patches.callback(setattr, torch.Tensor, name, getattr(torch.Tensor, name))
            setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def _counted(self, name, method):
        def counted(*args, **kwargs):
            if threading.current_thread() is self._thread:
                self.found[self.step, name] += 1
            elif threading.current_thread().name.startswith("log reader"):
                self.read[name] += 1
            return method(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in OPERATIONS or masks:
            self.found[self.step, name] += 1
        return func(*args, **(kwargs or {}))

    def advance(self, step):
        self.step = step + 1

    def write(self, record):
        self.written.append((self.step, record["step"]))

    def close(self):
        pass


class ErrorsOnWaits:
    """A metrics sink: from the third step on CUDA raises an error where the host would wait for the device."""

    def advance(self, step):
        torch.cuda.set_sync_debug_mode("error" if 2 < step < STEPS else "default")

    def write(self, record):
        pass

    def close(self):
        torch.cuda.set_sync_debug_mode("default")


def configuration(text_data, folder, device, optimizer="adamw", **runtime):
    return TorchPretrainConfig(
        ModelConfig(257, 32, 64, 2, 2, dropout=0.1),
        DataConfig((f"{text_data}/train",), train_batch_size=4, gradient_accum_step=2),
        OptimConfig(optimizer, warmup_steps=5),
        RunConfig(train_steps=STEPS, checkpoints_dir=str(folder), hang_timeout=0.0),
        LoggingConfig(log_interval=LOG_INTERVAL),
        TorchConfig(device=device, **runtime),
    )


def train_with(config, sink):
    """The program's own loop, with its sinks and one more."""
    runtime = TorchRuntime(config.runtime)
    run, _ = start_run(config, runtime, PretrainingData.open(config, 0, 1))
    run.metrics = open_metrics(config, 0, 0)
    run.metrics.sinks.append(sink)
    try:
        train(run)
    finally:
        run.saver.close()
        run.ledger.close()
        run.metrics.close()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "bf16", "loss_chunk": 48, "activation_checkpointing": "block"},
        {"mixed_precision": "bf16", "optimizer": "muon", "loss_chunk": 0},
    ],
)
def test_only_the_log_is_fetched(device, options, text_data, tmp_path):
    with Waits() as waits:
        train_with(configuration(text_data, tmp_path, device, **options), waits)
    assert_only_the_log_is_fetched(waits)


def assert_only_the_log_is_fetched(waits):
    assert {key for key in waits.found if key[0] <= STEPS} == set()  # then comes the checkpoint
    windows = [*range(LOG_INTERVAL, STEPS, LOG_INTERVAL), STEPS]
    assert waits.read == {"tolist": len(windows)}
    # A window's sums are taken when the step after it is queued: the device has long computed them.
    assert waits.written[: len(windows) - 1] == [(step + 1, step) for step in windows[:-1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("precision", "optimizer"), [("no", "adamw"), ("bf16", "adamw"), ("fp16", "adamw"), ("bf16", "muon")]
)
def test_the_loop_never_waits_for_a_gpu(precision, optimizer, text_data, tmp_path):
    try:
        train_with(configuration(text_data, tmp_path, "cuda", optimizer, mixed_precision=precision), ErrorsOnWaits())
    finally:
        torch.cuda.set_sync_debug_mode("default")
