"""Where a long text may be cut so that its pieces' tokens, one piece after the other, are the tokens of the whole.

Two kinds of places. Where words end, the tokenizers' first rule ends a word on both sides of the cut (SAFE_CUT). Inside a
run of millions of letters there is no such place, and byte-pair encoding takes 30 to 50 times a run's bytes of memory; there
a cut is right if it is the two tokens beside it. A sequence of tokens is the encoding of its bytes exactly if each pair of
neighbours is the encoding of the pair's bytes: the first merge that joined two tokens would join them in their pair too.
"""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

PIECE = 2**18  # bytes
LONG = 2**20  # bytes; longer texts are cut, and longer pieces cut inside their runs
# Between a letter or digit and white space no rule of encoder.PRETOKENIZERS looks ahead or behind.
SAFE_CUT = re.compile(rb"[A-Za-z0-9](?=[ \t\r\n])")
TRIES = 16  # tokens to go back from the end of a piece that ends anywhere, to a boundary that holds

Encode = Callable[[bytes], np.ndarray]
Decode = Callable[[list[int]], bytes]


def _run_of(length: int) -> re.Pattern[bytes]:
    """Letters, or one sign again and again. With 16 of them on both sides of a cut, the rules see what they saw without it.

    Not so for digits, which cl100k takes by threes, and for white space.
    """
    return re.compile(rb"[A-Za-z]{%d}|([!-/:-@\[-`{-~])\1{%d}" % (length, length - 1))


RUN, AROUND_CUT = _run_of(256), _run_of(32)


def cuts_of(text: bytes) -> list[int]:
    """Where words end, about PIECE bytes apart; the text's two ends included."""
    cuts = [0]
    while found := SAFE_CUT.search(text, cuts[-1] + PIECE):
        cuts.append(found.end())
    return [*cuts, len(text)]


def cuts_in_runs(text: bytes, cuts: list[int], encode: Encode, decode: Decode) -> list[int]:
    """The cuts, and more in pieces longer than LONG. `encode` makes a text's ids, `decode` the bytes of some."""
    more: set[int] = set()
    for start, stop in pairwise(cuts):
        if stop - start > LONG:
            more.update(_inside(text, start, stop, encode, decode))
    return sorted(more.union(cuts))


def _inside(text: bytes, start: int, stop: int, encode: Encode, decode: Decode) -> Iterator[int]:
    """Cuts between start and stop: token boundaries of pieces that end anywhere in a run, if the tokens beside them hold."""
    end = _end_in_run(text, start, stop)
    ids = encode(text[start:end])
    while end < stop:
        cut = end
        for last, dropped in list(pairwise(ids[-TRIES:].tolist()))[::-1]:
            cut -= len(decode([dropped]))
            if not AROUND_CUT.fullmatch(text[cut - 16 : cut + 16]):
                return
            following_end = _end_in_run(text, cut, stop)
            following = encode(text[cut:following_end])
            first = int(following[0])
            pair = text[cut - len(decode([last])) : cut + len(decode([first]))]
            if encode(pair).tolist() == [last, first]:
                break
        else:
            return
        yield cut
        ids, end = following, following_end


def _end_in_run(text: bytes, start: int, stop: int) -> int:
    """A place inside a run, PIECE bytes or more after the start; `stop` if there is none."""
    run = RUN.search(text, start + PIECE, stop)
    return run.end() - 16 if run else stop
