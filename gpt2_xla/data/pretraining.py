"""The two data folders of a training run, opened and checked: what the loop asks for batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpt2_xla.config import PretrainConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.loader import (
    TokenWindows,
    evaluation_batches,
    train_data_mistakes,
    training_batches,
    valid_data_mistakes,
)
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import load_tokenizer
from gpt2_xla.validation import replica_mistakes

FULL_CHECK_BELOW = 2**30  # bytes; sha256 takes about a second per GiB


@dataclass(frozen=True)
class PretrainingData:
    """Training and validation windows of one replica; None for a folder that was not given."""

    config: PretrainConfig
    rank: int
    world_size: int
    train: TokenWindows | None
    valid: TokenWindows | None
    manifest: Manifest  # of the training data; of the validation data where there is only that
    checked: str  # how the shards were checked, for the summary

    @classmethod
    def open(cls, config: PretrainConfig, rank: int, world_size: int) -> "PretrainingData":
        """Open and check the folders; raises one `UserError` with all that is wrong with them."""
        mistakes = replica_mistakes(config, world_size)
        windows: dict[str, TokenWindows] = {}
        found: dict[str, Manifest] = {}
        hashed = True
        for split, folder in (("train", config.data.train_dir), ("valid", config.data.valid_dir)):
            if folder is None:
                continue
            try:
                manifest = found[split] = manifests.read(Path(folder))
                mistakes += _data_mistakes(config, split, Path(folder), manifest)
                full = _check_fully(config, manifest)
                hashed &= full and all(shard.sha256 for shard in manifest.shards)
                # One process hashes; the others would only read the same bytes again.
                manifests.verify(Path(folder), manifest, full=full and rank == 0)
                windows[split] = TokenWindows(Path(folder), manifest, config.model.seq_length)
            except UserError as error:
                mistakes += error.mistakes
        if mistakes:
            raise UserError(mistakes)
        manifest = found.get("train") or found["valid"]
        checked = "sha256 checked" if hashed else "lengths checked"
        return cls(config, rank, world_size, windows.get("train"), windows.get("valid"), manifest, checked)

    def training(self, first_sample: int, steps: int) -> Iterator[Tensor]:
        """This replica's batches (A, B, T+1) of `steps` optimizer steps from sample number `first_sample` on."""
        assert self.train is not None
        return training_batches(
            self.train,
            seed=self.config.run.seed,
            shuffle=self.config.data.shuffle,
            first_sample=first_sample,
            steps=steps,
            micro_steps=self.config.data.gradient_accum_step,
            batch_size=self.config.data.train_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            vocab_size=self.config.model.vocabulary,
        )

    def evaluation(self) -> Iterator[Tensor]:
        """This replica's validation batches (B, 2, T) of inputs and targets."""
        assert self.valid is not None
        return evaluation_batches(
            self.valid,
            steps=self.config.run.valid_steps,
            batch_size=self.config.data.eval_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            vocab_size=self.config.model.vocabulary,
        )

    def check_tokenizer(self, name: str | None, tokenizer_hash: str | None) -> None:
        """Raise `UserError` if a checkpoint was trained on tokens of another tokenizer."""
        ours = self.manifest.tokenizer_hash
        if tokenizer_hash and ours and tokenizer_hash != ours:
            raise UserError(
                f"the checkpoint was trained on tokens of {name} (hash {tokenizer_hash[:12]}), but the data was prepared "
                f"with {self.manifest.tokenizer} (hash {ours[:12]}); prepare the data with the checkpoint's tokenizer"
            )

    def save_tokenizer(self, folder: Path) -> None:
        """Keep the files of a Hugging Face tokenizer with the run; the other kinds are known by name alone.

        Raises `UserError` if the tokenizer is no longer the one that prepared the data.
        """
        name = self.manifest.tokenizer
        if name is None or not (Path(name).is_file() or Path(name, "tokenizer.json").is_file()):
            return
        tokenizer = load_tokenizer(name)
        if tokenizer.hash != self.manifest.tokenizer_hash:
            raise UserError(
                f"tokenizer {name} (hash {tokenizer.hash[:12]}) has changed since the data was prepared with it "
                f"(hash {str(self.manifest.tokenizer_hash)[:12]}); prepare the data again, or restore the tokenizer"
            )
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)


def _data_mistakes(config: PretrainConfig, split: str, folder: Path, manifest: Manifest) -> list[str]:
    vocabulary = config.model.vocabulary
    if split == "valid":
        return valid_data_mistakes(folder, manifest, vocab_size=vocabulary)
    length, batch = config.model.seq_length, config.data.train_batch_size
    return train_data_mistakes(folder, manifest, seq_length=length, batch_size=batch, vocab_size=vocabulary)


def _check_fully(config: PretrainConfig, manifest: Manifest) -> bool:
    if config.data.verify_data != "auto":
        return config.data.verify_data == "full"
    return manifest.tokens * (2 if manifest.dtype == "uint16" else 4) <= FULL_CHECK_BELOW
