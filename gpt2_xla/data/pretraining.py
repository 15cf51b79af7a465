"""The data folders of a training run, opened and checked: what the loop asks for batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpt2_xla.config import PretrainConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.data_mistakes import valid_data_mistakes, vocabulary_mistakes
from gpt2_xla.data.loader import (
    TokenWindows,
    evaluation_batches,
    predicted_tokens,
    training_batches,
)
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.train_dirs import parse_train_dirs
from gpt2_xla.data.training_set import TrainingSet, TrainingSource
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer
from gpt2_xla.validation import replica_mistakes

TOKENIZER_FOLDER = "tokenizer"  # in the run folder: files of a Hugging Face tokenizer, copied into each checkpoint
FULL_CHECK_BELOW = 2**30  # bytes; sha256 takes about a second per GiB


@dataclass(frozen=True)
class PretrainingData:
    """Training and validation windows of one replica; None where no folder was given."""

    config: PretrainConfig
    rank: int
    world_size: int
    train: TrainingSet | None
    valid: TokenWindows | None
    valid_manifest: Manifest | None
    manifest: Manifest  # what the folders say of the tokenizer: that of the first one that names its tokenizer
    fingerprint: str  # of all that decides the training batches; of the validation data where there is only that
    checked: str  # how the shards were checked, for the summary

    @classmethod
    def open(cls, config: PretrainConfig, rank: int, world_size: int) -> "PretrainingData":
        """Open and check the folders; raises one `UserError` with all that is wrong with them."""
        mistakes = replica_mistakes(config, world_size)
        opened: list[_Opened] = []

        def open_folder(folder: Path) -> _Opened | None:
            try:
                opened.append(_open(config, folder, rank))
            except UserError as error:
                mistakes.extend(error.mistakes)
                return None
            return opened[-1]

        dirs = parse_train_dirs(config.data.train_dir)
        sources = [
            TrainingSource(one.name, one.weight, found.manifest, found.windows)
            for one in dirs
            if (found := open_folder(one.folder)) is not None
        ]
        valid = open_folder(Path(config.data.valid_dir)) if config.data.valid_dir is not None else None
        train = TrainingSet(sources) if sources and len(sources) == len(dirs) else None
        if train is not None:
            mistakes += train.mistakes(config.data.train_batch_size)
        if valid is not None:
            mistakes += valid_data_mistakes(valid.windows.folder, valid.manifest)
        named = [
            (f"{'--valid-dir' if one is valid else '--train-dir'} {one.windows.folder}", one.manifest) for one in opened
        ]
        mistakes += vocabulary_mistakes(named, config.model.tokens_known)
        if mistakes:
            raise UserError(mistakes)
        all_full = all(one.full for one in opened)
        return cls(
            config,
            rank,
            world_size,
            train,
            valid.windows if valid is not None else None,
            valid.manifest if valid is not None else None,
            manifest=next((one.manifest for one in opened if one.manifest.tokenizer_hash), opened[0].manifest),
            fingerprint=train.fingerprint if train is not None else opened[0].manifest.fingerprint,
            checked="sha256 checked" if all_full else "lengths checked",
        )

    def training(self, first_sample: int, steps: int, first_step: int = 0) -> Iterator[Tensor]:
        """This replica's batches (A, B, T+1) of `steps` optimizer steps, `first_step` and sample number `first_sample` first."""
        assert self.train is not None
        for count, micro_steps in self.config.batch_sizes.spans(first_step, first_step + steps):
            yield from training_batches(
                self.train,
                seed=self.config.run.seed,
                shuffle=self.config.data.shuffle,
                first_sample=first_sample,
                steps=count,
                micro_steps=micro_steps,
                batch_size=self.config.data.train_batch_size,
                rank=self.rank,
                world_size=self.world_size,
                vocab_size=self.config.model.tokens_known,
            )
            first_sample += count * micro_steps * self.config.data.train_batch_size

    def evaluation(self) -> Iterator[Tensor]:
        """This replica's validation batches (B, 2, T) of inputs and targets."""
        assert self.valid is not None
        return evaluation_batches(
            self.valid,
            steps=self.config.run.valid_steps,
            batch_size=self.config.data.eval_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            vocab_size=self.config.model.tokens_known,
        )

    def evaluated_tokens(self) -> int:
        """The tokens that `evaluation` asks the model for, over all replicas."""
        assert self.valid is not None
        return predicted_tokens(self.valid, self.config.data.eval_batch_size, self.config.run.valid_steps)

    def check_tokenizer(self, name: str | None, tokenizer_hash: str | None) -> None:
        """Raise `UserError` if a checkpoint was trained on tokens of another tokenizer."""
        ours = self.manifest.tokenizer_hash
        if tokenizer_hash and ours and tokenizer_hash != ours:
            raise UserError(
                f"the checkpoint was trained on tokens of {name} (hash {tokenizer_hash[:12]}), but the data was prepared "
                f"with {self.manifest.tokenizer} (hash {ours[:12]}); prepare the data with the checkpoint's tokenizer"
            )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that prepared the data, or its copy in the run folder.

        Raises `UserError` if the manifest names none, or it cannot be loaded, or has changed.
        """
        name = self.manifest.tokenizer
        if name is None:
            raise UserError(
                "--sample-interval: the training data has no manifest that names its tokenizer; prepare the data with "
                "scripts/prepare_text.py, or leave --sample-interval out"
            )
        copy = Path(self.config.run.checkpoints_dir) / TOKENIZER_FOLDER
        tokenizer = load_tokenizer(str(copy) if (copy / "tokenizer.json").is_file() else name)
        self._check_unchanged(tokenizer)
        return tokenizer

    def save_tokenizer(self, folder: Path) -> None:
        """Keep the files of a Hugging Face tokenizer with the run; the other kinds are known by name alone.

        Raises `UserError` if the tokenizer is no longer the one that prepared the data.
        """
        name = self.manifest.tokenizer
        if name is None or not (Path(name).is_file() or Path(name, "tokenizer.json").is_file()):
            return
        tokenizer = load_tokenizer(name)
        self._check_unchanged(tokenizer)
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)

    def _check_unchanged(self, tokenizer: Tokenizer) -> None:
        if tokenizer.hash != self.manifest.tokenizer_hash:
            raise UserError(
                f"tokenizer {tokenizer.name} (hash {tokenizer.hash[:12]}) has changed since the data was prepared with it "
                f"(hash {str(self.manifest.tokenizer_hash)[:12]}); prepare the data again, or restore the tokenizer"
            )


@dataclass(frozen=True)
class _Opened:
    """A data folder that was checked."""

    manifest: Manifest
    windows: TokenWindows
    full: bool  # whether its contents were compared


def _open(config: PretrainConfig, folder: Path, rank: int) -> _Opened:
    """Raises `UserError` with all that is wrong with the shards."""
    manifest = manifests.read(folder)
    full = _check_fully(config, manifest)
    # One process hashes; the others would only read the same bytes again.
    manifests.verify(folder, manifest, full=full and rank == 0)
    hashed = full and all(shard.sha256 for shard in manifest.shards)
    return _Opened(manifest, TokenWindows(folder, manifest, config.model.seq_length), hashed)


def _check_fully(config: PretrainConfig, manifest: Manifest) -> bool:
    if config.data.verify_data != "auto":
        return config.data.verify_data == "full"
    return manifest.tokens * (2 if manifest.dtype == "uint16" else 4) <= FULL_CHECK_BELOW
