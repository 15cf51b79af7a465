"""Two runs never write into one folder at the same time."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from gpt2_xla import run_folder
from gpt2_xla.config import PretrainConfig, RunConfig
from gpt2_xla.errors import UserError
from gpt2_xla.run_folder import own_run_folder

DATA = SimpleNamespace(save_tokenizer=lambda folder: None)
HOLD = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


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
