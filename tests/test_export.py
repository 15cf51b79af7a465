"""Exported folders, as transformers loads them offline: the same weights, the same tokens, a true model card."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ascii_run import MODEL, make_run
from commands import PATIENCE
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2_xla import checkpoint, loading
from gpt2_xla.checkpoint import TrainerState
from gpt2_xla.config import ModelConfig, PretrainConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.export import export
from gpt2_xla.generation import load_model
from gpt2_xla.model import GPT
from gpt2_xla.script_config import ExportConfig
from gpt2_xla.shares import whole_shares
from gpt2_xla.tokenizer import ByteTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, load_tokenizer
from gpt2_xla.tokenizer_export import write_tokenizer

LOADS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once, né\\n  upon")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].tolist()
    text = pipeline("text-generation", model=folder)("Once", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ends = [tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id]
    print("loaded", json.dumps([ids, logits, text, tokenizer.decode(ids), ends]))
"""


def text_of(seed: int) -> str:
    """Letters, spaces, digits, line ends and characters of two to four bytes, in runs of odd lengths."""
    draw = random.Random(seed)
    kinds = [
        "abcdefgh",
        "ABC",
        " ",
        "  \n\t",
        "0123456789",
        "'s't'll .,!?",
        "éüñß",
        "中文字符",
        "🙂🚀",
        "\u200b\u0301",
        "\x00\x1f\x7f",
    ]
    return "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(400)))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), valid_loss=2.5)


MODERN = ModelConfig(
    **vars(MODEL) | dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False, num_kv_heads=1)
)


ARCHITECTURES = {
    "GPT2LMHeadModel": MODEL,
    "LlamaForCausalLM": MODERN,
    "Qwen3ForCausalLM": dataclasses.replace(MODERN, qk_norm=True),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Of each architecture the run, what the command exported of it, and what transformers makes of that without a network."""
    folder, command = tmp_path_factory.mktemp("exported"), [sys.executable, str(ROOT / "scripts" / "export_hf.py")]
    limits = {"capture_output": True, "text": True, "timeout": PATIENCE, "check": False}
    folders = []
    for name, config in ARCHITECTURES.items():
        run_dir, out = make_run(folder / name, config, valid_loss=2.5), folder / "models" / name
        result = subprocess.run([*command, str(run_dir), str(out)], cwd=folder, **limits)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"exported to {out}" in result.stdout
        folders.append((run_dir, out))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", LOADS, *(str(out) for _, out in folders)]
    result = subprocess.run(command, env=environment, **limits)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("loaded ")]
    return {name: (*both, line) for name, both, line in zip(ARCHITECTURES, folders, lines, strict=True)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_an_exported_run_without_a_network(architecture, loaded):
    run_dir, out, (ids, logits, text, decoded, ends) = loaded[architecture]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    assert ids == list("Once, né\n  upon".encode())
    assert decoded == "Once, né\n  upon"
    assert ends == [256] * 3
    assert text.startswith("Once")
    assert architecture != "GPT2LMHeadModel" or len(text) == len("Once") + 5  # only this one says nothing but ASCII
    model = load_model(checkpoint.resolve(str(run_dir)), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(torch.tensor([ids]))[0, -1], rtol=0, atol=1e-4)


def test_the_model_card_has_the_runs_numbers(run_dir, tmp_path):
    card = (export(ExportConfig(str(run_dir), str(tmp_path / "out"))) / "README.md").read_text()
    for row in (
        f"| parameters | {2 * 257 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64:,} |",
        "| steps | 10 |",
        "| tokens trained on | 1,280 |",
        "| validation loss | 2.5000 nats per token, perplexity 12.18 |",
        "| vocabulary | 257 (bytes) |",
        "| data | unknown |",
    ):
        assert row in card
    assert 'pipeline("text-generation", model="out")' in card


def test_a_round_trip_through_a_run_is_exact_bit_for_bit(tmp_path, tiktoken_cache):
    """Hugging Face → our run, in which nothing was trained → Hugging Face."""
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    original.save_pretrained(tmp_path / "hf")
    write_tokenizer(load_tokenizer("gpt2"), tmp_path / "hf", 16)
    (tmp_path / "hf" / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    before = load_file(tmp_path / "hf" / "model.safetensors")

    out = export(ExportConfig(str(tmp_path / "hf"), str(tmp_path / "direct")))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()

    config = ModelConfig(50304, 16, 8, 2, 2, vocab_padding=47)
    model = GPT(config)
    loading.load(model, tmp_path / "hf")
    state = TrainerState(1, 1, to_dict(PretrainConfig(model=config)), tokenizer="gpt2")
    checkpoint.save(tmp_path / "run", state, whole_shares(dict(model.named_parameters())), [], 50256)
    through_a_run = export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "out")))
    for folder in (out, through_a_run):
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
        config_now = json.loads((folder / "config.json").read_text())
        assert {name: config_now[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")} == {
            "vocab_size": 50257, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2,
        }  # fmt: skip


def test_half_precision_stays_half_precision(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=8, n_embd=8, n_layer=1, n_head=2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    out = export(ExportConfig(str(tmp_path / "hf"), str(tmp_path / "out"), "bytes"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert GPT2LMHeadModel.from_pretrained(out).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def exported_tokenizers(shared_data, tmp_path_factory):
    """Ours, and transformers' from the files that we write, of each kind that needs no file."""
    pairs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken_cache"))
        for name in ("gpt2", "bytes"):
            folder = tmp_path_factory.mktemp(name)
            ours = load_tokenizer(name)
            write_tokenizer(ours, folder, 1024)
            pairs[name] = (ours, AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder)))
    return pairs


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_an_exported_tokenizer_gives_the_same_ids_for_every_text(exported_tokenizers, shared_data, name):
    ours, theirs, ours_again = exported_tokenizers[name]
    assert isinstance(ours, TiktokenTokenizer | ByteTokenizer)
    assert isinstance(ours_again, HuggingFaceTokenizer)
    assert (ours_again.vocab_size, ours_again.end_of_text) == (ours.vocab_size, ours.end_of_text)
    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.end_of_text)
    assert all(ours.decode_bytes([token]) == ours_again.decode_bytes([token]) for token in range(ours.vocab_size))
    shakespeare = (shared_data / "tinyshakespeare.txt").read_text()[:100_000]
    for text in (*map(text_of, range(300)), shakespeare):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=True)["input_ids"] == ids
        assert ours_again.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs("a<|endoftext|>")["input_ids"][-1] == ours.end_of_text


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_any_text_at_all_is_encoded_alike(exported_tokenizers, text):
    text = text.encode(errors="replace").decode()
    for ours, theirs, _ in exported_tokenizers.values():
        if "<|endoftext|>" not in text:
            assert theirs(text)["input_ids"] == ours.encode(text)


def test_what_is_there_is_never_touched_and_nothing_is_left_half_written(run_dir, tmp_path, monkeypatch):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("x")
    file.write_text("x")
    for out, reason in ((full, "is not empty"), (file, "exists and is no folder"), (None, "no folder to write")):
        with pytest.raises(UserError, match=reason):
            export(ExportConfig(str(run_dir), str(out) if out else None))
    assert [path.name for path in full.iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    export(ExportConfig(str(run_dir), str(tmp_path / "empty")))
    assert (tmp_path / "empty" / "model.safetensors").is_file()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt2_xla.export.model_card", fail)
    with pytest.raises(UserError, match="No space left"):
        export(ExportConfig(str(run_dir), str(tmp_path / "late")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_model_that_transformers_does_not_have_is_refused(tmp_path):
    run_dir = make_run(tmp_path / "run", dataclasses.replace(MODERN, activation="relu2"))
    with pytest.raises(UserError, match="no Hugging Face counterpart: LlamaForCausalLM would need --activation swiglu"):
        export(ExportConfig(str(run_dir), str(tmp_path / "out")))


def test_all_mistakes_of_an_export_are_told_together(tmp_path):
    with pytest.raises(UserError) as caught:
        export(ExportConfig(str(tmp_path / "absent"), None))
    assert len(caught.value.mistakes) == 2
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="records no tokenizer"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "out")))
