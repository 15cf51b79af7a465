"""The parsers of files from elsewhere, each as a function of the file's bytes: `UserError` or a value, nothing else.

tests/test_fuzz.py feeds them with hypothesis. By hand, with coverage-guided fuzzing, where atheris installs (it has wheels
for Linux and Python up to 3.13 at the most; without one pip builds it with clang):

    pip install atheris && python tests/fuzz_parsers.py manifest -max_total_time=60
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch


def _instrumented() -> AbstractContextManager[object]:
    """Our own modules alone: instrumenting torch too takes minutes."""
    if __name__ != "__main__":
        return nullcontext()
    import atheris

    return atheris.instrument_imports(include=["gpt2_xla"])


with _instrumented():
    from gpt2_xla import checkpoint, checkpoint_files, cli, hf, shares
    from gpt2_xla.config import ModelConfig, TorchPretrainConfig
    from gpt2_xla.data import manifest, shards
    from gpt2_xla.errors import UserError
    from gpt2_xla.validation import config_mistakes

SEPARATOR = b"\n\0"


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fuzz_manifest(folder: Path, data: bytes) -> None:
    _file(folder, "manifest.json", data)
    found = manifest.read(folder)
    assert found.fingerprint
    assert all(path.parent == folder for path in found.paths(folder))


def fuzz_shard(folder: Path, data: bytes) -> None:
    tokens = shards.open_shard(_file(folder, "train_00000.npy", data))
    assert tokens.ndim == 1
    assert tokens.nbytes <= len(data)


def fuzz_state(folder: Path, data: bytes) -> None:
    _file(folder, checkpoint.STATE, data)
    state = checkpoint.read_state(folder)
    config = cli.from_dict(TorchPretrainConfig, state.config)
    assert all(isinstance(mistake, str) for mistake in config_mistakes(config, frozenset()))


def fuzz_record(folder: Path, data: bytes) -> None:
    _file(folder, checkpoint_files.RECORD, data)
    found = checkpoint_files.damage(folder, {"config.json"}, lambda _: False)
    assert found  # there is no config.json
    assert checkpoint_files.save_number(folder) >= 0
    for name in checkpoint_files.recorded(folder):
        assert (folder / name).resolve().is_relative_to(folder.resolve())


def fuzz_model(folder: Path, data: bytes) -> None:
    """config.json and, after a separator, model.safetensors."""
    config, _, weights = data.partition(SEPARATOR)
    _file(folder, "config.json", config)
    _file(folder, "model.safetensors", weights)
    checkpoint.read_weights(folder)


# The same for the other forms of config.json.
fuzz_llama = fuzz_own_model = fuzz_model


def fuzz_optimizer(folder: Path, data: bytes) -> None:
    shares.load([_file(folder, "optimizer.safetensors", data)], {"w": torch.zeros(2)})


def fuzz_recipe(folder: Path, data: bytes) -> None:
    path = _file(folder, "own.flags", data)
    config = cli.parse(TorchPretrainConfig, ["--recipe", str(path)], "").config
    assert all(isinstance(mistake, str) for mistake in config_mistakes(config, frozenset()))


PARSERS: dict[str, Callable[[Path, bytes], None]] = {
    name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")
}


def parse(name: str, folder: Path, data: bytes) -> None:
    """Feed one parser; a `UserError` with a sentence is as good as a value."""
    try:
        PARSERS[name](folder, data)
    except UserError as error:
        if not error.mistakes or not all(error.mistakes):
            raise AssertionError("a UserError without a sentence") from error


def _safetensors(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _npy() -> bytes:
    text = "{'descr': '<u2', 'fortran_order': False, 'shape': (4,), }".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)


_W = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
_CONFIG = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 4, "n_embd": 2, "n_layer": 1, "n_head": 1}
_OWN = ModelConfig(vocab_size=9, seq_length=4, d_model=8, num_layers=1, num_heads=2, norm="rmsnorm")
_LLAMA = replace(_OWN, position="rope", activation="swiglu", bias=False)
# A good file of each kind, to start from.
SEEDS: dict[str, bytes] = {
    "manifest": json.dumps(
        {
            "version": 1, "split": "train", "dtype": "uint16", "tokens": 4, "vocab_size": 257, "end_of_text": 256,
            "shards": [{"file": "train_00000.npy", "tokens": 4, "documents": 1, "sha256": "00", "first_document": "a"}],
            "inputs": [{"file": "a", "bytes": 1, "version": "1"}], "source": ["a"], "skipped_files": [],
        }
    ).encode(),
    "shard": _npy(),
    "state": json.dumps(
        {
            "step": 3, "samples": 24, "valid_loss": 1.5, "best_valid_loss": None, "scaler": {"scale": 1.0},
            "recent_losses": [2.5], "open_window": {"steps": 2, "loss": 5.0, "skipped": 0.0, "skipped_in_a_row": 1.0},
            "config": {"model": {"d_model": 8, "d_ff": None}, "data": {"train_dir": ["a"]}, "run": {"seed": 1},
                       "optim": {"betas": [0.9, 0.95], "learning_rate": 1e-3}},
        }
    ).encode(),
    "record": json.dumps({"format": 1, "save": 3, "files": {"config.json": {"bytes": 1, "sha256": "00"}}}).encode(),
    "model": json.dumps(_CONFIG).encode() + SEPARATOR + _safetensors(_W, bytes(8)),
    "llama": json.dumps(hf.hugging_face_config(_LLAMA, 1)).encode() + SEPARATOR + _safetensors(_W, bytes(8)),
    "own_model": json.dumps(hf.hugging_face_config(_OWN, 1)).encode() + SEPARATOR + _safetensors(_W, bytes(8)),
    "optimizer": _safetensors(
        {"__metadata__": {shares.OFFSETS: json.dumps({"w": {"saved_offsets": [0]}})}, **_W}, bytes(8)
    ),
    "recipe": b"# comment\n--preset tiny --learning-rate 1e-3 --betas 0.9 0.95\n--no-shuffle --optim-type=adamw\n",
}  # fmt: skip


def main() -> None:
    """Run atheris on the parser named first on the command line."""
    import atheris

    name = sys.argv.pop(1)

    def once(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            parse(name, Path(folder), data)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
