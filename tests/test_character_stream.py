"""Streamed tokens become whole characters."""

from hypothesis import given
from hypothesis import strategies as st

from gpt2_xla.character_stream import CharacterStream
from gpt2_xla.tokenizer import ByteTokenizer


@given(st.text(max_size=30))
def test_streamed_characters_are_whole_and_together_the_text(text):
    stream = CharacterStream(ByteTokenizer())
    pieces = [stream.push(token) for token in ByteTokenizer().encode(text)]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == text


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_stream_as_they_decode_at_once(data):
    stream = CharacterStream(ByteTokenizer())
    assert "".join(stream.push(token) for token in data) + stream.finish() == data.decode(errors="replace")


class FallbackTokenizer:
    """As SentencePiece's: shows unfinished characters as U+FFFD, and drops the space before the first word."""

    def decode_bytes(self, ids):
        data = b"".join(b" word" if token == 256 else bytes([token]) for token in ids)
        return data.decode(errors="replace").lstrip(" ").encode()


def test_a_tokenizer_that_decodes_in_context_streams_right():
    stream = CharacterStream(FallbackTokenizer())
    ids = [256, *"€".encode(), 256, 256, *"né".encode(), *[256] * 20]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == "word€ word wordné" + " word" * 20
    assert pieces[1:4] == ["", "", "€"]
