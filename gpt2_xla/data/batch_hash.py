"""Names for batches: a hash of which windows a global batch holds, and one of the tokens that a process read of it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2_xla.data.training_set import TrainingSet

HASHED_TOGETHER = 4096  # samples: a call of numpy costs as much for 10 of them as for 500


@dataclass(frozen=True)
class BatchOrder:
    """All that decides which tokens a step sees, beside its first sample."""

    fingerprint: str  # of the data
    seed: int
    shuffle: bool
    seq_length: int
    batch_size: int  # sequences of a micro-step, over all processes
    micro_steps: int
    world_size: int  # processes that share a batch

    @property
    def sequences(self) -> int:
        """Sequences of a global batch."""
        return self.batch_size * self.micro_steps

    def window_hashes(self, train: TrainingSet, first_sample: int, steps: int) -> Iterator[str]:
        """Of each global batch from `first_sample` on: a hash of the data's fingerprint and of its windows' places.

        sha256, cut to 32 hex digits, over the fingerprint, the sequence length, and for each sequence in order its source's
        number and the place of its first token in that source's stream. Where the data is what its fingerprint says, that
        names the tokens of the whole global batch, though no process reads more than its own part. The number of processes
        and the division into micro-steps do not enter.
        """
        head = f"{self.fingerprint} {self.seq_length}\n".encode()
        together = max(1, HASHED_TOGETHER // self.sequences)
        for step in range(0, steps, together):
            count = min(together, steps - step)
            samples = first_sample + np.arange(step * self.sequences, (step + count) * self.sequences)
            places = np.stack(train.places(samples, seed=self.seed, shuffle=self.shuffle), axis=1).astype("<i8")
            for one in places.reshape(count, -1):
                yield _digest(head, one)

    def own_samples(self, first_sample: int) -> np.ndarray:
        """The samples that rank 0 reads of the step that begins with `first_sample`, in its order."""
        rows = self.batch_size // self.world_size
        own: np.ndarray = np.arange(self.micro_steps)[:, None] * self.batch_size + np.arange(rows)
        return first_sample + own.ravel()


def token_hash(tokens: np.ndarray) -> str:
    """A hash of token ids in their order, whatever their shape: sha256 of them as 64-bit integers, cut to 32 hex digits."""
    return _digest(b"", tokens)


def _digest(head: bytes, numbers: np.ndarray) -> str:
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
    return digest.hexdigest()[:32]
