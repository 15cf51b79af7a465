"""Documents' UTF-8 to token arrays: gigatoken where it knows the vocabulary, held against tiktoken; else the tokenizer itself.

Measured on one core: gigatoken 0.10 does 139 MB/s of Python source, tiktoken 14; the ids are the same, and a sample of every
unit's documents is tokenized twice to keep it so.
"""

import base64
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import ByteTokenizer, TiktokenTokenizer, Tokenizer

# The vocabularies that gigatoken splits as tiktoken does, and its name for the rule.
PRETOKENIZERS = {"gpt2": "gpt2", "r50k_base": "r50k", "cl100k_base": "cl100k", "o200k_base": "o200k"}
CHECKED = 1 / 1000  # share of the documents that are tokenized a second time, by the reference
CACHE_LIMIT = 200 * 2**20  # gigatoken remembers every word it has seen, without end: 2 GB after 300 MB of random words
LONG = 2**20  # bytes; documents above are tokenized in pieces
PIECE = 2**18
# Between a letter or digit and a newline no rule of PRETOKENIZERS looks ahead or behind, so both sides tokenize alone.
SAFE_CUT = re.compile(rb"[A-Za-z0-9](?=\n)")


class Encoder(Protocol):
    """Texts to ids."""

    name: str

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end (N,), and how many each has (len(texts),)."""


class BytesEncoder:
    """A byte is its id."""

    name = "bytes"

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        return np.frombuffer(b"".join(texts), np.uint8), np.array([len(text) for text in texts], np.int64)


class ReferenceEncoder:
    """The tokenizer itself, one text after the other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = "tiktoken" if isinstance(tokenizer, TiktokenTokenizer) else "tokenizers"
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._encode(text.decode()) for text in texts]
        return np.concatenate([np.empty(0, np.uint32), *parts]), np.array([len(part) for part in parts], np.int64)

    def _encode(self, text: str) -> np.ndarray:
        if isinstance(self._tokenizer, TiktokenTokenizer):
            return self._tokenizer.encode_array(text)
        return np.array(self._tokenizer.encode(text), np.uint32)


class GigatokenEncoder:
    """A tiktoken vocabulary in gigatoken, without its special tokens, so that their characters are text."""

    name = "gigatoken"

    def __init__(self, tokenizer: TiktokenTokenizer) -> None:
        self._tokenizer = tokenizer
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._backend: Any = None  # frees the cache before the next one is built
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            for token, rank in self._tokenizer.ranks().items():
                file.write(base64.b64encode(token) + b" %d\n" % rank)
            file.flush()
            rule = PRETOKENIZERS[self._tokenizer.name]
            self._backend = gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer=rule, special_tokens={})
        self._resident, self._encoded = _resident_bytes(), 0

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._backend.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        self._encoded += sum(map(len, texts))
        resident = _resident_bytes()
        grown = resident - self._resident if resident else self._encoded
        if grown > CACHE_LIMIT + 5 * ids.nbytes:  # the ids and what made them are no cache
            self._load()
        return ids, np.diff(offsets)


def _resident_bytes() -> int:
    """This process's memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def fast_encoder(tokenizer: Tokenizer, fast: bool = True) -> Encoder:
    """The fastest encoder that there is for a tokenizer; the tokenizer itself if not `fast`."""
    if isinstance(tokenizer, ByteTokenizer):
        return BytesEncoder()
    if fast and isinstance(tokenizer, TiktokenTokenizer) and tokenizer.name in PRETOKENIZERS:
        try:
            return GigatokenEncoder(tokenizer)
        except ImportError:
            return ReferenceEncoder(tokenizer)
    return ReferenceEncoder(tokenizer)


def can_cut(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut at SAFE_CUT without changing its tokens."""
    return isinstance(tokenizer, ByteTokenizer) or tokenizer.name in PRETOKENIZERS


def pieces_of(text: bytes) -> list[bytes]:
    """A long text in pieces of about PIECE bytes, cut where it may be; in one where nowhere is."""
    cuts = [0]
    while found := SAFE_CUT.search(text, cuts[-1] + PIECE):
        cuts.append(found.end())
    return [text[start:stop] for start, stop in pairwise([*cuts, len(text)])]


@dataclass(frozen=True)
class Encoded:
    """Some documents in a row."""

    tokens: np.ndarray  # (N,) ids, without end-of-text
    counts: np.ndarray  # (documents,) ids of each


class DocumentEncoder:
    """Encodes documents, long ones in pieces, and tokenizes a sample of them a second time with the reference."""

    def __init__(self, tokenizer: Tokenizer, fast: bool = True) -> None:
        self._fast = fast_encoder(tokenizer, fast)
        self._reference = ReferenceEncoder(tokenizer)
        self._may_cut = can_cut(tokenizer)
        self.checked = 0

    @property
    def name(self) -> str:
        """What encodes."""
        return self._fast.name

    def encode(self, texts: list[bytes], ids: list[str], random: np.random.Generator) -> Encoded:
        """Ids of some documents, valid UTF-8 each. UserError that names the document whose ids differ from the reference's."""
        pieces = [pieces_of(text) if self._may_cut and len(text) > LONG else [text] for text in texts]
        tokens, counts = self._fast.encode([piece for document in pieces for piece in document])
        ends = np.concatenate([[0], np.cumsum(counts)])  # of the pieces
        first = np.concatenate([[0], np.cumsum([len(document) for document in pieces])])  # piece of each document
        if self._fast.name not in (self._reference.name, "bytes") and texts:
            for i in random.choice(len(texts), -(-len(texts) // int(1 / CHECKED)), replace=False):
                # Two neighbours, so that the cut between them is checked too.
                at = int(random.integers(max(1, len(pieces[i]) - 1)))
                start, stop = ends[first[i] + at], ends[first[i] + min(at + 2, len(pieces[i]))]
                self._check(b"".join(pieces[i][at : at + 2]), tokens[start:stop], ids[i])
        return Encoded(tokens, np.diff(ends[first]))

    def _check(self, text: bytes, found: np.ndarray, name: str) -> None:
        expected, _ = self._reference.encode([text])
        self.checked += 1
        if not np.array_equal(found, expected):
            raise UserError(
                f"document {name}: {self._fast.name} makes other tokens of it than {self._reference.name} does "
                f"({len(found)} against {len(expected)}); use --no-fast-tokenizer"
            )


def with_end_of_text(encoded: Encoded, end_of_text: int, dtype: str, ends: bool) -> np.ndarray:
    """The tokens in a shard's dtype; each document followed by end-of-text if `ends`."""
    if not ends:
        return encoded.tokens.astype(dtype)
    after = np.cumsum(encoded.counts + 1) - 1  # where the end-of-text tokens go
    out = np.empty(len(encoded.tokens) + len(encoded.counts), dtype)
    is_text = np.ones(len(out), bool)
    is_text[after] = False
    out[is_text] = encoded.tokens
    out[after] = end_of_text
    return out
