"""Checkpoints made to harm: each is refused with a sentence, runs nothing, reads and writes nothing outside, and takes no memory."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2_xla import checkpoint, checkpoint_files, generation
from gpt2_xla.checkpoint import TrainerState
from gpt2_xla.config import ModelConfig, PretrainConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.shares import whole_shares

MODEL = ModelConfig(vocab_size=61, seq_length=16, d_model=32, num_layers=2, num_heads=2)
LLAMA = replace(MODEL, position="rope", norm="rmsnorm", activation="swiglu", bias=False)
OWN = replace(LLAMA, activation="relu2")  # of no architecture that transformers has
WEIGHTS, OPTIMIZER = "model.safetensors", "trainer_state/optimizer.safetensors"


class Payload:
    """Unpickled, it creates the file that it is given."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save(run_dir: Path, config: ModelConfig) -> Path:
    model = GPT(config)
    model.initialize(0)
    state = TrainerState(7, 56, to_dict(PretrainConfig(model=config)))
    moments = whole_shares({"exp_avg.wte.weight": torch.ones(61, 32)})
    return checkpoint.save(run_dir, state, whole_shares(model.state_dict()), moments)


@pytest.fixture
def good(tmp_path):
    return save(tmp_path / "run", MODEL)


def seal(folder: Path) -> None:
    """Make the record agree with whatever the files hold now: an attacker can."""
    record = json.loads((folder / checkpoint_files.RECORD).read_text())
    for name in record["files"]:
        content = (folder / name).read_bytes()
        record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / checkpoint_files.RECORD).write_text(json.dumps(record))


def tensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE_TENSORS = {
    "nothing": b"",
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "overlapping tensors": tensors({"wte.weight": one([2], 0, 8), "wpe.weight": one([2], 4, 12)}, bytes(12)),
    "a tensor beyond the end": tensors({"wte.weight": one([2], 0, 8)}, bytes(4)),
    "a tensor that ends before it begins": tensors({"wte.weight": one([2], 8, 0)}, bytes(8)),
    "negative offsets": tensors({"wte.weight": one([2], -8, 0)}, bytes(8)),
    "a gap": tensors({"wte.weight": one([2], 0, 8), "wpe.weight": one([2], 80, 88)}, bytes(88)),
    "an absurd shape": tensors({"wte.weight": one([2**60], 0, 8)}, bytes(8)),
    "a shape that overflows": tensors({"wte.weight": one([2**40, 2**40], 0, 0)}),
    "an empty tensor of absurd shape": tensors({"wte.weight": one([0, 2**60], 0, 0)}),
    "a shape of floats": tensors({"wte.weight": one([1.5], 0, 8)}, bytes(8)),
    "an unknown type": tensors({"wte.weight": one([2], 0, 8, "Z9")}, bytes(8)),
    "a type of odd bits": tensors({"wte.weight": one([2], 0, 1, "F4")}, bytes(1)),
    "deep JSON": tensors(b"[" * 100_000),
    "NaN for a header": tensors(b"NaN"),
    "a list for a header": tensors([]),
    "a name of 5,000 digits": tensors({f"h.{'9' * 5000}.ln_1.weight": one([2], 0, 8)}, bytes(8)),
    "no text": tensors(b"\xff\xfe"),
}


@pytest.fixture
def little_memory():
    """2 GB more address space than this process has now: what would allocate by a file's claims fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def resume(folder: Path) -> None:
    checkpoint.resolve(str(folder), for_resume=True)
    checkpoint.load_optimizer(folder, {"exp_avg.wte.weight": torch.zeros(61, 32)})


def refused(folder: Path) -> str:
    """Every way to open the checkpoint raises a UserError; its text. None of them changes a file."""
    before = {path: path.stat().st_mtime_ns for path in folder.parent.parent.rglob("*")}
    with pytest.raises(UserError) as resumed:
        resume(folder)
    if "trainer_state" not in str(resumed.value):  # the weights are to blame: a folder of them alone is refused too
        with pytest.raises(UserError):
            generation.load_model(folder, "cpu")
    assert {path: path.stat().st_mtime_ns for path in folder.parent.parent.rglob("*")} == before
    assert "Traceback" not in str(resumed.value)
    return str(resumed.value)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize("content", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
def test_hostile_tensor_files_are_refused(good, little_memory, name, content):
    (good / name).write_bytes(content)
    seal(good)
    assert len(refused(good)) < 1500


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize("write", [pickle.dumps, lambda payload: payload_of_torch_save(payload)])
def test_a_pickle_under_the_name_of_safetensors_runs_nothing(good, tmp_path, name, write):
    victim = tmp_path / "victim"
    (good / name).write_bytes(write(Payload(victim)))
    seal(good)
    assert "is not a valid safetensors file" in refused(good)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Payload(victim)))  # the payload is a real one
    assert victim.exists()


def payload_of_torch_save(payload):
    import io

    buffer = io.BytesIO()
    torch.save({"wte.weight": payload}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "trainer_state/optimizer.pt", "trainer_state/.metadata"])
def test_pickles_beside_the_weights_are_not_looked_at(good, tmp_path, name):
    (good / name).write_bytes(pickle.dumps(Payload(tmp_path / "victim")))
    checkpoint.resolve(str(good), for_resume=True)
    checkpoint.load_optimizer(good, {"exp_avg.wte.weight": torch.zeros(61, 32)})
    generation.load_model(good, "cpu")
    assert not (tmp_path / "victim").exists()


def test_a_folder_with_a_pickle_instead_of_weights_is_refused(tmp_path, good):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(good / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "victim")))
    with pytest.raises(UserError, match=r"neither a step-… folder nor model.safetensors"):
        checkpoint.resolve(str(folder))
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "name",
    ["../../secret", "/etc/hostname", "trainer_state/../../../secret", "a\0b", "x" * 5000, "trainer_state/../.."],
)
def test_a_record_that_names_files_elsewhere_is_refused(good, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    record = json.loads((good / checkpoint_files.RECORD).read_text())
    digest = hashlib.sha256(b"secret").hexdigest()
    record["files"][name] = {"bytes": 6, "sha256": digest}
    (good / checkpoint_files.RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="is outside of the checkpoint"):
        checkpoint.resolve(str(good))


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "trainer_state"])
def test_links_out_of_the_checkpoint_are_refused(good, tmp_path, name):
    shutil.move(good / name, tmp_path / "elsewhere")
    (good / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is outside of the checkpoint"):
        checkpoint.resolve(str(good))


def test_a_loop_of_links_is_refused(good):
    (good / WEIGHTS).unlink()
    (good / WEIGHTS).symlink_to("model.safetensors")
    with pytest.raises(UserError, match=r"outside of the checkpoint|can't be read|is missing"):
        checkpoint.resolve(str(good))


def test_a_file_of_tensors_that_the_record_does_not_list_is_refused(good):
    shutil.copy(good / OPTIMIZER, good / "trainer_state" / "another.safetensors")
    with pytest.raises(UserError, match=r"does not list trainer_state/another.safetensors"):
        checkpoint.resolve(str(good))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 10**9, "n_head": 1}, {"n_layer": 10**12}, {"vocab_size": 2**60}, {"n_positions": 10**12},
        {"n_inner": 10**12}, {"n_layer": 3}, {"n_head": 10**30}, {"n_embd": 10**4000},
    ],
)  # fmt: skip
def test_a_configuration_larger_than_the_weights_is_refused_before_it_is_built(good, little_memory, changes):
    file = good / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    seal(good)
    assert "config.json" in refused(good)
    with pytest.raises(UserError):
        generation.load_model(good, "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**9}, {"num_hidden_layers": 10**12}, {"vocab_size": 2**60}, {"intermediate_size": 10**12},
        {"num_key_value_heads": 1}, {"num_attention_heads": 10**30}, {"head_dim": 10**4000}, {"hidden_size": 0},
        {"num_hidden_layers": 3}, {"rope_parameters": {"rope_theta": 10**400}}, {"rope_parameters": [[]] * 10**5},
        {"model_type": ["llama"]}, {"model_type": "gpt2"}, {"model_type": "qwen3"}, {"rope_theta": {}, "rope_parameters": {}},
        {"layer_types": ["x" * 10**6]},
    ],
)  # fmt: skip
def test_a_llama_that_is_not_its_weights_is_refused_before_it_is_built(tmp_path, little_memory, changes):
    folder = save(tmp_path / "run", LLAMA)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    seal(folder)
    assert len(refused(folder)) < 1500


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 10**9}, {"num_layers": 10**12}, {"vocab_size": 2**60}, {"d_ff": 10**12}, {"num_kv_heads": 1},
        {"num_heads": 10**30}, {"num_heads": 0}, {"vocab_size": None}, {"norm": 5}, {"position": "learned"},
        {"dropout": float("nan")}, {"rope_theta": float("inf")}, {"norm_eps": 0}, {"bias": 1}, {"bias": True},
        {"num_layers": 3}, {"d_ff": -1}, {"activation": "relu2" * 10**5}, {"qk_norm": True},
    ],
)  # fmt: skip
def test_a_model_of_our_own_form_that_is_not_its_weights_is_refused_before_it_is_built(
    tmp_path, little_memory, changes
):
    folder = save(tmp_path / "run", OWN)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model": config["model"] | changes}))
    seal(folder)
    refused(folder)


@pytest.mark.parametrize("model", [None, [], "gpt2", {}, 1])
def test_our_own_form_without_its_options_is_refused(tmp_path, model):
    folder = save(tmp_path / "run", OWN)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": model}))
    seal(folder)
    assert "there is no 'model' with its options in it" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "trainer_state/state.json", checkpoint_files.RECORD])
@pytest.mark.parametrize(
    "text", ["NaN", '{"step": NaN}', "[" * 10**6, '{"a":' * 10**5, "1" * 10**5, '{"step": -Infinity}', "\0", "{} {}"]
)
def test_malformed_json_is_refused(good, name, text):
    (good / name).write_text(text)
    if name != checkpoint_files.RECORD:
        seal(good)
    with pytest.raises(UserError, match=r"is not valid JSON|holds a JSON|lists no files"):
        checkpoint.resolve(str(good))


@pytest.mark.parametrize("bytes_", [-1, 2**70, 1.5, True, None, "6"])
def test_absurd_sizes_in_the_record_are_refused(good, bytes_):
    record = json.loads((good / checkpoint_files.RECORD).read_text())
    record["files"][WEIGHTS]["bytes"] = bytes_
    (good / checkpoint_files.RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"instead of|is malformed at"):
        checkpoint.resolve(str(good))


def test_a_saved_configuration_of_another_model_is_refused(good):
    """The model is built from state.json when a run is resumed: it too must be the weights'."""
    file = good / "trainer_state/state.json"
    state = json.loads(file.read_text())
    state["config"]["model"]["d_model"] = 10**9
    file.write_text(json.dumps(state))
    seal(good)
    with pytest.raises(UserError, match=r"state.json tells of another model than config.json: d_model 1000000000"):
        checkpoint.resolve(str(good), for_resume=True)
    assert sys.getrecursionlimit() < 10**5
