"""Checkpoints come back bit for bit; no damage, full disk or kill loses the last good one or goes unnoticed."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import PATIENCE

from gpt2_xla import checkpoint, checkpoint_files, loading
from gpt2_xla.checkpoint import SaveError, TrainerState
from gpt2_xla.config import ModelConfig, OptimConfig, PretrainConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.optim import build_torch_optimizer, named_state, prime_state
from gpt2_xla.shares import whole_shares

MODEL = ModelConfig(vocab_size=61, seq_length=16, d_model=32, num_layers=2, num_heads=2, dropout=0.1)


def model_of(config: ModelConfig = MODEL, seed: int = 0) -> GPT:
    model = GPT(config)
    model.initialize(seed)
    return model


def state_at(step: int, valid_loss: float | None = None, model: ModelConfig = MODEL) -> TrainerState:
    return TrainerState(step, samples=step * 8, config=to_dict(PretrainConfig(model=model)), valid_loss=valid_loss)


def save(run_dir: Path, step: int, valid_loss: float | None = None, seed: int = 0) -> Path:
    return checkpoint.save(run_dir, state_at(step, valid_loss), whole_shares(model_of(seed=seed).state_dict()), [], 60)


def steps(run_dir: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoint.checkpoints(run_dir)]


def hidden(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.iterdir() if path.name.startswith(".")]


def test_everything_comes_back_bit_for_bit(tmp_path):
    model = model_of()
    optimizer = build_torch_optimizer(model, OptimConfig(), fused=False)
    prime_state(model, optimizer)
    tokens = torch.randint(61, (4, 17))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    state = TrainerState(
        step=1000,
        samples=8000,
        config=to_dict(PretrainConfig(model=MODEL)),
        valid_loss=0.1 + 0.2,
        best_valid_loss=3,
        data_fingerprint="abc",
        tokenizer="bytes",
        tokenizer_hash="def",
        scaler={"scale": 65536.0, "growth_tracker": 3},
        wandb_id="né",
    )
    tokenizer_files = tmp_path / "tokenizer"
    tokenizer_files.mkdir()
    (tokenizer_files / "tokenizer.json").write_text("{}")
    named = named_state(model, optimizer)
    path = checkpoint.save(
        tmp_path / "run", state, whole_shares(model.state_dict()), whole_shares(named), 60, tokenizer_files
    )

    assert path == tmp_path / "run" / "step-00001000"
    assert checkpoint.problems(path) == []
    assert hidden(path.parent) == []
    # safetensors would let only the owner read: not what a shared run folder needs.
    assert len({file.stat().st_mode for file in path.rglob("*") if file.is_file()}) == 1
    assert checkpoint.read_state(path) == state
    assert checkpoint.read_model_config(path) == MODEL
    assert (path / "tokenizer.json").read_text() == "{}"
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 60
    other = model_of(seed=1)
    loading.load(other, path)
    assert other.lm_head.weight is other.wte.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    loaded = {name: torch.full_like(value, -1) for name, value in named.items()}
    checkpoint.load_optimizer(path, loaded)
    assert all(torch.equal(loaded[name], named[name]) for name in named)


def test_checkpoints_are_listed_newest_first_and_nothing_else_is(tmp_path):
    for step in (900, 100_000_000, 1000):
        save(tmp_path, step)
    (tmp_path / ".step-00002000.partial").mkdir()
    (tmp_path / "step-latest").mkdir()
    (tmp_path / "step-00003000").write_text("a file")
    assert steps(tmp_path) == [100_000_000, 1000, 900]
    assert checkpoint.checkpoints(tmp_path / "nowhere") == []


def test_prune_keeps_the_last_written_and_the_best(tmp_path):
    for step, loss in ((1, 3.0), (2, 2.4), (3, 2.0), (4, None), (5, 2.5), (6, None)):
        save(tmp_path, step, loss)
    checkpoint.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [6, 5, 3]
    assert hidden(tmp_path) == []


def test_prune_keeps_what_was_just_saved_after_a_fallback_over_a_damaged_newer_one(tmp_path):
    save(tmp_path, 100)
    (save(tmp_path, 200) / "config.json").write_text("")
    save(tmp_path, 150)
    checkpoint.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [150]


def cut(path: Path) -> None:
    os.truncate(path / "model.safetensors", 1000)


def flip(path: Path) -> None:
    data = bytearray((path / "trainer_state/optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "trainer_state/optimizer.safetensors").write_bytes(data)


def lose(path: Path) -> None:
    (path / "config.json").unlink()


def empty_record(path: Path) -> None:
    (path / checkpoint_files.RECORD).write_text("")


def lose_record(path: Path) -> None:
    (path / checkpoint_files.RECORD).unlink()


def escape(path: Path) -> None:
    record = json.loads((path / checkpoint_files.RECORD).read_text())
    record["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (path / checkpoint_files.RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "harm, says",
    [
        (cut, "model.safetensors has 1,000 bytes instead of"),
        (flip, "optimizer.safetensors was altered"),
        (lose, "config.json is missing"),
        (empty_record, "COMPLETE is not valid JSON"),
        (lose_record, "COMPLETE is missing"),
        (escape, "outside of the checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, harm, says):
    optimizer = {"exp_avg.wte.weight": torch.randn(61, 32)}
    for step in (1, 2):
        checkpoint.save(tmp_path, state_at(step), whole_shares(model_of().state_dict()), whole_shares(optimizer))
    assert checkpoint.newest_good(tmp_path, print).name == "step-00000002"
    harm(tmp_path / "step-00000002")
    said = []
    assert checkpoint.newest_good(tmp_path, said.append).name == "step-00000001"
    assert len(said) == 2
    assert "step-00000002 is damaged" in said[0]
    assert says in said[0]
    assert said[1].endswith("step-00000001")
    # Generating text needs no optimizer.
    assert checkpoint.resolve(str(tmp_path), said.append).name == f"step-0000000{2 if harm is flip else 1}"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"step": "7"}, "'step' is '7'; expected int"),
        ({"step": True}, "'step' is 'True'"),
        ({"samples": -1}, "'samples' is -1"),
        ({"config": []}, "'config' is"),
        ({"valid_loss": "low"}, "'valid_loss' is 'low'; expected float"),
        ({"scaler": 3}, "'scaler' is"),
        ({"recent_losses": [2.5, "low"]}, "'recent_losses' is .*; expected numbers"),
        ({"open_window": {"steps": 1, "loss": "low"}}, "'open_window' is .*; expected the sums of a log window"),
        ({"open_window": {"steps": 1.5}}, "'open_window' is"),
        ({"open_window": {"steps": -3}}, "'open_window' is"),
        ({"open_window": {"steps": 2**70}}, "'open_window' is"),
        ({"open_window": {"steps": 3, "skipped": 4.0}}, "'open_window' is"),
        ({"open_window": {"skipped_in_a_row": 1e300}}, "'open_window' is"),
        ({"open_window": {"loss": 10**400}}, "'open_window' is"),
        ({"recent_losses": [10**400]}, "'recent_losses' is"),
        ({"best_valid_loss": 10**400}, "'best_valid_loss' is 1000.*; expected a number"),
        ({"open_window": {"stops": 1}}, "'open_window' is"),
        ({"open_window": [1]}, "'open_window' is .*; expected dict"),
    ],
)
def test_odd_values_in_the_state_are_named(tmp_path, changes, says):
    file = save(tmp_path, 1) / checkpoint.STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=says):
        checkpoint.read_state(tmp_path / "step-00000001")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"step": 1e999}', '"\\ud800"', "\xff", '{"config": {}}']
)
def test_malformed_state_is_a_users_error(tmp_path, text):
    path = save(tmp_path, 1)
    (path / checkpoint.STATE).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError):
        checkpoint.read_state(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle.", b"\xff" * 64, (2**60).to_bytes(8, "little") + b"{}"])
def test_a_weights_file_that_is_no_safetensors_is_a_users_error(tmp_path, data):
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="not a valid safetensors file"):
        checkpoint.read_weights(path)


def test_weights_of_another_model_are_refused_and_nothing_is_copied(tmp_path):
    path = save(tmp_path, 1)
    model, weights = model_of(seed=1), checkpoint.read_weights(path)
    weights["stranger"] = weights.pop("ln_f.bias")
    weights["wpe.weight"] = torch.zeros(8, 32)
    with pytest.raises(UserError) as caught:
        checkpoint.check_weights(model, weights)
    assert sorted(caught.value.mistakes) == [
        "weight ln_f.bias is missing",
        "weight stranger is not in the model",
        "weight wpe.weight is 8 x 32; the model's is 16 x 32",
    ]
    larger = GPT(dataclasses.replace(MODEL, d_ff=8))
    before = larger.wte.weight.clone()
    with pytest.raises(UserError, match="mlp"):
        loading.load(larger, path)
    assert torch.equal(larger.wte.weight, before)


def test_resolve_finds_what_a_user_means(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        save(run, step)
    assert checkpoint.resolve(str(run)) == run / "step-00000002"
    assert checkpoint.resolve(str(run / "step-00000001")) == run / "step-00000001"
    model_only = tmp_path / "exported"
    model_only.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model_only / name).write_bytes((run / "step-00000001" / name).read_bytes())
    assert checkpoint.resolve(str(model_only)) == model_only
    assert not checkpoint.has_state(model_only)


def test_resolve_says_what_it_looked_for(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no such folder; expected a checkpoint folder"):
        checkpoint.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is a file"):
        checkpoint.resolve(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"neither a step-… folder nor model.safetensors"):
        checkpoint.resolve(str(tmp_path))
    cut(save(tmp_path, 1))
    with pytest.raises(UserError, match=r"damaged checkpoint: .*1,000 bytes"):
        checkpoint.resolve(str(tmp_path / "step-00000001"))
    with pytest.raises(UserError, match="all are damaged"):
        checkpoint.resolve(str(tmp_path), lambda _: None)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, seed=0)
    path = save(tmp_path, 1, seed=1)
    assert checkpoint.problems(path) == []
    assert hidden(tmp_path) == []
    assert torch.equal(checkpoint.read_weights(path)["wte.weight"], model_of(seed=1).wte.weight)


def test_a_replacement_killed_between_its_two_renames_is_undone(tmp_path):
    save(tmp_path, 1).rename(tmp_path / ".step-00000001.old")
    assert checkpoint.newest_good(tmp_path, print) == tmp_path / "step-00000001"


def test_leftovers_of_killed_saves_are_removed_by_the_next(tmp_path):
    for name in (".step-00000001.partial", ".step-00000002.deleted", "step-00000003.mine"):
        (tmp_path / name / "trainer_state").mkdir(parents=True)
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003.mine", "step-00000004"]


@pytest.fixture
def small_disk(tmp_path):
    """A real filesystem of 300 kB: room for one checkpoint, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a small filesystem: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("step", [1, 2], ids=["the same step again", "the next step"])
def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk, step):
    optimizer = {"exp_avg": torch.randn(16_000)}
    good = checkpoint.save(small_disk, state_at(1), whole_shares(model_of().state_dict()), whole_shares(optimizer))
    with pytest.raises(SaveError) as caught:
        checkpoint.save(
            small_disk, state_at(step), whole_shares(model_of(seed=1).state_dict()), whole_shares(optimizer)
        )
    assert str(caught.value) == (
        f"could not save checkpoint {small_disk / f'step-0000000{step}'}: No space left on device; "
        "the last good one, step-00000001, is untouched"
    )
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert checkpoint.problems(good) == []
    assert torch.equal(checkpoint.read_weights(good)["wte.weight"], model_of().wte.weight)


def test_a_disk_too_small_for_the_first_checkpoint_is_reported(small_disk):
    with pytest.raises(SaveError, match="No space left on device; there is no earlier one"):
        checkpoint.save(
            small_disk,
            state_at(1),
            whole_shares(model_of().state_dict()),
            whole_shares({"exp_avg": torch.randn(100_000)}),
        )
    assert list(small_disk.iterdir()) == []


LIMITED_SAVE = """
import resource, signal, sys
from pathlib import Path
from test_checkpoint import save
run_dir = Path(sys.argv[1])
save(run_dir, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save(run_dir, 2)
except Exception as error:
    print(type(error).__name__, error)
"""


def run_python(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    tests = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


def test_a_file_size_limit_leaves_the_last_good_checkpoint(tmp_path):
    said = run_python(LIMITED_SAVE, tmp_path)
    assert said.startswith("SaveError could not save checkpoint")
    assert "File too large; the last good one, step-00000001, is untouched" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest_good(tmp_path, print) is not None


def test_a_run_folder_that_cannot_be_written_is_a_save_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="Not a directory; there is no earlier one"):
        save(tmp_path / "file" / "run", 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without permission")
def test_a_folder_without_write_permission_is_a_save_error(tmp_path):
    save(tmp_path, 1)
    parents = [tmp_path, *tmp_path.parents]
    modes = {folder: folder.stat().st_mode for folder in parents if not folder.stat().st_mode & 0o001}
    for folder in modes:
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(SaveError, match="Permission denied; the last good one, step-00000001, is untouched"):
            save(tmp_path, 2)
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


SAVES_UNTIL_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from gpt2_xla import checkpoint
from test_checkpoint import model_of, save
run_dir, seed = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(seed)
start = time.perf_counter()
save(run_dir, 1)
one_save = time.perf_counter() - start
for trial in range(8):
    child = os.fork()
    if not child:
        step = max(int(path.name[5:]) for path in checkpoint.checkpoints(run_dir))
        while True:
            step += 1
            save(run_dir, step)
            save(run_dir, step)
            checkpoint.prune(run_dir, keep=2)
    time.sleep(chance.uniform(0, 4 * one_save))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(len([path for path in run_dir.iterdir() if path.name.startswith(".")]))
    assert checkpoint.newest_good(run_dir, print) is not None
    for path in checkpoint.checkpoints(run_dir):
        assert not checkpoint.problems(path), checkpoint.problems(path)
"""


def test_kill_9_in_the_middle_of_a_save_leaves_only_good_checkpoints(tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    lines = run_python(SAVES_UNTIL_KILLED, tmp_path, seed).split()
    assert len(lines) == 8  # eight trials, and no word about a damaged checkpoint
    save(tmp_path, 10**6)
    assert hidden(tmp_path) == []
