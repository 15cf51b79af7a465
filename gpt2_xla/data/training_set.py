"""The data folders of a training run as one numbered sequence of samples, mixed by weight."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from gpt2_xla.data.data_mistakes import train_data_mistakes
from gpt2_xla.data.loader import TokenWindows
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.mixture import Mixture


@dataclass(frozen=True)
class TrainingSource:
    """One folder, opened. `weight` is None where its tokens decide."""

    name: str
    weight: Fraction | None
    manifest: Manifest
    windows: TokenWindows


class TrainingSet:
    """Sample n of the mixture is sample m of one source, read as if that source were alone: its own shuffled epochs."""

    def __init__(self, sources: Sequence[TrainingSource]) -> None:
        """One or more sources with the same sequence length; all have a weight or none."""
        self.sources = list(sources)
        self.seq_length = sources[0].windows.seq_length
        # An empty folder is told by `mistakes`; here it must not divide by zero.
        weights = [one.weight if one.weight is not None else max(one.manifest.tokens, 1) for one in sources]
        self.mixture = Mixture(weights)

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(one.windows.tokens for one in self.sources)

    @property
    def shares(self) -> dict[str, float]:
        """By name, the part of all samples that a source gives."""
        shares = self.mixture.shares
        return {one.name: share / self.mixture.period for one, share in zip(self.sources, shares, strict=True)}

    def epochs(self, samples: int) -> dict[str, float]:
        """By name, how often each source has been read after `samples` samples of the mixture."""
        counts = self.mixture.counts(samples)
        return {one.name: count / len(one.windows) for one, count in zip(self.sources, counts, strict=True)}

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over all that decides a batch: sources and weights in order; of one source, its manifest's own."""
        prints = [one.manifest.fingerprint for one in self.sources]
        if len(prints) == 1:
            return prints[0]
        content = list(zip(prints, self.mixture.shares, strict=True))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def mistakes(self, batch_size: int) -> list[str]:
        """What is wrong with training on the sources, as sentences."""
        return [
            mistake
            for one, share in zip(self.sources, self.mixture.shares, strict=True)
            for mistake in train_data_mistakes(
                one.windows.folder,
                one.manifest,
                seq_length=self.seq_length,
                batch_size=batch_size,
                taken=max(1, batch_size * share // self.mixture.period),
            )
        ]

    def places(self, samples: np.ndarray, *, seed: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of each of samples (n,): its source's number (n,), and the position in that source's stream of its first token."""
        numbers, indices = self.mixture.locate(samples)
        starts = np.empty_like(indices)
        for number, source in enumerate(self.sources):
            own = numbers == number
            starts[own] = source.windows.starts(indices[own], seed, shuffle)
        return numbers, starts

    def rows(self, samples: np.ndarray, *, seed: int, shuffle: bool, vocab_size: int) -> np.ndarray:
        """The T+1 tokens of each of samples (n,), as int64 (n, T+1). Raises UserError as `TokenWindows.rows` does."""
        numbers, indices = self.mixture.locate(samples)
        rows = np.empty((len(samples), self.seq_length + 1), np.int64)
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(numbers == number)
            if len(own):
                rows[own] = source.windows.rows(indices[own], seed=seed, shuffle=shuffle, vocab_size=vocab_size)
        return rows
