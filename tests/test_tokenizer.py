"""Tokenizers: round trips, ordinary semantics, stable hashes, clear errors."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2_xla.tokenizer
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import ByteTokenizer, Tokenizer, encode_utf8, load_tokenizer, replace_surrogates

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=50)  # lone surrogates included
TRICKY = "héllo <|endoftext|> 日本語 🎉\r\n\0 end"


def make_hf(folder: Path, special: str = "<|endoftext|>", byte_level: bool = True) -> Path:
    """A small BPE tokenizer.json that also asks to cut and pad and to add special tokens, as real ones do."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None if byte_level else "?"))
    if byte_level:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if byte_level else list("helo wrd?▁")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=[special], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world"] * 4, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special} $A", special_tokens=[(special, 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["bytes", "gpt2", "hf"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "gpt2":
        request.getfixturevalue("tiktoken_cache")
    return load_tokenizer(str(make_hf(tmp_path / "hf")) if request.param == "hf" else request.param)


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TRICKY)
    assert tokenizer.decode(ids) == TRICKY
    assert tokenizer.decode_bytes(ids) == TRICKY.encode()
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TRICKY.encode()


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83c\udf89")) == "🎉"  # a pair is a character


def test_ids_beyond_the_vocabulary_decode_to_something(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([10**6, *tokenizer.encode("x")]) == "\ufffdx"


@given(ANY_TEXT)
@settings(max_examples=200)
def test_bytes_are_utf8(text: str) -> None:
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ByteTokenizer().encode(text) == list(clean.encode())
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == clean


@given(ANY_TEXT, st.integers(1, 5))
@settings(max_examples=200)
def test_long_texts_are_encoded_in_parts_that_split_no_pair(text: str, size: int) -> None:
    pairs = text + "\ud83c\ud83c\udf89" * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2_xla.tokenizer, "ENCODED_AT_ONCE", size)
        assert encode_utf8(pairs) == replace_surrogates(pairs).encode()


def test_hashes_are_stable_and_tell_vocabularies_apart(tokenizer: Tokenizer) -> None:
    known = {
        "bytes": "001754e626301be988e342c24b5a6e40921dd650677c06138759ae23f5a26bd1",
        "gpt2": "f1573bd1679edbb0d65b9edd171f5d26199d5d84cb6f4ee1819e1f77ccaab9ec",
    }
    assert tokenizer.hash == load_tokenizer(tokenizer.name).hash
    assert tokenizer.hash == known.get(tokenizer.name, tokenizer.hash)
    assert len(tokenizer.hash) == 64


def test_gpt2_is_gpt2(tiktoken_cache: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello, world") == [15496, 11, 995]


def test_hugging_face_hash_ignores_the_path_and_formatting(tmp_path: Path) -> None:
    first = make_hf(tmp_path / "a")
    content = json.loads((first / "tokenizer.json").read_text())
    content["truncation"] = None
    (tmp_path / "b.json").write_text(json.dumps(content))
    assert load_tokenizer(str(first)).hash == load_tokenizer(str(tmp_path / "b.json")).hash
    assert load_tokenizer(str(make_hf(tmp_path / "c", "</s>"))).hash != load_tokenizer(str(first)).hash


def test_hugging_face_end_of_text_is_the_configured_one(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "a", "[STOP]")
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(folder))
    for eos in ("[STOP]", {"content": "[STOP]", "lstrip": False}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.decode([tokenizer.end_of_text]) == "[STOP]"


def test_saved_hugging_face_tokenizer_is_the_same(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "a", "[STOP]")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "[STOP]"}')
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    (tmp_path / "b").mkdir()
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(str(tmp_path / "b"))
    assert (again.hash, again.end_of_text) == (tokenizer.hash, tokenizer.end_of_text)


def test_tokenizers_that_are_not_byte_level_decode(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_hf(tmp_path / "a", byte_level=False)))
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt-2", "did you mean gpt2"),
        ("byte", "did you mean bytes"),
        ("xyzzy", "expected bytes, gpt2"),
        ("no/such/tokenizer.json", "no such file"),
    ],
)
def test_unknown_names_are_explained(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(name)
    assert f"--tokenizer {name}" in str(caught.value)


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(UserError, match=r"is not a Hugging Face tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_tiktoken_without_network_names_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # no network, on a machine that has one too
    with pytest.raises(UserError, match=r"openaipublic.blob.core.windows.net.*TIKTOKEN_CACHE_DIR.*--tokenizer bytes"):
        load_tokenizer("p50k_base")
