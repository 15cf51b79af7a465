"""Names for batches: a hash of which windows a global batch holds, and one of the tokens that a process read of it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt2_xla.batch_sizes import BatchSizes, parse_batch_sizes
from gpt2_xla.data.training_set import TrainingSet

HASHED_TOGETHER = 4096  # samples: a call of numpy costs as much for 10 of them as for 500


@dataclass(frozen=True)
class BatchOrder:
    """All that decides which tokens a step sees, beside its number and its first sample."""

    fingerprint: str  # of the data
    seed: int
    shuffle: bool
    seq_length: int
    batch_size: int  # sequences of a micro-step, over all processes
    batch_sizes: str  # sequences of an optimizer step, from which step on; as --batch-size-schedule has it
    world_size: int  # processes that share a batch

    @cached_property
    def sizes(self) -> BatchSizes:
        """The global batch of every step; raises `UserError` for a text that tells of none."""
        return parse_batch_sizes(self.batch_sizes, self.batch_size)

    def window_hashes(self, train: TrainingSet, first_sample: int, steps: int, first_step: int = 0) -> Iterator[str]:
        """Of each global batch from `first_sample`, that of `first_step`, on: a hash of the data's fingerprint and of its windows' places.

        sha256, cut to 32 hex digits, over the fingerprint, the sequence length, and for each sequence in order its source's
        number and the place of its first token in that source's stream. Where the data is what its fingerprint says, that
        names the tokens of the whole global batch, though no process reads more than its own part. The number of processes
        and the division into micro-steps do not enter.
        """
        head = f"{self.fingerprint} {self.seq_length}\n".encode()
        for of_one_size, micro_steps in self.sizes.spans(first_step, first_step + steps):
            sequences = micro_steps * self.batch_size
            together = max(1, HASHED_TOGETHER // sequences)
            for step in range(0, of_one_size, together):
                count = min(together, of_one_size - step)
                samples = first_sample + np.arange(step * sequences, (step + count) * sequences)
                places = np.stack(train.places(samples, seed=self.seed, shuffle=self.shuffle), axis=1).astype("<i8")
                for one in places.reshape(count, -1):
                    yield _digest(head, one)
            first_sample += of_one_size * sequences

    def own_samples(self, first_sample: int, step: int) -> np.ndarray:
        """The samples that rank 0 reads of `step`, which begins with `first_sample`, in its order."""
        rows = self.batch_size // self.world_size
        own: np.ndarray = np.arange(self.sizes.micro_steps(step))[:, None] * self.batch_size + np.arange(rows)
        return first_sample + own.ravel()


def token_hash(tokens: np.ndarray) -> str:
    """A hash of token ids in their order, whatever their shape: sha256 of them as 64-bit integers, cut to 32 hex digits."""
    return _digest(b"", tokens)


def _digest(head: bytes, numbers: np.ndarray) -> str:
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
    return digest.hexdigest()[:32]
