"""Two runs never write into one folder at the same time."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import PYTHON, ROOT, data_flags, finish, records, start, wait_for_step
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla import run_folder, startup
from gpt2_xla.config import PretrainConfig, RunConfig
from gpt2_xla.errors import UserError
from gpt2_xla.run_folder import own_run_folder

DATA = SimpleNamespace(save_tokenizer=lambda folder: None)
HOLD = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"

# run_pretrain.py that waits for another run as long as it takes, on however slow a machine.
PATIENT = """
import sys, run_pretrain
from gpt2_xla import run_folder
from gpt2_xla.errors import run_main
run_folder.PATIENCE = 600
sys.exit(run_main(run_pretrain.main))
"""


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(run=RunConfig(checkpoints_dir=str(tmp_path / "run")))


def test_a_folder_in_use_is_refused_and_left_alone_until_its_process_is_gone(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(run_folder, "PATIENCE", 0.3)
        with pytest.raises(UserError, match="is in use by another run"), own_run_folder(config, DATA):
            pass
        assert list(folder.iterdir()) == []
    finally:
        other.kill()
        other.communicate()
    monkeypatch.setattr(run_folder, "PATIENCE", 20.0)  # the kernel drops the lock of a process that was killed
    with own_run_folder(config, DATA):
        assert (folder / "config.json").is_file()


def test_the_lock_ends_with_the_run(config):
    for _ in range(2):
        with own_run_folder(config, DATA):
            pass


def test_who_only_looks_waits_for_a_run_but_not_for_others_who_look(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.5)
    said: list[str] = []
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        run_folder.await_others(tmp_path, said.append)
        run_folder.await_others(tmp_path / "absent", said.append)
        assert said == []
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another run"):
            run_folder.await_others(tmp_path, said.append)
    finally:
        os.close(handle)
    assert said == [f"waiting for the run that holds {tmp_path}, 0.5 s at most"]
    run_folder.await_others(tmp_path, said.append)
    assert not (tmp_path / "absent").exists()


def test_a_command_that_waited_for_a_run_continues_from_its_last_checkpoint(tmp_path, text_data):
    """The first run holds its folder until the second has said that it waits; at that time it has a checkpoint of step 1."""
    folder, go_on = tmp_path / "run", tmp_path / "go_on"
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", folder, "--save-interval", 1)
    first = start(
        *PYTHON,
        ROOT / "tests" / "pausing_run.py",
        *(*flags, "--saved-checkpoint-limit", 1),
        PAUSE_AT="2",
        PAUSE_UNTIL=str(go_on),
    )
    second = None
    try:
        wait_for_step(first, folder, 1)
        second = start(*PYTHON, "-c", PATIENT, *flags, "--learning-rate", 5e-4, "--train-steps", 5)
        assert second.stdout is not None
        heard = next(
            (line for line in second.stdout if line.startswith(f"waiting for the run that holds {folder}")), ""
        )
        assert heard, "the second run did not wait"
        go_on.touch()
        printed, others = finish(first), finish(second)
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    assert (first.returncode, second.returncode) == (0, 0), printed + others
    assert f"resuming after step 4 of 5 from {folder / 'step-00000004'}\n" in others
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4, 5]


def test_a_folder_written_to_after_the_choice_is_left_alone(tmp_path, text_data, monkeypatch, capsys):
    """Another run takes the folder, and is done with it, while this one starts up: the choice to begin anew is out of date."""
    folder, other = tmp_path / "run", tmp_path / "other"
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir")
    assert run_here(monkeypatch, run_pretrain.main, *flags, other) == 0
    choose = startup.pretrain_start

    def choose_late(*arguments):
        chosen = choose(*arguments)
        shutil.copytree(other, folder)
        return chosen

    monkeypatch.setattr(startup, "pretrain_start", choose_late)
    before = {path: path.read_bytes() for path in sorted(other.rglob("*")) if path.is_file()}
    capsys.readouterr()
    assert run_here(monkeypatch, run_pretrain.main, *flags, folder, "--learning-rate", 5e-4) == 2
    said = capsys.readouterr().err
    assert (
        f"error: another run has written to --checkpoints-dir {folder} since this command chose where to begin" in said
    )
    assert {
        other / path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == before
    monkeypatch.setattr(startup, "pretrain_start", choose)
    assert run_here(monkeypatch, run_pretrain.main, *flags, folder) == 0  # the lock went with the refusal
    assert "resuming after step 4 of 4" in capsys.readouterr().err
