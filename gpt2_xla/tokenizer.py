"""Tokenizers behind one small interface: bytes, tiktoken, Hugging Face.

Encoding has *ordinary* semantics everywhere: the characters of a special token inside a text are text, so no document
can forge an end-of-text. Lone surrogates, which UTF-8 cannot hold, become U+FFFD.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt2_xla.errors import UserError

if TYPE_CHECKING:
    import numpy as np

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>")
TIKTOKEN_HOST = "openaipublic.blob.core.windows.net"
ENCODED_AT_ONCE = 2**20  # characters
REPLACEMENT = "\ufffd".encode()


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def name(self) -> str:
        """What --tokenizer said."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: all are in 0..vocab_size-1, end-of-text included."""

    @property
    def end_of_text(self) -> int:
        """The id that ends each document."""

    @property
    def hash(self) -> str:
        """sha256 (hex) of the vocabulary; the same on every machine."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end-of-text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of some ids, perhaps ending inside a character; an unknown id gives U+FFFD.

        For bytes, tiktoken and byte-level Hugging Face tokenizers the bytes of a list are the joined bytes of its ids.
        """

    def save(self, folder: Path) -> None:
        """Write the files that load_tokenizer needs to load this tokenizer from `folder`, if there are any."""


def replace_surrogates(text: str) -> str:
    """The text as UTF-8 can hold it: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encode_utf8(text: str) -> bytes:
    """The UTF-8 of replace_surrogates(text), a part at a time: a whole copy or two in UTF-16 would be many times a long text."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    parts, start = [], 0
    while start < len(text):
        stop = start + ENCODED_AT_ONCE
        while stop < len(text) and "\ud800" <= text[stop - 1] <= "\udbff":  # it may be half of a pair
            stop += 1
        parts.append(replace_surrogates(text[start:stop]).encode())
        start = stop
    return b"".join(parts)


class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255, and end-of-text as 256. Needs no download."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    hash = hashlib.sha256(b"bytes 0..255, end-of-text 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(replace_surrogates(text).encode())

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes_of(token) for token in ids)

    @staticmethod
    def _bytes_of(token: int) -> bytes:
        if token == ByteTokenizer.end_of_text:
            return b"<|endoftext|>"
        return bytes([token]) if 0 <= token < 256 else REPLACEMENT

    def save(self, folder: Path) -> None:
        """Nothing: the name says it all."""


class TiktokenTokenizer:
    """A tiktoken encoding, such as gpt2."""

    def __init__(self, name: str) -> None:
        """Raises UserError where tiktoken can neither download the vocabulary nor find it in its cache."""
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' exceptions are OSErrors too
            raise UserError(
                f"--tokenizer {name}: its vocabulary is neither in tiktoken's cache nor can it be downloaded from {TIKTOKEN_HOST} "
                f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes"
            ) from error
        self.name = name
        self.vocab_size: int = self._encoding.n_vocab
        self.end_of_text: int = self._encoding.eot_token

    @cached_property
    def hash(self) -> str:
        # The ids are the merge order, so the bytes of every id are the vocabulary and the merges at once.
        digest = hashlib.sha256()
        for token in range(self.vocab_size):
            text = self._bytes_of(token)
            digest.update(b"%d %d " % (token, len(text)) + text)
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(replace_surrogates(text))

    def encode_array(self, text: str) -> "np.ndarray":
        """The same ids as uint32, without a Python object for each."""
        return self._encoding.encode_to_numpy(replace_surrogates(text), allowed_special=set(), disallowed_special=())

    def ranks(self) -> dict[bytes, int]:
        """Every token but the special ones, and its id, in the order of the ids."""
        tokens = {token: self._encoding.encode_single_token(token) for token in self._encoding.token_byte_values()}
        return dict(sorted(tokens.items(), key=lambda item: item[1]))

    def special_tokens(self) -> dict[str, int]:
        """The special tokens, which no text can contain, and their ids."""
        return {name: self._encoding.encode_single_token(name) for name in self._encoding.special_tokens_set}

    @property
    def pattern(self) -> str:
        """The regular expression that cuts a text into the pieces that are encoded each on its own."""
        return str(self._encoding._pat_str)  # private, checked on 0.14

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes_of(token) for token in ids)

    def _bytes_of(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):  # a gap in the vocabulary, or padding of the model's
            return REPLACEMENT

    def save(self, folder: Path) -> None:
        """Nothing: the name says it all."""


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer.json, given as the file or as its folder."""

    def __init__(self, path: str) -> None:
        """Raises UserError for a file that is missing or no tokenizer, and where no end-of-text token is found."""
        import tokenizers

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"--tokenizer {path}: there is no file {file}")
        try:
            self._json = file.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except PermissionError as error:
            raise UserError(f"--tokenizer {path}: {file} can't be read: {error.strerror}") from error
        except Exception as error:  # the library raises the bare class
            raise UserError(
                f"--tokenizer {path}: {file} is not a Hugging Face tokenizer.json ({str(error)[:120]})"
            ) from error
        # A tokenizer.json can ask to cut or pad every text, and would parse special tokens in it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.name = path
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._end_name, self.end_of_text = self._find_end_of_text(file)

    def _find_end_of_text(self, file: Path) -> tuple[str, int]:
        configured = _configured_end_of_text(file.with_name("tokenizer_config.json"))
        for name in ([configured] if configured else []) + list(END_OF_TEXT_NAMES):
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return name, token
        raise UserError(
            f"--tokenizer {self.name}: no end-of-text token found; name it as eos_token in "
            f"{file.with_name('tokenizer_config.json')}, or add one of {', '.join(END_OF_TEXT_NAMES[:4])}"
        )

    @cached_property
    def hash(self) -> str:
        content = json.loads(self._json)
        # How a caller cuts or pads is no part of the vocabulary; which token ends a document is.
        for key in ("truncation", "padding"):
            content.pop(key, None)
        content["end_of_text"] = self._end_name
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def ordinary_json(self) -> str | None:
        """A tokenizer.json that makes the same ids of any text without being told to leave special tokens alone.

        None where it can't be: tokens that are added but not special are looked for in every text.
        """
        content = json.loads(self._json)
        if not all(token.get("special") for token in content.get("added_tokens") or []):
            return None
        return json.dumps(content | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None})

    @cached_property
    def _byte_of_character(self) -> dict[str, int] | None:
        """Byte-level vocabularies spell each byte as one printable character; None for other vocabularies."""
        decoder = json.loads(self._json).get("decoder") or {}
        kinds = [decoder.get("type")] + [part.get("type") for part in decoder.get("decoders", [])]
        return byte_alphabet() if "ByteLevel" in kinds else None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        if self._byte_of_character is None:
            return self._tokenizer.decode(list(ids), skip_special_tokens=False).encode()
        return b"".join(self._bytes_of(token, self._byte_of_character) for token in ids)

    def _bytes_of(self, token: int, alphabet: dict[str, int]) -> bytes:
        text = self._tokenizer.id_to_token(token) if token >= 0 else None
        if text is None:
            return REPLACEMENT
        if token in self._added_ids or any(character not in alphabet for character in text):
            return str(text).encode()
        return bytes(alphabet[character] for character in text)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def save(self, folder: Path) -> None:
        """Write tokenizer.json as it was read, and a tokenizer_config.json that names the end-of-text token."""
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end_name}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _configured_end_of_text(file: Path) -> str | None:
    """eos_token of a tokenizer_config.json, which is a string or an object; None without one."""
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer: {file} can't be read as JSON: {error}") from error
    token = config.get("eos_token") if isinstance(config, dict) else None
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer names: "bytes", a tiktoken encoding, or a tokenizer.json or its folder.

    Raises UserError, with the nearest name, for anything else.
    """
    if name == "bytes":
        return ByteTokenizer()
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name in known:
        return TiktokenTokenizer(name)
    if Path(name).exists():
        return HuggingFaceTokenizer(name)
    if "/" in name or name.endswith(".json"):
        raise UserError(
            f"--tokenizer {name}: no such file or folder; expected a tokenizer.json or a folder that holds one"
        )
    raise UserError(f"--tokenizer {name}: unknown; {_nearest(name, ['bytes', *known])}")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{guess}expected {', '.join(names)}, or the path of a Hugging Face tokenizer.json or its folder"
