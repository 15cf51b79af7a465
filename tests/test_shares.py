"""One state, any shape: what N processes saved M processes load; blocks that don't fit together are refused."""

import json

import pytest
import torch
from commands import PYTHON, ROOT, run
from safetensors.torch import load_file, save_file

from gpt2_xla import checkpoint, shares
from gpt2_xla.checkpoint_files import NewFolder
from gpt2_xla.errors import UserError
from gpt2_xla.shares import Share


def test_a_state_cut_up_over_two_processes_is_loaded_by_one_two_and_four(tmp_path):
    output = run(*PYTHON, str(ROOT / "tests" / "sharded_state.py"), str(tmp_path))
    assert {line for line in output.splitlines() if "equal" in line} == {"1 equal", "2 equal", "4 equal"}
    path = tmp_path / "run" / "step-00000007"
    assert checkpoint.problems(path) == []
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert files == [
        "config.json", "model.safetensors", "trainer_state/COMPLETE", "trainer_state/optimizer-00000-000.safetensors",
        "trainer_state/optimizer-00001-000.safetensors", "trainer_state/state.json",
    ]  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # the parts are gone
    from sharded_state import tensors

    weights, _ = tensors(1)
    found = checkpoint.read_weights(path)  # the file that transformers reads is whole
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def write(folder, *files):
    """Files of shares, one per argument."""
    new = NewFolder(folder)
    for index, found in enumerate(files):
        ((entries, metadata),) = shares.share_files(found)
        new.write_tensors(f"{index}.safetensors", entries, metadata)
    return sorted(folder.glob("*.safetensors"))


def block(start, stop, columns=(0, 3)):
    whole = torch.arange(12.0).view(4, 3)
    return Share("w", whole[start:stop, slice(*columns)], (start, columns[0]), (4, 3))


@pytest.mark.parametrize(
    "files",
    [
        [[block(0, 4)]],
        [[block(0, 1)], [block(1, 4)]],
        [[block(0, 3, (0, 1))], [block(0, 3, (1, 3))], [block(3, 4)]],
    ],
)
def test_blocks_of_any_cut_are_put_together(tmp_path, files):
    target = torch.zeros(4, 3, dtype=torch.float64)  # another type is converted
    shares.load(write(tmp_path / "a", *files), {"w": target})
    assert torch.equal(target, torch.arange(12.0, dtype=torch.float64).view(4, 3))
    parts = [share for file in sorted((tmp_path / "a").glob("*.safetensors")) for share in shares.read_shares(file)]
    assert torch.equal(shares.put_together(parts), torch.arange(12.0).view(4, 3))


def test_blocks_that_one_process_holds_apart_from_each_other_go_to_files_of_their_own():
    files = shares.share_files([block(0, 1), block(2, 4), Share.whole("step", torch.tensor(1.0))])
    assert [[entry.name for entry in entries] for entries, _ in files] == [["w", "step"], ["w"]]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([[block(0, 2)], [block(3, 4)]], "blocks of w in .* overlap or leave a gap"),
        ([[block(0, 3)], [block(2, 4)]], "blocks of w in .* overlap or leave a gap"),
        ([[block(0, 2)], [block(0, 2)]], "blocks of w in .* overlap or leave a gap"),
        ([[block(0, 2)]], r"w in .* is \[2, 3\]; the model's is \[4, 3\]"),
        ([[Share.whole("v", torch.ones(4, 3))]], "w is missing"),
        ([[Share("w", torch.ones(2), (0,), (4,))], [block(2, 4)]], "overlap or leave a gap"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_before_anything_is_copied(tmp_path, files, sentence):
    target = torch.zeros(4, 3)
    with pytest.raises(UserError, match=sentence):
        shares.load(write(tmp_path / "a", *files), {"w": target})
    assert not target.any()


@pytest.mark.parametrize(
    "info",
    [
        "[", "[]", "{}", "7", '{"w": 3}', '{"w": {}}', '{"w": {"saved_offsets": [0]}}', "[" * 100_000,
        '{"w": {"saved_offsets": [0, -1]}}', '{"w": {"saved_offsets": [0, 1e3]}}', '{"w": {"saved_offsets": [0, true]}}',
        '{"w": {"saved_offsets": [0, 4611686018427387904]}}', '{"w": {"saved_offsets": "00"}}',
    ],
)  # fmt: skip
def test_odd_offsets_are_a_users_error(tmp_path, info):
    target = torch.zeros(4, 3)
    save_file({"w": torch.ones(4, 3)}, tmp_path / "a.safetensors", {shares.OFFSETS: info})
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        shares.load([tmp_path / "a.safetensors"], {"w": target})
    assert not target.any()


def test_our_files_are_byte_for_byte_those_of_the_safetensors_library(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
    tensors = {f"t{n}": torch.arange(6).view(2, 3).to(kind) for n, kind in enumerate(kinds)}
    tensors["transposed"], tensors["scalar"] = torch.randn(5, 3).t(), torch.tensor(2.0)
    (file,) = write(tmp_path / "a", shares.whole_shares(tensors))
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(file).items())
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "b", {"format": "pt"})
    assert json.loads(header(file)) == json.loads(header(tmp_path / "b"))
    assert file.read_bytes()[-1:] == (tmp_path / "b").read_bytes()[-1:]


def header(file):
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]
