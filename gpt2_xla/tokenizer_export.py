"""Our tokenizers as the files that `transformers` reads: the same ids for every text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_xla.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    byte_alphabet,
)

END_OF_TEXT = "<|endoftext|>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into the folder; `context` is the longest text in tokens."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    else:
        assert isinstance(tokenizer, ByteTokenizer | TiktokenTokenizer)
        content = _bytes_json() if isinstance(tokenizer, ByteTokenizer) else _tiktoken_json(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    # None of ours begins a text with a token of its own; GPT-2 takes the end of the last one for its beginning.
    config |= {"bos_token": config["eos_token"], "unk_token": config["eos_token"], "model_max_length": context}
    config |= {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _bytes_json() -> dict[str, Any]:
    """Bytes 0..255 and end-of-text: a vocabulary in which nothing is ever merged."""
    names = {byte: character for character, byte in byte_alphabet().items()}
    vocabulary = {names[byte]: byte for byte in range(256)}
    return _tokenizer_json(vocabulary, [], {END_OF_TEXT: ByteTokenizer.end_of_text}, pattern=None)


def _tiktoken_json(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """A tiktoken encoding, whose ids are the order of its merges."""
    names = {byte: character for character, byte in byte_alphabet().items()}
    ranks = tokenizer.ranks()
    spelled = {token: "".join(names[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [
        [spelled[part] for part in pair]
        for token, rank in ranks.items()
        if len(token) > 1 and len(pair := _parts(token, ranks, rank)) == 2
    ]
    return _tokenizer_json(vocabulary, merges, tokenizer.special_tokens(), tokenizer.pattern)


def _parts(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """What is left of a token's bytes when only merges of lower rank than its own are made: the two that it was made of."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, at = min(pairs)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _tokenizer_json(
    vocabulary: dict[str, int], merges: list[list[str]], special: Mapping[str, int], pattern: str | None
) -> dict[str, Any]:
    """The content of a tokenizer.json: byte-level BPE, its text first cut by a regular expression."""
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    added = [
        {
            "id": token,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for content, token in sorted(special.items(), key=lambda item: item[1])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, by_bytes]} if pattern else by_bytes,
        "post_processor": None,
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece of text that is a token is that token, as in tiktoken
            "vocab": vocabulary | dict(special),
            "merges": merges,
        },
    }
