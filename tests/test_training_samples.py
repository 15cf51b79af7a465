"""Samples during training: written to the sinks, and nothing of the training is changed by them."""

import html
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from commands import QUICK_XLA, TINY, TRAIN_XLA, data_flags, finish, records, run, start
from safetensors.torch import load_file
from small_runs import run_here

import run_pretrain
from gpt2_xla import checkpoint
from gpt2_xla.character_stream import whole_text
from gpt2_xla.decoding import Decoder, Machine, generate
from gpt2_xla.generation import load_model
from gpt2_xla.tokenizer import ByteTokenizer
from gpt2_xla.training_samples import SAMPLING

PROMPT = "né the "
TRAINED = (*TINY, "--train-steps", "12", "--save-interval", "6", "--warmup-steps", "0", "--dropout", "0.1")
SAMPLED = ("--sample-interval", "3", "--sample-prompt", PROMPT, "--sample-tokens", "20")


def check_alike(plain: Path, sampled: Path) -> None:
    """That two runs trained alike to the last bit, and that one of them wrote what its checkpoints write."""
    ours, theirs = records(plain), records(sampled)
    assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]
    assert [record["grad_norm"] for record in ours] == [record["grad_norm"] for record in theirs]
    for step in (6, 12):
        for name in ("model.safetensors", "trainer_state/optimizer.safetensors"):
            one, other = (load_file(folder / f"step-{step:08d}" / name) for folder in (plain, sampled))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one), name
    assert records(plain, "sample") == []
    samples = {record["step"]: record for record in records(sampled, "sample")}
    assert list(samples) == [3, 6, 9, 12]
    for step in (6, 12):
        assert samples[step]["prompt"] == PROMPT
        text = continuation(sampled / f"step-{step:08d}", seed=1337)
        assert (samples[step]["text"], samples[step]["tokens"]) == text
    assert samples[3]["text"] != samples[12]["text"]


def continuation(folder: Path, seed: int) -> tuple[str, int]:
    """What the checkpoint writes, and its tokens."""
    tokenizer = ByteTokenizer()
    decoder = Decoder(
        load_model(checkpoint.resolve(str(folder)), torch.device("cpu")), Machine(torch.device("cpu")), 1, 20
    )
    prompt = tokenizer.encode(PROMPT)
    drawn = generate(decoder, [prompt], [seed], 20, SAMPLING, tokenizer.end_of_text, tokenizer.vocab_size)
    tokens = [one.token for one in drawn if one.token is not None]
    return whole_text(tokenizer, tokens), len(tokens)


def test_a_torch_run_with_samples_is_bit_for_bit_one_without(tmp_path, text_data, monkeypatch, capsys):
    for name, flags in (("plain", ()), ("sampled", SAMPLED)):
        command = [*TRAINED, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", tmp_path / name, *flags]
        assert run_here(monkeypatch, run_pretrain.main, *command) == 0
    check_alike(tmp_path / "plain", tmp_path / "sampled")
    shown = capsys.readouterr().out
    assert f"step 12 writes: {PROMPT}{records(tmp_path / 'sampled', 'sample')[-1]['text']}" in shown


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_gets_the_text_as_a_page(tmp_path, text_data, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "CONFIG_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    command = [*TRAINED, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", tmp_path, "--wandb-logging"]
    assert run_here(monkeypatch, run_pretrain.main, *command, *SAMPLED, "--sample-prompt", "a < b") == 0
    pages = [page.read_bytes().decode() for page in tmp_path.glob("wandb/offline-run-*/files/media/html/sample/*.html")]
    assert sorted(pages) == sorted(
        f"<pre>a &lt; b{html.escape(record['text'])}</pre>" for record in records(tmp_path, "sample")
    )
    assert len(pages) == 4


@pytest.mark.xla
def test_an_xla_run_with_samples_is_bit_for_bit_one_without(tmp_path, text_data):
    for name, flags in (("plain", ()), ("sampled", SAMPLED)):
        command = [*TRAINED, *data_flags(text_data), "--checkpoints-dir", tmp_path / name, "--max-recompiles", "0"]
        output = run(*TRAIN_XLA, *map(str, command), *flags, **QUICK_XLA)
        assert "0 of them after warm-up" in output
    check_alike(tmp_path / "plain", tmp_path / "sampled")
    compiles = [records(tmp_path / name)[-1]["compiles"] for name in ("plain", "sampled")]
    assert compiles[1] == compiles[0] + 2  # reading the prompt, and decoding


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--sample-interval", "-1"), "--sample-interval -1 must be a finite number, 0 or more"),
        (("--sample-interval", "1", "--sample-tokens", "0"), "--sample-tokens 0 must be at least 1"),
        (
            ("--sample-interval", "1", "--sample-tokens", "30", "--sample-prompt", "four"),
            "--sample-prompt has 4 tokens, which --sample-tokens 30 and --seq-length 32 leave no room for",
        ),
    ],
)
def test_samples_that_cannot_be_are_refused(tmp_path, text_data, monkeypatch, capsys, flags, says):
    command = [*TINY, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", tmp_path, "--train-steps", "60"]
    assert run_here(monkeypatch, run_pretrain.main, *command, *flags) == 2
    assert says in capsys.readouterr().err


def test_data_without_a_manifest_has_no_tokenizer_to_sample_with(tmp_path, text_data, monkeypatch, capsys):
    shutil.copytree(text_data / "train", tmp_path / "train")
    (tmp_path / "train" / "manifest.json").unlink()
    command = [*TINY, "--train-dir", tmp_path / "train", "--vocab-size", "257", "--device", "cpu"]
    command += ["--checkpoints-dir", tmp_path / "run", "--train-steps", "60", "--sample-interval", "1"]
    assert run_here(monkeypatch, run_pretrain.main, *command, "--sample-tokens", "9") == 2
    assert "--sample-interval: the training data has no manifest that names its tokenizer" in capsys.readouterr().err


@pytest.mark.xla
def test_the_sharded_path_refuses_samples(text_data):
    # A process of its own: SPMD, once on, stays on.
    process = start(*TRAIN_XLA, *TINY, *data_flags(text_data), "--sharding", "fsdp", "--sample-interval", "1")
    assert "--sample-interval is not supported with --sharding fsdp" in finish(process)
    assert process.returncode == 2
