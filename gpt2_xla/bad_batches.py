"""bad_batch-STEP.safetensors: the global batch of a step whose loss or gradients were not finite, for a person to look at.

Read from the data again: a batch is a function of its position.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import load_tokenizer

SHOWN = 60  # characters of a sequence, at its beginning


def write_bad_batch(folder: Path, data: PretrainingData, step: int, first_sample: int) -> Path:
    """Write the batch of optimizer step number `step` (from 1), which began with sample `first_sample`; its path.

    Tensors: `tokens` (n, T+1), and for each sequence `sample` (n,), `source` (n,), a number in the metadata's list of
    sources, and `position` (n,) of its first token in that source's stream. Raises OSError if it cannot be written.
    """
    assert data.train is not None
    config = data.config
    samples = first_sample + np.arange(config.batch_sizes.sequences(step - 1))
    seed, shuffle = config.run.seed, config.data.shuffle
    numbers, starts = data.train.places(samples, seed=seed, shuffle=shuffle)
    rows = data.train.rows(samples, seed=seed, shuffle=shuffle, vocab_size=config.model.vocabulary)
    tensors = {"tokens": rows.astype(np.int32), "sample": samples, "source": numbers, "position": starts}
    metadata = {
        "step": str(step),
        "sources": json.dumps([[one.name, str(one.windows.folder.resolve())] for one in data.train.sources]),
        "tokenizer": data.manifest.tokenizer or "",
        "data_fingerprint": data.fingerprint,
    }
    path = folder / f"bad_batch-{step:08d}.safetensors"
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(tensors, metadata))
    return path


def describe_bad_batch(path: Path, tokenizer_name: str | None = None) -> str:
    """The batch in words: each sequence's sample, source, position, ids that stand out, and how its text begins.

    Raises UserError for a file that is no such batch.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tokens, samples, numbers, starts = (file.get_tensor(n) for n in ("tokens", "sample", "source", "position"))
        names = [name for name, _ in json.loads(metadata["sources"])]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no bad_batch-STEP.safetensors of a training run: {error}") from error
    name = tokenizer_name or metadata.get("tokenizer")
    tokenizer = load_tokenizer(name) if name else None
    lines = [
        f"step {metadata['step']}: {len(tokens)} sequences of {tokens.shape[1] - 1} tokens, samples {samples[0]} to {samples[-1]}"
    ]
    for number, source in enumerate(json.loads(metadata["sources"])):
        lines.append(f"  source {source[0]}: {source[1]}, {int((numbers == number).sum())} sequences")
    lines.append(f"  {'sample':>10} {'source':>12} {'position':>14} {'different ids':>13}  text")
    for row, sample, number, start in zip(tokens, samples, numbers, starts, strict=True):
        text = repr(tokenizer.decode(row[: 2 * SHOWN].tolist())[:SHOWN]) if tokenizer else str(row[:10].tolist())
        lines.append(f"  {sample:>10,} {names[number]:>12} {start:>14,} {len(np.unique(row)):>13,}  {text}")
    return "\n".join(lines)
