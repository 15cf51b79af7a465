"""Documents' UTF-8 to token arrays: gigatoken where it knows the vocabulary, held against the tokenizer; else the tokenizer itself.

Measured on one core: gigatoken 0.10 does 139 MB/s of Python source, tiktoken 14; the ids are the same, and a sample of every
unit's documents is tokenized twice to keep it so.
"""

import base64
import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpt2_xla.data import cuts
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import ByteTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer

# The vocabularies that gigatoken splits as tiktoken does, and its name for the rule.
PRETOKENIZERS = {"gpt2": "gpt2", "r50k_base": "r50k", "cl100k_base": "cl100k", "o200k_base": "o200k"}
CHECKED = 1 / 1000  # share of the documents that are tokenized a second time, by the reference
CACHE_LIMIT = 200 * 2**20  # gigatoken remembers every word it has seen, without end: 2 GB after 300 MB of random words
AT_ONCE = 5 * 2**20  # bytes of text for one call of an encoder, which takes many times that while it works

# What tokenizers differ about: white space, digits, signs, scripts, characters that a normalizer would change.
PROBE = (
    "Hello, world's  end.|\n\n \t\r\nx  \n| a|a |1234567 3.14 ٣٤٥ ½²|they'll I'D 'S|fooBarBAZ_x|#!?--==~|é e\u0301 Å ﬁ Ａ|"
    "日本語のテキスト。中文|Привет мир|नमस्ते|👨\u200d👩\u200d👧🎉|\u00a0\u2003\u200b\ufeff|\0\x1f\x7f\ufffd|▁x ▁ |Ġx|</s><unk>[CLS] [MASK]"
).encode().split(b"|")  # fmt: skip


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
        self.name = reference_name(tokenizer)
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._encode(text.decode()) for text in texts]
        return np.concatenate([np.empty(0, np.uint32), *parts]), np.array([len(part) for part in parts], np.int64)

    def _encode(self, text: str) -> np.ndarray:
        if isinstance(self._tokenizer, TiktokenTokenizer):
            return self._tokenizer.encode_array(text)
        return np.array(self._tokenizer.encode(text), np.uint32)


def reference_name(tokenizer: Tokenizer) -> str:
    """The package that a tokenizer comes from."""
    return "tiktoken" if isinstance(tokenizer, TiktokenTokenizer) else "tokenizers"


class GigatokenEncoder:
    """A vocabulary in gigatoken, without its special tokens, so that their characters are text."""

    name = "gigatoken"

    def __init__(self, load: Callable[[], Any]) -> None:
        """`load` makes a gigatoken.Tokenizer."""
        self._make = load
        self._load()

    def _load(self) -> None:
        self._backend: Any = None  # frees the cache before the next one is built
        self._backend = self._make()
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
    reference = ReferenceEncoder(tokenizer)
    if fast and isinstance(tokenizer, TiktokenTokenizer) and tokenizer.name in PRETOKENIZERS:
        with contextlib.suppress(ImportError):
            return GigatokenEncoder(lambda: _tiktoken_in_gigatoken(tokenizer))
    elif fast and isinstance(tokenizer, HuggingFaceTokenizer):
        return _hugging_face_in_gigatoken(tokenizer) or reference
    return reference


def _tiktoken_in_gigatoken(tokenizer: TiktokenTokenizer) -> Any:
    import gigatoken

    with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
        for token, rank in tokenizer.ranks().items():
            file.write(base64.b64encode(token) + b" %d\n" % rank)
        file.flush()
        rule = PRETOKENIZERS[tokenizer.name]
        return gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer=rule, special_tokens={})


def _hugging_face_in_gigatoken(tokenizer: HuggingFaceTokenizer) -> GigatokenEncoder | None:
    """None for a tokenizer.json of a kind that gigatoken does not know, or that it reads otherwise."""
    content = tokenizer.ordinary_json()
    if content is None:
        return None
    try:
        import gigatoken
        import tokenizers

        found = GigatokenEncoder(lambda: gigatoken.Tokenizer(tokenizers.Tokenizer.from_str(content)))
        ids, counts = found.encode(PROBE)
    except Exception:  # noqa: BLE001  gigatoken raises the likes of RuntimeError for each part that it has no code for
        return None
    expected = ReferenceEncoder(tokenizer).encode(PROBE)
    return found if np.array_equal(ids, expected[0]) and np.array_equal(counts, expected[1]) else None


def can_cut(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut as gpt2_xla.data.cuts does without changing its tokens."""
    return isinstance(tokenizer, ByteTokenizer) or tokenizer.name in PRETOKENIZERS


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
        self._decode = tokenizer.decode_bytes
        self.checked = 0

    @property
    def name(self) -> str:
        """What encodes."""
        return self._fast.name

    def encode(self, texts: list[bytes], ids: list[str], random: np.random.Generator) -> Encoded:
        """Ids of some documents, valid UTF-8 each. UserError that names the document whose ids differ from the reference's."""
        places = [self._cuts(text) for text in texts]
        pieces = (text[start:stop] for text, own in zip(texts, places, strict=True) for start, stop in pairwise(own))
        tokens, counts = self._encode(pieces)
        ends = np.concatenate([[0], np.cumsum(counts)])  # of the pieces
        first = np.concatenate([[0], np.cumsum([len(own) - 1 for own in places])])  # piece of each document
        if self._fast.name not in (self._reference.name, "bytes") and texts:
            for i in random.choice(len(texts), -(-len(texts) // int(1 / CHECKED)), replace=False):
                # Two neighbours, so that the cut between them is checked too.
                at = int(random.integers(max(1, len(places[i]) - 2)))
                until = min(at + 2, len(places[i]) - 1)
                found = tokens[ends[first[i] + at] : ends[first[i] + until]]
                self._check(texts[i][places[i][at] : places[i][until]], found, ids[i])
        return Encoded(tokens, np.diff(ends[first]))

    def _cuts(self, text: bytes) -> list[int]:
        if not self._may_cut or len(text) <= cuts.LONG:
            return [0, len(text)]
        return cuts.cuts_in_runs(text, cuts.cuts_of(text), lambda piece: self._fast.encode([piece])[0], self._decode)

    def _encode(self, pieces: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all pieces (N,) and of each (len(pieces),), some MB of text at a time."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        batch: list[bytes] = []
        size = 0
        for piece in pieces:
            if batch and size + len(piece) > AT_ONCE:
                found.append(self._fast.encode(batch))
                batch, size = [], 0
            batch.append(piece)
            size += len(piece)
        found.append(self._fast.encode(batch))
        if len(found) == 1:  # nearly always
            return found[0]
        return np.concatenate([ids for ids, _ in found]), np.concatenate([counts for _, counts in found])

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
