"""Encoders: the fast one makes the reference's tokens, whatever the text, its length and the vocabulary's kind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt2_xla.data import cuts, prepare
from gpt2_xla.data import encoder as encoders
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.encoder import DocumentEncoder, Encoder, GigatokenEncoder, ReferenceEncoder, fast_encoder
from gpt2_xla.data.inputs import inputs_of
from gpt2_xla.data.shards import open_shard
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import PrepareConfig
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer, replace_surrogates


def weird_texts() -> list[str]:
    """Texts that tokenizers get wrong, and random ones from every corner of Unicode."""
    texts = ["\0", "a\0b\0\0", " ", "\n \n  x", "  " * 500 + "x", "<|endoftext|>", "a<|endoftext|>b", "\ufffd\ufffdb"]
    texts += [
        "日本語",
        "👨‍👩‍👧‍👦",
        "\u202e\u200b\u00a0\u2003x",
        "é" * 999,
        "'s 't 'S 're",
        "٣٤٥ ௧",
        "a" * 5000,
        "1" * 999,
    ]
    texts += [
        "\r\n\r\n\t\tx",
        "\x85x\u2028y\x1cz",
        "\ufeffbom",
        "½²³ⅷ",
        "ǅʰª",
        "\U0010ffff\U000e0001",
        "lone \ud800 \udc00x",
    ]
    random = np.random.default_rng(0)
    ranges = [
        (32, 127),
        (0, 0x300),
        (0x300, 0xD800),
        (0xE000, 0x11000),
        (0x10000, 0x110000),
        (32, 33),
        (9, 14),
        (39, 40),
    ]
    for _ in range(1500):
        picked = [ranges[i] for i in random.integers(0, len(ranges), random.integers(1, 150))]
        texts.append("".join(chr(random.integers(low, high)) for low, high in picked))
    return [replace_surrogates(text) for text in texts]


# Encoders


@pytest.fixture(scope="module")
def corpora(shared_data: Path) -> list[list[str]]:
    """Odd texts, web pages, Python source."""
    pages = [
        row
        for file in sorted((shared_data / "web_sample").iterdir())
        for row in pq.read_table(file)["text"].to_pylist()
    ]
    code = [Path(file.url).read_text() for file in inputs_of("stdlib", "--source")[:100]]
    return [weird_texts(), pages, code]


def assert_same_tokens(fast: Encoder, tokenizer: Tokenizer, corpora: list[list[str]]) -> None:
    for texts in corpora:
        ids, counts = fast.encode([text.encode() for text in texts])
        parts = np.split(ids, np.cumsum(counts)[:-1])
        for text, part in zip(texts, parts, strict=True):
            assert part.tolist() == tokenizer.encode(text), text[:100]


def test_gigatoken_makes_tiktokens_tokens(corpora: list[list[str]], tiktoken_cache: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    fast = fast_encoder(tokenizer)
    assert isinstance(fast, GigatokenEncoder)
    assert_same_tokens(fast, tokenizer, corpora)


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
CL100K = tokenizers.Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def like_gpt2(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.pre_tokenizer = BYTE_LEVEL


def like_llama_3(tokenizer: tokenizers.Tokenizer) -> None:
    split = pre_tokenizers.Split(CL100K, "isolated")
    without_rule = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, without_rule])


def like_qwen(tokenizer: tokenizers.Tokenizer) -> None:
    like_llama_3(tokenizer)
    tokenizer.normalizer = normalizers.NFC()


def with_digits_alone(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])


def in_lower_case(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.pre_tokenizer, tokenizer.normalizer = BYTE_LEVEL, normalizers.Lowercase()


@pytest.mark.parametrize(
    ("shape", "added", "is_fast"),
    [
        (like_gpt2, [], True),
        (like_llama_3, [], True),
        (like_qwen, [], True),
        (with_digits_alone, [], False),
        (in_lower_case, [], False),
        (like_gpt2, ["fox jumps"], False),
    ],
)
def test_gigatoken_makes_the_tokens_of_a_hugging_face_tokenizer_or_leaves_it_alone(
    tmp_path: Path,
    corpora: list[list[str]],
    shape: Callable[[tokenizers.Tokenizer], None],
    added: list[str],
    is_fast: bool,
) -> None:
    built = tokenizers.Tokenizer(models.BPE())
    shape(built)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "'s"]  # the second one so that it must not be found in texts
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet)
    built.train_from_iterator(corpora[1][:80], trainer)
    built.add_tokens(added)
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    fast = fast_encoder(tokenizer)
    assert isinstance(fast, GigatokenEncoder if is_fast else ReferenceEncoder)
    assert_same_tokens(fast, tokenizer, [texts[: 300 if is_fast else 30] for texts in corpora])
    encoder = DocumentEncoder(tokenizer)
    encoder.encode([b"text"] * 10, ["name"] * 10, np.random.default_rng(0))
    assert encoder.checked == is_fast


def test_a_full_cache_is_thrown_away_and_changes_nothing(tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_encoder(load_tokenizer("gpt2"))
    assert isinstance(fast, GigatokenEncoder)
    before, _ = fast.encode([b"some words"] * 3)
    first = fast._backend
    monkeypatch.setattr(encoders, "CACHE_LIMIT", -(2**40))
    again, _ = fast.encode([b"some words"] * 3)
    assert fast._backend is not first
    assert before.tolist() == again.tolist()


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_long_documents_are_cut_where_it_changes_nothing(
    name: str, shared_data: Path, tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "LONG", 1000)
    monkeypatch.setattr(cuts, "PIECE", 100)
    monkeypatch.setattr(encoders, "AT_ONCE", 5000)
    tokenizer = load_tokenizer(name)
    texts = [
        (shared_data / "tinyshakespeare.txt").read_bytes(),
        b"no cut " * 999,
        "".join(weird_texts()).encode(),
        Path(inputs_of("stdlib", "--source")[0].url).read_bytes(),
        b"a",
    ]
    assert len(cuts.cuts_of(texts[0])) > 4000
    encoded = DocumentEncoder(tokenizer).encode(texts, list("abcde"), np.random.default_rng(0))
    parts = np.split(encoded.tokens, np.cumsum(encoded.counts)[:-1])
    assert [part.tolist() for part in parts] == [tokenizer.encode(text.decode()) for text in texts]


def test_runs_without_a_word_end_are_cut_where_it_changes_nothing(
    tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "LONG", 3000)
    monkeypatch.setattr(cuts, "PIECE", 500)
    tokenizer = load_tokenizer("gpt2")
    random = np.random.default_rng(0)
    letters = [b"a", b"ab", b"ABCXYZabcxyz", b"ACGT", b"theandofing", bytes([*range(65, 91), *range(97, 123)])]
    texts = [bytes(random.choice(list(letter), 10_000).tolist()) for letter in letters for _ in range(3)]
    texts += [sign * 10_001 for sign in (b"-", b"=", b"'", b"!?", b"1", "語".encode(), b"\n", b"word")]
    texts += [b"'r" + b"e" * 4000 + b"'s \xc3\xa9" + b"x" * 4000 + b"   \n " + b"-" * 4000 + b"'ll", b"x" * 3500]
    encoder = DocumentEncoder(tokenizer)
    cut = 0
    for text in texts:
        places = encoder._cuts(text)
        cut += len(places) > 4
        assert max(np.diff(places)) <= 1000 or len(places) < 4
        encoded = encoder.encode([text], ["name"], random)
        assert encoded.tokens.tolist() == tokenizer.encode(text.decode()), text[:20]
    assert cut > 20


def test_a_sample_of_documents_is_held_against_the_reference(tmp_path: Path, tiktoken_cache: Path, monkeypatch) -> None:
    lines = [json.dumps({"text": f"document {i} says hello", "id": f"<{i}>"}) for i in range(2500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    encoder = DocumentEncoder(load_tokenizer("gpt2"))
    encoder.encode([b"text"] * 2500, ["x"] * 2500, np.random.default_rng(0))
    assert encoder.checked == 3

    honest = GigatokenEncoder.encode

    def wrong(self: GigatokenEncoder, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = honest(self, texts)
        return ids + 1, counts

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong)
    config = PrepareConfig((str(tmp_path / "a.jsonl"),), "gpt2", str(tmp_path / "out"), num_workers=1)
    with pytest.raises(UserError, match=r"document a.jsonl#\d+: gigatoken makes other tokens of it than tiktoken"):
        prepare.prepare_text(config)
    prepare.prepare_text(replace(config, fast_tokenizer=False))
    first = load_tokenizer("gpt2").encode("document 0 says hello")
    (shard,) = manifests.read(tmp_path / "out" / "train").paths(tmp_path / "out" / "train")
    assert open_shard(shard)[: len(first)].tolist() == first
