"""Looking at prepared data: checksums, statistics, samples, and whether the shards are what the text tokenizes to."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.shards import TokenStream
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import InspectConfig
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer

FEWEST_IDS, MOST_IDS = 2**16, 2**22  # counters at the start; what lies beyond the last is corruption, not vocabulary
LENGTH_BINS = 33  # bin b counts documents of 2^(b-1)+1..2^b tokens, bin 0 those of one and none
LOOKED_AT = 200  # characters shown of a sample


@dataclass
class Statistics:
    """What one pass over all tokens finds. Lengths are tokens before an end-of-text."""

    tokens: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(FEWEST_IDS, np.int64))  # by token id
    largest: int = 0  # token id
    documents: int = 0  # end-of-text tokens
    length_sum: int = 0
    shortest: int | None = None
    longest: int = 0
    empty: int = 0  # documents without a token
    lengths: np.ndarray = field(
        default_factory=lambda: np.zeros(LENGTH_BINS, np.int64)
    )  # documents by log2 of the length
    tail: int = 0  # tokens after the last end-of-text


def inspect(config: InspectConfig, folder: Path) -> tuple[str, Path]:
    """Check and describe a folder of shards; the report, and the picture that was drawn.

    Raises `UserError` with all damage, before anything is read at length; and for documents of --against that differ.
    """
    if mistakes := [
        f"--{name.replace('_', '-')} {value} must be at least {least}"
        for name, value, least in (
            ("samples", config.samples, 0),
            ("top", config.top, 1),
            ("seed", config.seed, 0),
            ("against_documents", config.against_documents, 1),
        )
        if value < least
    ]:
        raise UserError(mistakes)
    manifest = manifests.read(folder)
    name = config.tokenizer or manifest.tokenizer
    tokenizer = load_tokenizer(name) if name is not None else None
    if tokenizer is not None and manifest.tokenizer_hash not in (None, tokenizer.hash):
        raise UserError(
            f"tokenizer {name} (hash {tokenizer.hash[:12]}) is not the one that prepared {folder} "
            f"({manifest.tokenizer}, hash {str(manifest.tokenizer_hash)[:12]}); name that one with --tokenizer"
        )
    if config.against and tokenizer is None:
        raise UserError(f"--against needs a tokenizer, and {folder} records none; name it with --tokenizer")
    checked = verify(folder, manifest, config.verify)
    stream = TokenStream(manifest.paths(folder))
    end = manifest.end_of_text if manifest.end_of_text is not None else tokenizer.end_of_text if tokenizer else None
    found = statistics(stream, end, _bar("reading", len(stream), "token"))
    decode = _decoder(tokenizer)
    parts = [_numbers(folder, manifest, found, checked), _frequent(found, decode, config.top)]
    if config.samples:
        parts.append(_samples(stream, end, decode, config.samples, config.seed))
    if config.against and tokenizer is not None and end is not None:
        from gpt2_xla.data.comparison import compare

        parts.append(compare(config, stream, tokenizer, end))
    picture = Path(config.output) if config.output else Path(f"{folder.resolve().name}_tokens.png")
    draw(found, decode, str(folder), picture, config.top)
    return "\n\n".join(parts), picture


def verify(folder: Path, manifest: Manifest, full: bool) -> str:
    """Hold all shards against the manifest, several at a time, with a bar; how they were checked, in words."""
    mistakes: list[str] = []

    def check(number: int) -> list[str]:
        one = replace(manifest, shards=manifest.shards[number : number + 1])
        try:
            manifests.verify(folder, one, full)
        except UserError as error:
            return list(error.mistakes)
        return []

    with _bar("checking", len(manifest.shards), "shard") as bar, ThreadPoolExecutor() as pool:
        for problems in pool.map(check, range(len(manifest.shards))):
            mistakes += problems
            bar.update()
    if mistakes:
        raise UserError(mistakes)
    hashed = sum(shard.sha256 is not None for shard in manifest.shards) if full else 0
    return f"{hashed} of {len(manifest.shards)} by sha256" if full else "by their lengths only"


def statistics(stream: TokenStream, end_of_text: int | None, bar: tqdm) -> Statistics:
    """Count tokens and documents in one pass, a piece in memory at a time. Without `end_of_text` no documents are known.

    Raises `UserError` for ids that no vocabulary has.
    """
    found = Statistics()
    with bar:
        for start, chunk in stream.chunks():
            _count(found, stream, start, chunk)
            found.tokens += len(chunk)
            if end_of_text is not None:
                ends = np.flatnonzero(chunk == end_of_text)
                _add_lengths(found, np.diff(ends, prepend=-1 - found.tail) - 1)
                found.tail = len(chunk) - 1 - int(ends[-1]) if len(ends) else found.tail + len(chunk)
            bar.update(len(chunk))
    return found


def _count(found: Statistics, stream: TokenStream, start: int, chunk: np.ndarray) -> None:
    largest = int(chunk.max())
    if largest >= MOST_IDS:
        shard, index = stream.locate(start + int(chunk.argmax()))
        raise UserError(
            f"token {index} of {shard} is {largest}; no vocabulary has that many ids: prepare the data again"
        )
    if largest >= len(found.counts):
        found.counts = np.concatenate([found.counts, np.zeros(MOST_IDS - len(found.counts), np.int64)])
    found.counts[: largest + 1] += np.bincount(chunk, minlength=largest + 1)
    found.largest = max(found.largest, largest)


def _add_lengths(found: Statistics, lengths: np.ndarray) -> None:
    if len(lengths) == 0:
        return
    found.documents += len(lengths)
    found.length_sum += int(lengths.sum())
    found.shortest = min(int(lengths.min()), found.shortest if found.shortest is not None else int(lengths.min()))
    found.longest = max(found.longest, int(lengths.max()))
    found.empty += int((lengths == 0).sum())
    bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    found.lengths += np.bincount(bins, minlength=LENGTH_BINS)[:LENGTH_BINS]


def _decoder(tokenizer: Tokenizer | None) -> Callable[[Sequence[int]], str]:
    """Text of some ids on one line; the ids themselves where no tokenizer is known."""

    def decode(ids: Sequence[int]) -> str:
        if tokenizer is None:
            return " ".join(map(str, ids))
        return repr(tokenizer.decode(ids))[1:-1]

    return decode


def _numbers(folder: Path, manifest: Manifest, found: Statistics, checked: str) -> str:
    rows = [
        ("folder", str(folder)),
        ("shards", f"{len(manifest.shards):,} ({manifest.dtype}), checked {checked}"),
        ("tokenizer", f"{manifest.tokenizer or 'unknown (no manifest)'}"),
        ("tokens", f"{found.tokens:,}"),
        ("ids", f"{np.count_nonzero(found.counts):,} different ones, the largest {found.largest:,}"),
    ]
    if manifest.text_bytes:
        rows.append(
            ("text", f"{manifest.text_bytes:,} bytes, {manifest.text_bytes / max(found.tokens, 1):.2f} a token")
        )
    if found.documents:
        mean = found.length_sum / found.documents
        rows += [
            ("documents", f"{found.documents:,}, {found.empty:,} of them empty; {found.tail:,} tokens after the last"),
            ("their length", f"{found.shortest:,} to {found.longest:,} tokens, {mean:,.1f} on average"),
        ]
    else:
        rows.append(("documents", _why_no_documents(found)))
    lines = [f"  {name:<13} {text}" for name, text in rows]
    if found.documents:
        lines += ["", "  tokens in a document"]
        bins = np.flatnonzero(found.lengths)
        for b in range(int(bins[0]), int(bins[-1]) + 1):
            count = int(found.lengths[b])
            stars = "█" * round(40 * count / int(found.lengths.max()))
            lines.append(f"  {_bin_name(b):>24} {count:>12,} {stars}")
    return "\n".join(lines)


def _why_no_documents(found: Statistics) -> str:
    if found.tail:
        return f"none ends here: the {found.tail:,} tokens are a part of one"
    return "unknown: which token ends one is not recorded"


def _bin_name(number: int) -> str:
    return "0–1" if number == 0 else f"{2 ** (number - 1) + 1:,}–{2**number:,}"


def most_frequent(found: Statistics, top: int) -> list[int]:
    """The ids of the most frequent tokens, most frequent first."""
    order = np.argsort(-found.counts, kind="stable")[:top]
    return [int(token) for token in order if found.counts[token]]


def _frequent(found: Statistics, decode: Callable[[Sequence[int]], str], top: int) -> str:
    lines = ["  most frequent tokens"]
    for token in most_frequent(found, top):
        count = int(found.counts[token])
        lines.append(f"  {token:>8} {count:>14,} {count / found.tokens:>7.2%}  “{decode([token])}”")
    return "\n".join(lines)


def _samples(
    stream: TokenStream, end: int | None, decode: Callable[[Sequence[int]], str], samples: int, seed: int
) -> str:
    """Beginnings of documents at random places of the stream."""
    lines = ["  samples"]
    places = np.sort(np.random.default_rng(seed).integers(0, max(len(stream), 1), samples)).tolist()
    for place in places:
        tokens = np.empty(min(8192, len(stream) - place), np.int64)
        stream.read_into(place, tokens)
        ends = np.flatnonzero(tokens == end)
        first = int(ends[0]) + 1 if len(ends) and ends[0] + 1 < len(tokens) else 0  # else the middle of a document
        text = itertools.takewhile(lambda token: token != end, tokens[first : first + LOOKED_AT].tolist())
        lines.append(f"  at token {place + first:,}: {decode(list(text))[:LOOKED_AT]}")
    return "\n".join(lines)


def draw(found: Statistics, decode: Callable[[Sequence[int]], str], title: str, path: Path, top: int) -> None:
    """A picture of document lengths, token frequencies by rank, and the most frequent tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (lengths, ranks, words) = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    bins = np.flatnonzero(found.lengths)
    if len(bins):
        shown = np.arange(bins[0], bins[-1] + 1)
        lengths.bar(range(len(shown)), found.lengths[shown], color="#3182bd", width=0.95)
        lengths.set_xticks(range(len(shown)), [f"≤ {2**b:,}" for b in shown.tolist()], rotation=60, ha="right")
        lengths.yaxis.get_major_locator().set_params(integer=True)
        plural = "s" if found.documents > 1 else ""
        lengths.set(title=f"{found.documents:,} document{plural} by length", xlabel="tokens", ylabel="documents")
    else:
        lengths.axis("off")
        lengths.text(0.5, 0.5, _why_no_documents(found).replace(": ", ":\n"), ha="center", va="center", fontsize=11)
        lengths.set(title="documents by length")
    counts = np.sort(found.counts[found.counts > 0])[::-1]
    ranks.loglog(np.arange(1, len(counts) + 1), counts, color="#3182bd")
    ranks.set(title=f"{found.tokens:,} tokens by rank", xlabel="rank of the token id", ylabel="occurrences")
    ranks.grid(alpha=0.3)
    ids = most_frequent(found, top)
    # A $ would start mathematics.
    labels = [f"{decode([token])[:20]}".replace("$", r"\$") for token in ids]
    words.barh(range(len(ids)), [found.counts[token] / found.tokens for token in ids], color="#9ecae1")
    words.set_yticks(range(len(ids)), [f"“{label}”" for label in labels], fontsize=8)
    words.invert_yaxis()
    words.set(title="most frequent tokens", xlabel="share of all tokens")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: a suffix that names no picture format
        raise UserError(f"--output {path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def _bar(what: str, total: int, unit: str) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, dynamic_ncols=True, leave=False)
