"""Whether shards hold what a text tokenizes to: documents of a source, tokenized again and looked for."""

import hashlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from gpt2_xla.data.documents import read_unit
from gpt2_xla.data.inputs import text_inputs
from gpt2_xla.data.shards import TokenStream
from gpt2_xla.data.units import Columns, plan_units
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import InspectConfig
from gpt2_xla.tokenizer import Tokenizer

SHORTEST_PART = 16  # tokens of a cut document; fewer are alike by chance


def compare(config: InspectConfig, stream: TokenStream, tokenizer: Tokenizer, end_of_text: int) -> str:
    """Tokenize --against-documents documents of --against again and look for them between end-of-texts; a sentence.

    A source is usually split into train/ and valid/, so some documents may be elsewhere, and one may be cut in two: then its
    part is looked for. Raises `UserError` if none is here.
    """
    wanted: dict[bytes, str] = {}
    lengths: dict[bytes, int] = {}  # tokens
    for text in _sample(config):
        tokens = np.array(tokenizer.encode(text), np.int64)
        wanted.setdefault(_digest(tokens), text)
        lengths[_digest(tokens)] = len(tokens)
    if not wanted:
        raise UserError(f"--against {' '.join(config.against)} holds no documents")
    missing = dict(wanted)
    known = set(lengths.values())
    # Where the first document ends, and where what follows the last end-of-text begins.
    first_end, rest = len(stream), 0
    with tqdm(total=len(stream), desc="comparing", unit="token", unit_scale=True, leave=False) as bar:
        for start, stop in _documents(stream, end_of_text, bar):
            first_end, rest = min(first_end, stop), stop + 1
            if stop - start in known:  # only these need to be read again
                missing.pop(_digest(_read(stream, start, stop)), None)
            if not missing:
                break
    parts = []
    for side, start, stop in (("first", rest, len(stream)), ("last", 0, first_end)):
        longer = [key for key in missing if lengths[key] > stop - start >= SHORTEST_PART]
        part = _read(stream, start, stop) if longer else np.empty(0, np.int64)
        for key in longer:
            tokens = np.array(tokenizer.encode(missing[key]), np.int64)
            if np.array_equal(part, tokens[: len(part)] if side == "first" else tokens[-len(part) :]):
                parts.append(f"the {side} {len(part):,} of its {len(tokens):,} tokens")
                del missing[key]
                break
    return _sentence(config, tokenizer, len(wanted), list(missing.values()), parts)


def _sentence(config: InspectConfig, tokenizer: Tokenizer, wanted: int, missing: list[str], parts: list[str]) -> str:
    """What was found of `wanted` documents; UserError if nothing was."""
    if len(missing) == wanted:
        raise UserError(
            f"none of {wanted} documents of --against {' '.join(config.against)} is in the shards, tokenized by "
            f"{tokenizer.name}; the first begins {missing[0][:60]!r}: is this the source that they were prepared from?"
        )
    here = f"{wanted - len(missing)} of {wanted} documents of {' '.join(config.against)}"
    lines = [f"  compared      {here} are here, token for token"]
    lines += [f"of one, which the split cut, only {part}" for part in parts]
    if missing:
        lines.append(f"not here (perhaps in the other split): {len(missing)}; the first begins {missing[0][:60]!r}")
    return f"\n{' ' * 16}".join(lines)


def _sample(config: InspectConfig) -> list[str]:
    """Documents drawn at random from the whole source, each equally likely, in one pass (reservoir sampling)."""
    kept: list[str] = []
    rng = np.random.default_rng(config.seed)
    for number, text in enumerate(_texts(config)):
        if number < config.against_documents:
            kept.append(text)
        elif (place := int(rng.integers(number + 1))) < config.against_documents:
            kept[place] = text
    return kept


def _texts(config: InspectConfig) -> Iterator[str]:
    """The documents of --against, whole and in order, as preparing reads them."""
    columns = Columns(config.text_column)
    for unit in plan_units(text_inputs(config.against), columns, skip_bad=False).units:
        for batch in read_unit(unit, columns):
            yield from (text.decode() for text in batch.texts)


def _documents(stream: TokenStream, end_of_text: int, bar: tqdm) -> Iterator[tuple[int, int]]:
    """Where each document starts and ends in the stream, its end-of-text left out."""
    first = 0
    for start, tokens in stream.chunks():
        for end in (np.flatnonzero(tokens == end_of_text) + start).tolist():
            yield first, end
            first = end + 1
        bar.update(len(tokens))


def _read(stream: TokenStream, start: int, stop: int) -> np.ndarray:
    tokens = np.empty(stop - start, np.int64)
    stream.read_into(start, tokens)
    return tokens


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=16).digest()
