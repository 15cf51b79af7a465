"""The command that a preparation ends with works, and trains for no longer than the data is worth."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, data_flags
from conftest import write_split
from hypothesis import given
from hypothesis import strategies as st
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla import cli
from gpt2_xla.config import TorchPretrainConfig
from gpt2_xla.data import prepare
from gpt2_xla.data.manifest import Manifest, ShardEntry
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.data.training_command import training_command
from gpt2_xla.script_config import PrepareConfig
from gpt2_xla.summary import MANY_EPOCHS, epochs_note
from gpt2_xla.validation import config_mistakes

SHAKESPEARE = 1_115_394 * 9 // 10  # bytes of tinyshakespeare in train/
PYDOC = 420_000  # bytes and more, of Python's language reference in train/


def split_of(tokens: int) -> Manifest:
    return Manifest("train", "uint16", tokens, (ShardEntry("train_00000.npy", tokens),), vocab_size=257)


def config_of(flags: list[str]) -> TorchPretrainConfig:
    parsed = cli.parse(TorchPretrainConfig, flags, "")
    assert config_mistakes(parsed.config, parsed.explicit) == []
    return parsed.config


@given(st.integers(1, 12).flatmap(lambda digits: st.integers(10 ** (digits - 1), 10**digits)))
def test_the_steps_fit_the_data_whatever_its_size(tokens):
    command = training_command(Path("data/own"), {"train": split_of(tokens)})
    if command is None:
        assert tokens < 12 * 65 + 64  # less than a batch of the smallest recipe
        return
    config = config_of(shlex.split(command)[2:])
    epochs = config.run.train_steps * config.tokens_at(0) / tokens
    assert epochs <= 50
    assert config.data.train_dir == ("data/own/train",)
    assert config.data.valid_dir is None
    assert config.optim.warmup_steps < config.run.train_steps
    if config.model.num_layers == 12:  # GPT-2 itself
        assert epochs <= 4
        assert config.run.train_steps >= 500


def test_the_defaults_are_for_ten_billion_tokens():
    both = {"train": split_of(10**10), "valid": split_of(10**7)}
    expected = "python run_pretrain.py --train-dir data/f/train --valid-dir data/f/valid"
    assert training_command(Path("data/f"), both) == expected


@pytest.mark.parametrize(("words", "works"), [(400, True), (40, False)])
def test_the_command_that_is_printed_trains(words, works, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("So many words. " * words)
    source, output = str(tmp_path / "text.txt"), tmp_path / "own data"
    prepare.prepare_text(PrepareConfig(source=(source,), output_dir=str(output), tokenizer="bytes", num_workers=1))
    printed = capsys.readouterr().out
    assert ("too few tokens to train on" in printed) != works
    if works:
        command = shlex.split(printed.partition("train on it with:\n")[2])
        assert command[:2] == ["python", "run_pretrain.py"]
        assert command[command.index("--checkpoints-dir") + 1] == "runs/own data"
        monkeypatch.chdir(tmp_path)
        short = ("--train-steps", "3", "--warmup-steps", "1", "--device", "cpu")
        assert run_here(monkeypatch, run_pretrain.main, *command[2:], *short) == 0
        assert "note:" not in capsys.readouterr().out
        assert (tmp_path / "runs" / "own data" / "step-00000003").is_dir()


# The note at the start of a run


def test_a_run_that_reads_its_data_too_often_says_so_once(tmp_path, monkeypatch, capsys):
    write_split(tmp_path / "own", "train", np.arange(80))  # one sequence an epoch
    flags = (*FOUR_STEPS, "--train-batch-size", "1", "--train-dir", tmp_path / "own" / "train", "--checkpoints-dir")
    assert run_here(monkeypatch, run_pretrain.main, *flags, tmp_path / "a") == 0
    assert "note:" not in capsys.readouterr().out
    assert run_here(monkeypatch, run_pretrain.main, *flags, tmp_path / "b", "--train-steps", "120") == 0
    printed = capsys.readouterr().out
    assert printed.count("note:") == 1
    assert "note: 120 steps read own 120 times" in printed


def test_the_limit_is_a_number_of_epochs(text_data):
    sequences = 40_000 // 32 - 1  # an epoch of batches of 8 sequences of 32 tokens

    def note(steps: int, *flags: str) -> str | None:
        config = config_of([*TINY, *data_flags(text_data), "--train-steps", str(steps), *flags])
        return epochs_note(config, PretrainingData.open(config, 0, 1))

    assert note(sequences * MANY_EPOCHS // 8) is None
    found = note(sequences * MANY_EPOCHS // 8 * 3)
    assert found is not None
    assert found.startswith(f"note: {sequences * MANY_EPOCHS // 8 * 3:,} steps read {text_data.name} 300 times")
    assert f"about {sequences * MANY_EPOCHS / 8:,.0f} read it 100 times" in found
    assert note(10**6, "--do-test") is None


@pytest.mark.parametrize(
    ("recipe", "tokens"), [("macbook", SHAKESPEARE), ("shakespeare_gpu", SHAKESPEARE), ("quickstart", PYDOC)]
)
def test_the_recipes_for_small_texts_are_below_the_limit(recipe, tokens):
    config = config_of(["--recipe", recipe, *([] if recipe == "quickstart" else ["--train-dir", "x"])])
    assert config.run.train_steps * config.tokens_at(0) / tokens < MANY_EPOCHS
