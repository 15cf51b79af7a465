"""The temporary token stream of a preparation: all documents end to end, before they are cut into shards."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpt2_xla.data.shards import dtype_for
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import Tokenizer


@dataclass
class Stream:
    """The tokens of all documents, in a raw file, and where the text behind them lies."""

    path: Path
    tokenizer: Tokenizer
    documents: int = 0
    chunk_tokens: list[int] = field(default_factory=list)
    chunk_bytes: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        return dtype_for(self.tokenizer.vocab_size)

    @property
    def tokens(self) -> int:
        return sum(self.chunk_tokens)

    @property
    def text_bytes(self) -> int:
        return sum(self.chunk_bytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1, memory-mapped. At least one."""
        offset = start * np.dtype(self.dtype).itemsize
        return np.memmap(self.path, self.dtype, mode="r", offset=offset, shape=(stop - start,))

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """Indices of the end-of-text tokens."""
        return np.flatnonzero(tokens == self.tokenizer.end_of_text)

    def text_bytes_before(self, position: int) -> int:
        """UTF-8 bytes of the text behind tokens 0..position-1."""
        starts = np.cumsum([0, *self.chunk_tokens])
        chunk = int(np.searchsorted(starts, position, side="right")) - 1
        before = sum(self.chunk_bytes[:chunk])
        if position == starts[chunk]:
            return before
        part = self.read(int(starts[chunk]), position)
        documents = np.split(part, self.ends(part) + 1)
        texts = [document[document != self.tokenizer.end_of_text].tolist() for document in documents]
        return before + sum(len(self.tokenizer.decode_bytes(text)) for text in texts)


def split_at_document(stream: Stream, valid_tokens: int) -> int:
    """Where the fewest last documents start that hold `valid_tokens`, or a tenth of a stream that has under ten times that.

    Raises UserError for a single document.
    """
    if valid_tokens == 0:
        return stream.tokens
    if stream.documents < 2:
        raise UserError("the source holds one document, which can't be split; use --valid-tokens 0 or add documents")
    want = max(1, min(valid_tokens, stream.tokens // 10))
    stop = stream.tokens - want
    while stop > 0:  # backwards in blocks of 1 M tokens
        start = max(0, stop - 2**20)
        ends = stream.ends(stream.read(start, stop))
        if len(ends):
            return start + int(ends[-1]) + 1
        stop = start
    # The first document alone is longer than all that valid/ leaves.
    return int(stream.ends(stream.read(0, stream.tokens))[0]) + 1
