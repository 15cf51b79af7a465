"""A stream of tokens as text: no character is shown before it is whole."""

import codecs
from collections.abc import Iterable

from gpt2_xla.tokenizer import REPLACEMENT, Tokenizer


class CharacterStream:
    """Turns a stream of tokens into text, holding back the bytes of a character until it is whole.

    Bytes that can't become UTF-8 come out as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # bytes of self._ids that the decoder has seen
        self._held = 0  # tokens whose bytes it has not
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; often empty inside of a character."""
        self._ids.append(token)
        new = self._tokenizer.decode_bytes(self._ids)[self._done :]
        # Tokenizers that are not byte-level show an unfinished character as U+FFFD until its last byte (of at most 4).
        self._held += 1
        if new.endswith(REPLACEMENT) and self._held < 4:
            return ""
        # A token's bytes can depend on those before it (a leading space): keep a few.
        self._ids, self._held = self._ids[-8:], 0
        self._done = len(self._tokenizer.decode_bytes(self._ids))
        return self._decoder.decode(new)

    def finish(self) -> str:
        """What was held back; U+FFFD for a character that was not finished."""
        new = self._tokenizer.decode_bytes(self._ids)[self._done :]
        return self._decoder.decode(new, final=True)


def whole_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text that a stream of these tokens would show."""
    stream = CharacterStream(tokenizer)
    return "".join(map(stream.push, tokens)) + stream.finish()
