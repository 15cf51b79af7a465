"""Starting from Hugging Face checkpoints: the same function, a shorter context, a padded vocabulary, clear refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from commands import PATIENCE, TINY, data_flags, losses, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_hub import small_hub
from small_runs import run_here
from transformers import GPT2Config, GPT2LMHeadModel

import run_pretrain
from gpt2_xla import checkpoint, evaluation, generation, loading, pretrained
from gpt2_xla.config import PRESETS, ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.export import export
from gpt2_xla.generation import load_model
from gpt2_xla.model import GPT
from gpt2_xla.script_config import EvaluateConfig, ExportConfig, GenerateConfig

ROOT = Path(__file__).resolve().parent.parent
# TINY without the model's own options, which the checkpoint has
RUN = [*TINY[TINY.index("--train-batch-size") :], "--device", "cpu", "--warmup-steps", "0", "--loss-chunk", "64"]


def random_gpt2(folder: Path, seed: int = 0, **changes) -> GPT2LMHeadModel:
    """A small GPT-2 of transformers with random weights, biases and LayerNorms included, saved into the folder."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2) | changes
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=256, eos_token_id=256))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.15)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    random_gpt2(folder)
    return folder


@pytest.fixture
def start(monkeypatch, capsys):
    """Run run_pretrain.py in this process; its exit status and what it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = run_here(monkeypatch, run_pretrain.main, *arguments)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out + printed.err

    return call


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_the_logits_of_each_size_are_transformers(tmp_path, preset):
    shape = PRESETS[preset]  # its depth and heads, 4 wide each
    layers, heads = shape["num_layers"], shape["num_heads"]
    theirs = random_gpt2(tmp_path / "hf", n_layer=layers, n_head=heads, n_embd=4 * heads, vocab_size=97)
    ours = load_model(pretrained.find(str(tmp_path / "hf")), "cpu")
    tokens = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, reference = ours(tokens), theirs(tokens).logits
    assert reference.std() > 0.5
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)


def test_a_checkpoint_cut_into_several_files_is_the_same(tmp_path, gpt2_folder):
    model = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    model.save_pretrained(tmp_path / "cut", max_shard_size="40KB")
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 1
    weights, whole = (checkpoint.read_weights(pretrained.find(str(f))) for f in (tmp_path / "cut", gpt2_folder))
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    index = tmp_path / "cut" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(UserError, match="names no files beside it"):
        pretrained.find(str(tmp_path / "cut"))


@settings(max_examples=25)
@given(
    padding=st.integers(0, 70),
    chunk=st.sampled_from([0, 5, 64]),
    multiple=st.sampled_from([1, 64]),
    seed=st.integers(0, 99),
)
def test_padding_changes_no_loss_and_no_gradient_and_never_wins(padding, chunk, multiple, seed):
    sizes = dict(seq_length=8, d_model=16, num_layers=1, num_heads=2)
    plain = GPT(ModelConfig(vocab_size=40, **sizes), chunk, multiple)
    plain.initialize(seed)
    padded = GPT(ModelConfig(vocab_size=40 + padding, vocab_padding=padding, **sizes), chunk, multiple)
    padded.initialize(seed + 1)
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            value = dict(plain.named_parameters())[name]
            parameter[: len(value)] = value
            parameter[len(value) :] = 100.0  # would win everywhere if they counted
    tokens, targets = torch.randint(40, (2, 3, 8), generator=torch.Generator().manual_seed(seed))
    found = []
    for model in (plain, padded):
        loss = model(tokens, targets)
        loss.backward()
        found.append((loss.detach(), model.wte.weight.grad[:40], model.wpe.weight.grad))
        torch.testing.assert_close(model(tokens, targets, by_sequence=True).sum() / 24, found[0][0])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)
    assert not padded.wte.weight.grad[40:].any()
    logits = padded(tokens)
    assert torch.isneginf(logits[..., 40:]).all()
    torch.testing.assert_close(logits[..., :40], plain(tokens))


def test_a_run_begins_with_the_weights_cuts_the_context_and_pads_the_vocabulary(
    start, gpt2_folder, text_data, tmp_path
):
    flags = [*RUN, *data_flags(text_data), "--from-checkpoint", gpt2_folder, "--seq-length", 32, "--train-steps", 4]
    flags += ["--valid-interval", 2, "--save-interval", 2, "--weight-decay", 0.1]
    status, printed = start(*flags, "--checkpoints-dir", tmp_path / "plain")
    assert status == 0, printed
    assert "weights of" in printed
    status, printed = start(*flags, "--vocab-size", 300, "--checkpoints-dir", tmp_path / "padded")
    assert status == 0, printed
    assert "V 300, 43 of them padding" in printed
    padded, plain = (losses(tmp_path / name) for name in ("padded", "plain"))
    assert padded == pytest.approx(plain, rel=2e-6)
    assert len(plain) == 4

    # What it began with is what transformers computes, in the shorter context.
    theirs = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    stream = torch.from_numpy(np.load(text_data / "valid" / "valid_00000.npy").astype(np.int64))
    total, count = 0.0, 0
    for begin in range(0, len(stream) - 1, 32):
        window = stream[begin : begin + 33]
        logits = theirs(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    assert losses(tmp_path / "padded", "valid")[0] == pytest.approx(total / count, abs=1e-5)
    test = ("--do-test", "--from-checkpoint", gpt2_folder, "--valid-dir", text_data / "valid", "--seq-length", 32)
    status, printed = start(*test, "--device", "cpu", "--mixed-precision", "no", "--checkpoints-dir", tmp_path / "none")
    assert status == 0
    assert f"0 steps trained: validation loss {total / count:.4f}, perplexity" in printed
    assert "1,999 tokens" in printed
    assert not (tmp_path / "none").exists()

    # In a file the padding is gone: transformers never sees it.
    last = tmp_path / "padded" / "step-00000004"
    assert checkpoint.read_model_config(last).vocabulary == 257
    assert load_file(last / "model.safetensors")["transformer.wte.weight"].shape == (257, 32)
    assert checkpoint.read_state(last).config["model"]["vocab_size"] == 300
    assert checkpoint.problems(last) == []


def test_a_padded_run_goes_on_as_if_it_had_not_stopped(start, gpt2_folder, text_data, tmp_path):
    flags = [*RUN, *data_flags(text_data), "--from-checkpoint", gpt2_folder, "--vocab-size", 300, "--valid-interval", 0]
    assert start(*flags, "--checkpoints-dir", tmp_path / "a", "--train-steps", 4, "--decay-steps", 4)[0] == 0
    for steps in (2, 4):  # the same command again continues
        status, printed = start(*flags, "--checkpoints-dir", tmp_path / "b", "--train-steps", steps, "--decay-steps", 4)
        assert status == 0
    assert "resuming after step 2" in printed
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    first, second = (checkpoint.read_weights(tmp_path / name / "step-00000004") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_flags_that_contradict_the_checkpoint_are_named_all_at_once(start, gpt2_folder, text_data, tmp_path):
    status, printed = start(
        *(*RUN, *data_flags(text_data), "--checkpoints-dir", tmp_path, "--from-checkpoint", gpt2_folder),
        *("--d-model", 64, "--num-layers", 3, "--no-tie-weights", "--seq-length", 65, "--vocab-size", 256),
    )
    assert status == 2
    assert "5 errors:" in printed
    for sentence in (
        f"--d-model 64 conflicts with {gpt2_folder}, which has 32",
        f"--num-layers 3 conflicts with {gpt2_folder}, which has 2",
        f"--tie-weights off conflicts with {gpt2_folder}, which has on",
        f"--seq-length 65 is more than the 64 positions of {gpt2_folder}; use --seq-length 64 or less",
        f"--vocab-size 256 is less than the 257 tokens of {gpt2_folder}",
    ):
        assert sentence in printed
    status, printed = start(
        *(*RUN, *data_flags(text_data), "--checkpoints-dir", tmp_path, "--from-checkpoint", gpt2_folder),
        *("--vocab-size", 300, "--vocab-padding", 3),
    )
    assert (status, "leave 43 of --vocab-size 300" in printed) == (2, True)


def test_what_can_not_be_represented_is_refused_naming_the_difference(start, gpt2_folder, text_data, tmp_path):
    folder = tmp_path / "odd"
    model = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    model.config.activation_function, model.config.scale_attn_by_inverse_layer_idx = "gelu", True
    model.save_pretrained(folder)
    status, printed = start(*RUN, *data_flags(text_data), "--checkpoints-dir", tmp_path, "--from-checkpoint", folder)
    assert status == 2
    assert printed.count("activation_function is 'gelu'") == 1
    assert "scale_attn_by_inverse_layer_idx is True" in printed


def test_pickles_folders_without_weights_and_strange_names_get_a_sentence_each(start, tmp_path, text_data, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def refusal(name: object) -> str:
        flags = (*RUN, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run", "--from-checkpoint", name)
        status, printed = start(*flags)
        assert status == 2
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: --from-checkpoint {name}")
        return line

    pickled = tmp_path / "pickled"
    random_gpt2(pickled)
    (pickled / "model.safetensors").unlink()
    assert "no weights: there is no model.safetensors" in refusal(pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin alone, a pickle" in refusal(pickled)
    assert "save_pretrained('pickled-safetensors')" in refusal(pickled)
    (tmp_path / "empty").mkdir()
    assert "holds no usable checkpoint" in refusal(tmp_path / "empty")
    assert "no such folder" in refusal(tmp_path / "absent")
    for name in ("gpt2-medium", "someone/some-model"):
        assert "HF_HUB_OFFLINE is set" in refusal(name)
        assert "give its local folder" in refusal(name)


COMMANDS = {
    "generate": lambda name: generation.run(GenerateConfig(name, prompt="x", tokenizer="bytes")),
    "evaluate": lambda name: evaluation.run(
        EvaluateConfig((name,), task="hellaswag", file=__file__, tokenizer="bytes")
    ),
    "export": lambda name: export(ExportConfig(name, None, tokenizer="bytes")),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_takes_a_model_finds_it_alike(command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for folder in ("pickled", "runs"):
        Path(folder).mkdir()
    Path("pickled/config.json").write_text("{}")
    Path("pickled/pytorch_model.bin").touch()

    def refusal(name: str) -> str:
        with pytest.raises(UserError) as caught:
            command(name)
        (sentence,) = [mistake for mistake in caught.value.mistakes if mistake.startswith(f"--model {name}")]
        return sentence

    assert "pytorch_model.bin alone, a pickle" in refusal("pickled")
    Path("pickled/pytorch_model.bin").rename("pickled/model.safetensors")
    assert "config.json: model_type is 'None'" in refusal("pickled")
    assert "HF_HUB_OFFLINE is set" in refusal("gpt2-medium")
    assert "no such folder" in refusal("runs/mistyped")  # not asked for on the hub: runs/ is here


def test_data_of_another_tokenizer_is_refused(start, gpt2_folder, text_data, tmp_path):
    folder = Path(shutil.copytree(gpt2_folder, tmp_path / "gpt2"))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: token for token, character in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = (*RUN, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run", "--from-checkpoint", folder)
    status, printed = start(*flags)
    assert status == 2
    assert f"prepared with the tokenizer bytes, which is not that of --from-checkpoint {folder}: id 0 is" in printed
    small = tmp_path / "small"
    random_gpt2(small, vocab_size=200)
    status, printed = start(*flags[:-1], small)
    assert status == 2
    assert "which has 257 ids, but" in printed
    assert "knows 200" in printed


def test_a_name_on_the_hub_is_downloaded_once_and_then_needs_no_network(tmp_path, gpt2_folder):
    files = {path.name: path.read_bytes() for path in gpt2_folder.iterdir()}
    files |= {"pytorch_model.bin": b"\x80", "README.md": b"#", "onnx/model.onnx": b"x"}
    code = (
        "from gpt2_xla import pretrained, checkpoint; print(len(checkpoint.read_weights(pretrained.find('some/gpt2'))))"
    )

    def find(endpoint: str, **more: str) -> str:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")} | more
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True
        ).stdout

    with small_hub("some/gpt2", files, kind="models") as (endpoint, asked):
        assert find(endpoint) == "28\n"
        fetched = {line.rsplit("/", 1)[-1] for line in asked if "/resolve/" in line}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}
    assert find("http://127.0.0.1:9", HF_HUB_OFFLINE="1") == "28\n"


MEMORY = """
import sys, torch
from pathlib import Path
from gpt2_xla import generation, pretrained
torch.set_num_threads(1)
generation.load_model(pretrained.find(sys.argv[1]), "cpu")  # imports and thread pools
def peak():  # of this program: getrusage's would be that of the one that started it, if larger
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
model = generation.load_model(pretrained.find(sys.argv[2]), "cpu")
print((peak() - before) / sum(p.numel() * 4 for p in model.parameters()))
"""


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    random_gpt2(tmp_path / "small")
    large = dict(vocab_size=2000, n_embd=768, n_layer=8, n_head=12)  # 230 MB
    GPT2LMHeadModel(GPT2Config(**large)).save_pretrained(tmp_path / "large")
    ratio = float(run(sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "large").split()[-1])
    assert 0.9 < ratio < 1.2


def test_weights_that_do_not_fit_the_configuration_are_refused_before_any_is_copied(gpt2_folder):
    model = GPT(ModelConfig(vocab_size=257, seq_length=128, d_model=32, num_layers=2, num_heads=2))
    before = model.wte.weight.clone()
    with pytest.raises(UserError, match=r"wpe\.weight is 64 x 32; the model's is 128 x 32"):
        loading.load(model, gpt2_folder)
    assert torch.equal(model.wte.weight, before)
