"""Whether data suits a model and a batch: enough tokens, no id that the model does not know."""

from collections.abc import Sequence
from pathlib import Path

from gpt2_xla.data.manifest import Manifest


def windows_per_epoch(tokens: int, seq_length: int) -> int:
    """W: full windows of T+1 tokens that fit at every offset in [0, T); 1 if only smaller offsets fit, 0 if none does."""
    return max(1, tokens // seq_length - 1) if tokens > seq_length else 0


def train_data_mistakes(
    folder: Path, manifest: Manifest, *, seq_length: int, batch_size: int, taken: int | None = None
) -> list[str]:
    """Whether a folder has too few tokens to train on, as sentences.

    `taken` is the number of sequences that a batch takes from this folder; default: all of them.
    """
    mistakes = []
    windows = windows_per_epoch(manifest.tokens, seq_length)
    taken = batch_size if taken is None else taken
    if manifest.tokens <= seq_length:
        mistakes.append(
            f"--train-dir {folder} holds {manifest.tokens} tokens, but --seq-length {seq_length} needs at least "
            f"{seq_length + 1}; lower --seq-length or prepare more text"
        )
    elif windows < taken:
        share = "" if taken == batch_size else f" takes of it ({taken})"
        mistakes.append(
            f"--train-dir {folder} holds {manifest.tokens} tokens, that is {windows} sequences of --seq-length {seq_length}, "
            f"fewer than one batch of --train-batch-size {batch_size}{share}; lower one of the two or prepare more text"
        )
    return mistakes


def valid_data_mistakes(folder: Path, manifest: Manifest, flag: str = "--valid-dir") -> list[str]:
    """Whether a folder has too few tokens to evaluate, as sentences. Any two can be evaluated."""
    if manifest.tokens >= 2:
        return []
    return [f"{flag} {folder} holds {manifest.tokens} tokens; prepare more text"]


def vocabulary_mistakes(found: Sequence[tuple[str, Manifest]], vocab_size: int) -> list[str]:
    """One sentence if a model of `vocab_size` ids is too small for tokenizers of the data; `found` names each manifest."""
    larger = [(size, m.tokenizer, where) for where, m in found if (size := m.vocab_size or 0) > vocab_size]
    if not larger:
        return []
    size, tokenizer, _ = max(larger, key=lambda one: one[0])
    return [
        f"--vocab-size {vocab_size} is smaller than the {size} ids of the tokenizer {tokenizer} that prepared "
        f"{' and '.join(where for _, _, where in larger)}; use --vocab-size {size} or more"
    ]
