"""Shards and manifests: what is written is read back, and every kind of damage is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data import shards
from gpt2_xla.data.manifest import Manifest, ShardEntry
from gpt2_xla.data.shards import TokenStream, dtype_for, open_shard, write_shard
from gpt2_xla.errors import UserError


def make_folder(folder: Path, lengths: list[int], dtype: str = "uint16") -> Manifest:
    """Shards of random tokens below 100, with a manifest."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    entries = []
    for i, length in enumerate(lengths):
        tokens = rng.integers(0, 100, length).astype(dtype)
        entries.append(ShardEntry(f"s_{i}.npy", length, 0, write_shard(folder / f"s_{i}.npy", tokens)))
    manifest = Manifest("train", dtype, sum(lengths), tuple(entries), tokenizer="x", vocab_size=100)
    manifests.write(folder, manifest)
    return manifest


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_are_plain_npy_files(tmp_path: Path, dtype: str) -> None:
    tokens = np.arange(1000, dtype=dtype)
    write_shard(tmp_path / "a.npy", tokens)
    np.save(tmp_path / "b.npy", tokens)
    for read in (np.load, open_shard):
        assert np.array_equal(read(tmp_path / "a.npy"), tokens)
    assert np.array_equal(open_shard(tmp_path / "b.npy"), tokens)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npy", "b.npy"]


def test_dtype_follows_the_vocabulary() -> None:
    assert [dtype_for(size) for size in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    with pytest.raises(UserError, match="32 bits"):
        dtype_for(2**32 + 1)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.data())
@settings(max_examples=50)
def test_stream_is_the_concatenation(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    manifest = make_folder(folder, lengths)
    whole = np.concatenate([np.load(path) for path in manifest.paths(folder)])
    stream = TokenStream(manifest.paths(folder))
    assert len(stream) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    out = np.empty(stop - start, np.int64)
    stream.read_into(start, out)
    assert np.array_equal(out, whole[start:stop])
    with pytest.raises(IndexError):
        stream.read_into(start, np.empty(len(whole) - start + 1, np.int64))
    stream.close()


def test_stream_keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    manifest = make_folder(tmp_path / "d", [3] * 6)
    stream = TokenStream(manifest.paths(tmp_path / "d"))
    out = np.empty(18, np.int64)
    for _ in range(2):
        stream.read_into(0, out)
        assert np.array_equal(out, np.concatenate([np.load(p) for p in stream.paths]))
        assert len(stream._files) <= 2


def test_a_file_in_use_is_not_the_one_that_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    manifest = make_folder(tmp_path / "d", [3] * 3)
    stream = TokenStream(manifest.paths(tmp_path / "d"))
    for shard in (0, 1):
        stream.read_into(3 * shard, np.empty(3, np.int64))
    # Shard 0 was opened first, but it is needed together with shard 2: shard 1 has to go.
    expected = [np.load(stream.paths[shard]).tolist() for shard in (0, 2)]
    assert stream.gather(np.array([0, 6]), 3).tolist() == expected


def test_stream_notices_a_shard_that_shrinks_under_it(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "d", [100])
    stream = TokenStream(manifest.paths(tmp_path / "d"))
    (tmp_path / "d" / "s_0.npy").open("r+b").truncate(150)
    with pytest.raises(UserError, match=r"s_0.npy has become shorter"):
        stream.read_into(50, np.empty(50, np.int64))


def test_manifest_survives_the_round_trip(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "d", [5, 6])
    assert manifests.read(tmp_path / "d") == manifest
    manifests.verify(tmp_path / "d", manifest, full=True)


def test_fingerprint_is_of_the_tokens_not_of_the_command(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "d", [5])
    assert replace(manifest, command="other", source=("x",)).fingerprint == manifest.fingerprint
    assert replace(manifest, tokenizer_hash="other").fingerprint != manifest.fingerprint
    assert make_folder(tmp_path / "e", [6]).fingerprint != manifest.fingerprint


def test_bare_folders_of_npy_files_are_read(tmp_path: Path) -> None:
    for name, length in (("b.npy", 3), ("a.npy", 4)):
        np.save(tmp_path / name, np.zeros(length, np.uint16))
    manifest = manifests.read(tmp_path)
    assert [(s.file, s.tokens, s.sha256) for s in manifest.shards] == [("a.npy", 4, None), ("b.npy", 3, None)]
    assert (manifest.tokens, manifest.dtype, manifest.tokenizer, manifest.vocab_size) == (7, "uint16", None, None)
    manifests.verify(tmp_path, manifest, full=True)


def test_bare_folders_must_not_mix_dtypes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3, np.uint16))
    np.save(tmp_path / "b.npy", np.zeros(3, np.uint32))
    with pytest.raises(UserError, match="mixes shards of uint16 and uint32"):
        manifests.read(tmp_path)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist; .*prepare_text.py"):
        manifests.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither manifest.json nor .npy shards; .*prepare_text.py"):
        manifests.read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        manifests.read(tmp_path / "file")
    make_folder(tmp_path / "train", [3])
    with pytest.raises(UserError, match=r"did you mean .*train"):
        manifests.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"tokens": 12}, "sum to 11 tokens"),
        ({"tokens": -1}, "tokens is -1"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"shards": []}, "no shards"),
        ({"shards": "all"}, "must be a list"),
        ({"shards": [{"file": "../s_0.npy", "tokens": 11}]}, "not a plain file name"),
        ({"shards": [{"file": "/etc/passwd", "tokens": 11}]}, "not a plain file name"),
        ({"shards": [{"file": "..", "tokens": 11}]}, "not a plain file name"),
        ({"shards": [{"file": "a"}]}, "no file and tokens"),
        ({"shards": [{"file": "a", "tokens": 5}, {"file": "a", "tokens": 6}]}, "listed twice"),
    ],
)
def test_malformed_manifests_are_refused(tmp_path: Path, change: dict, said: str) -> None:
    make_folder(tmp_path / "d", [5, 6])
    file = tmp_path / "d" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said) as caught:
        manifests.read(tmp_path / "d")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', "[" * 100_000])
def test_manifests_that_are_not_json_objects_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="malformed"):
        manifests.read(tmp_path)


def test_a_shard_cut_short_is_named_with_its_sizes(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path, [600])
    (tmp_path / "s_0.npy").open("r+b").truncate(1000)
    with pytest.raises(UserError, match=r"s_0.npy holds 1000 bytes, its header promises 1328: copy it again"):
        open_shard(tmp_path / "s_0.npy")
    with pytest.raises(UserError, match="promises 1328"):
        manifests.verify(tmp_path, manifest, full=False)


def test_a_flipped_byte_is_found_by_the_full_check(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path, [600])
    data = bytearray((tmp_path / "s_0.npy").read_bytes())
    data[700] ^= 1
    (tmp_path / "s_0.npy").write_bytes(data)
    manifests.verify(tmp_path, manifest, full=False)
    with pytest.raises(UserError, match=r"s_0.npy has changed since it was prepared"):
        manifests.verify(tmp_path, manifest, full=True)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path, [5, 6, 7, 8, 9])
    (tmp_path / "s_0.npy").unlink()
    (tmp_path / "s_1.npy").write_bytes(b"no numpy at all")
    np.save(tmp_path / "s_2.npy", np.zeros(99, np.uint16))
    np.save(tmp_path / "s_3.npy", np.zeros((2, 4), np.uint16))
    with pytest.raises(UserError) as caught:
        manifests.verify(tmp_path, manifest, full=True)
    said = caught.value.mistakes
    for shard, words in (
        ("s_0", "can't be read"),
        ("s_1", "no valid .npy header"),
        ("s_2", "holds 99 tokens"),
        ("s_3", "shape"),
    ):
        assert any(shard in mistake and words in mistake for mistake in said)
    assert not any("s_4" in mistake for mistake in said)


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_no_bytes_make_the_header_reader_crash(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.mktemp("junk") / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + junk)
    with pytest.raises(UserError, match=r"a.npy"):
        open_shard(path)


@pytest.mark.parametrize("dtype", ["int64", "float32", "object"])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3, dtype))
    with pytest.raises(UserError, match="expected one dimension of uint16 or uint32"):
        open_shard(tmp_path / "a.npy")
