"""The loop waits for a copy alone; what goes wrong in the background is raised in the loop; a copy is all the memory it takes."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import PATIENCE, data_flags
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla import checkpoint, checkpoint_parts
from gpt2_xla.checkpoint import SaveError
from gpt2_xla.config import ModelConfig, OptimConfig, PretrainConfig, RunConfig, TorchConfig
from gpt2_xla.ledger import Ledger
from gpt2_xla.model import GPT
from gpt2_xla.open_window import OpenWindow
from gpt2_xla.optim import build_torch_optimizer, named_state, prime_state
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.saving import Saver, restore
from gpt2_xla.watchdog import Unwatched

MODEL = ModelConfig(vocab_size=61, seq_length=16, d_model=32, num_layers=2, num_heads=2)


class Data:
    """As much of the training data as a save and a restore look at."""

    manifest = SimpleNamespace(tokenizer="bytes", tokenizer_hash="1", end_of_text=60)
    fingerprint = "2"

    def check_tokenizer(self, *_):
        pass


def small_run(folder: Path, step: int = 1, seed: int = 0, keep: int = 3, **options: object) -> SimpleNamespace:
    """A run of a tiny model at `step`, with random moments."""
    config = PretrainConfig(MODEL, run=RunConfig(checkpoints_dir=str(folder), saved_checkpoint_limit=keep, **options))
    model = GPT(MODEL)
    model.initialize(seed)
    optimizer = build_torch_optimizer(model, OptimConfig(), fused=False)
    prime_state(model, optimizer)
    for value in named_state(model, optimizer).values():
        torch.nn.init.normal_(value)
    runtime = TorchRuntime(TorchConfig(device="cpu"))
    return SimpleNamespace(
        config=config, runtime=runtime, model=model, optimizer=optimizer, data=Data(), step=step, samples=8 * step,
        saved_step=0, best_valid_loss=float("inf"), metrics=SimpleNamespace(wandb_id=None), phases=Unwatched(),
        ledger=Ledger(), recent_losses=[], open_window=OpenWindow(),
        saver=Saver(config, 0, 1),
    )  # fmt: skip


def state_of(run):
    tensors = {**dict(run.model.named_parameters()), **named_state(run.model, run.optimizer)}
    return {name: value.detach().clone() for name, value in tensors.items()}


def saved_state(path: Path) -> dict[str, torch.Tensor]:
    run = small_run(path.parent, seed=9)
    restore(run, path)
    return state_of(run)


@pytest.fixture
def gate(monkeypatch):
    """Background saves wait until it is set."""
    gate, original = threading.Event(), checkpoint.save

    def save(*arguments, **named):
        assert gate.wait(PATIENCE)
        return original(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save", save)
    yield gate
    gate.set()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_loop_goes_on_while_a_save_is_written_and_the_save_holds_the_moment_of_its_call(tmp_path, gate):
    run = small_run(tmp_path)
    before = state_of(run)
    run.saver.save(run, None)
    assert (run.saved_step, checkpoint.checkpoints(tmp_path)) == (1, [])
    with torch.no_grad():  # training goes on, in place
        for value in (*run.model.parameters(), *named_state(run.model, run.optimizer).values()):
            value.add_(1)
    run.saver.check()  # does not wait
    gate.set()
    run.saver.wait()
    assert same(saved_state(tmp_path / "step-00000001"), before)


def test_a_second_save_waits_for_the_first_and_overwrites_none_of_it(tmp_path, gate):
    run = small_run(tmp_path)
    before = state_of(run)
    run.saver.save(run, None)
    with torch.no_grad():
        run.model.wte.weight.add_(1)
    run.step = 2
    second = threading.Thread(target=run.saver.save, args=(run, None))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert run.saved_step == 1
    gate.set()
    second.join(60)
    run.saver.wait()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]
    assert same(saved_state(tmp_path / "step-00000001"), before)
    assert same(saved_state(tmp_path / "step-00000002"), state_of(run))


def test_a_strict_error_in_the_background_is_raised_once_at_the_next_boundary(tmp_path):
    (tmp_path / "file").write_text("")
    run = small_run(tmp_path / "file" / "run", strict_saving=True)
    run.saver.save(run, None)
    run.saver.close()  # it has ended, and nobody was told yet
    with pytest.raises(SaveError, match="Not a directory"):
        run.saver.check()
    run.saver.check()
    run.saver.wait()


def test_a_strict_error_is_raised_by_the_next_save_and_by_waiting_too(tmp_path):
    (tmp_path / "file").write_text("")
    for method in (lambda run: run.saver.save(run, None), lambda run: run.saver.wait()):
        run = small_run(tmp_path / "file" / "run", strict_saving=True)
        run.saver.save(run, None)
        with pytest.raises(SaveError):
            method(run)


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, gate, monkeypatch):
    gate.set()
    run = small_run(tmp_path, keep=1)
    run.saver.save(run, None)
    run.saver.wait()
    gate.clear()
    run.step = 2
    run.saver.save(run, None)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
    gate.set()
    run.saver.wait()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002"]


def in_the_way(run_dir: Path, step: int) -> Path:
    """A file that keeps the save of a step from being written, also for root, whom no permission stops."""
    file = run_dir / f".step-{step:08d}.partial"
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    return file


def test_a_save_that_fails_is_a_warning_and_the_next_one_tries_again(tmp_path, text_data, monkeypatch, capfd):
    file = in_the_way(tmp_path, 2)
    flags = [*FOUR_STEPS, *data_flags(text_data), "--save-interval", "1", "--checkpoints-dir", tmp_path]
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"step-0000000{step}" for step in (4, 3, 1)]
    warning = f"warning: could not save checkpoint {tmp_path}/step-00000002: File exists; the last good one, step-00000001, is untouched; training goes on, the next save tries again"
    assert warning in capfd.readouterr().err
    file.unlink()


def test_a_final_save_that_fails_is_no_success(tmp_path, text_data, monkeypatch, capfd):
    in_the_way(tmp_path, 4)
    flags = [*FOUR_STEPS, *data_flags(text_data), "--save-interval", "2", "--checkpoints-dir", tmp_path]
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 2
    assert f"error: could not save checkpoint {tmp_path}/step-00000004: File exists" in capfd.readouterr().err
    assert checkpoint.problems(tmp_path / "step-00000002") == []


def test_with_strict_saving_a_failed_save_ends_the_run(tmp_path, text_data, monkeypatch, capfd):
    in_the_way(tmp_path, 2)
    flags = [*FOUR_STEPS, *data_flags(text_data), "--save-interval", "2", "--checkpoints-dir", tmp_path]
    assert run_here(monkeypatch, run_pretrain.main, *flags, "--strict-saving") == 2
    assert f"error: could not save checkpoint {tmp_path}/step-00000002: File exists" in capfd.readouterr().err
    assert checkpoint.checkpoints(tmp_path) == []


def test_a_full_disk_costs_that_save_alone(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = small_run(disk)
        run.saver.save(run, None)
        run.saver.wait()
        (disk / "fill").write_bytes(bytes(shutil.disk_usage(disk).free - 65536))
        run.step = 2
        run.saver.save(run, None)
        run.saver.wait()
        assert [path.name for path in disk.iterdir() if path.name != "fill"] == ["step-00000001"]
        assert checkpoint.problems(disk / "step-00000001") == []
        with pytest.raises(SaveError, match="No space left on device; the last good one, step-00000001"):
            run.saver.finish(run)
        (disk / "fill").unlink()
        run.step = 3
        run.saver.save(run, None)
        run.saver.finish(run)
        assert checkpoint.problems(disk / "step-00000003") == []
        run.saver.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_process_that_cannot_write_its_part_keeps_nobody_waiting(tmp_path):
    part = checkpoint_parts.part_folder(tmp_path, 1, 1, 1)
    (tmp_path / f".{part.name}.partial").write_text("")
    with pytest.raises(FileExistsError):
        checkpoint_parts.write_part(part, 1, [], [])
    with pytest.raises(OSError, match=r"the process that writes .*part-1 failed: File exists"):
        checkpoint_parts.take_in(None, [part])
    (tmp_path / f".{part.name}.partial").unlink()
    checkpoint_parts.remove_all(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_of_the_last_save_is_gone_after_a_restart(tmp_path, text_data, monkeypatch):
    flags = [*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", tmp_path]
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    for suffix in ("partial", "old", "deleted"):
        (tmp_path / f".step-00000004.{suffix}").mkdir()
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_no_credential_reaches_the_logs_or_the_files_of_a_run(tmp_path, text_data, monkeypatch, capfd):
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef", "HF_TOKEN": "hf_SECRETSECRETSECRET"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    flags = [*FOUR_STEPS, *data_flags(text_data), "--save-interval", "2", "--checkpoints-dir", tmp_path]
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    shown = capfd.readouterr()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    for value in secrets.values():
        assert value not in shown.out + shown.err
        assert not [True for content in written if value.encode() in content]


MEMORY = """
import os, resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_saving
from gpt2_xla.config import ModelConfig
test_saving.MODEL = ModelConfig(vocab_size=6000, seq_length=64, d_model=256, num_layers=10, num_heads=8)

def resident(kind):  # in bytes; anonymous memory alone: pages of mapped files are the system's to drop
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

import threading, time
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, resident("Anonymous"))
        time.sleep(0.005)

folder, what = Path(sys.argv[1]), sys.argv[2]
test_saving.small_run(folder)  # whatever is allocated once
run = test_saving.small_run(folder)
tiny = test_saving.state_of(run)
size = sum(value.numel() * value.element_size() for value in tiny.values())
del tiny
before = resident("Anonymous")
thread = threading.Thread(target=watch)
thread.start()
if what == "save":
    run.saver.save(run, None)
    run.saver.wait()
else:
    test_saving.restore(run, folder / "step-00000001")
stop = True
thread.join()
print(size, peak - before)
"""


def peak_share(folder: Path, what: str) -> float:
    """The memory that a save or a load takes beside the state, as a share of its size."""
    root = Path(__file__).resolve().parent.parent
    # The allocator gives freed blocks back at once, so that nothing is hidden in blocks freed before.
    environment = {
        **os.environ,
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, "-c", MEMORY, str(folder), what]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert size > 100e6
    return peak / size


def test_a_save_takes_one_copy_of_the_state_and_a_load_next_to_nothing(tmp_path):
    assert 0.9 < peak_share(tmp_path, "save") <= 1.1
    # Into tensors that are there already: nothing but the tensor that is being read.
    assert peak_share(tmp_path, "load") <= 0.1
