"""Every option of the training commands, declared once: a dataclass field, a flag, a line of --help and of docs.

A field's name is its flag (`seq_length` is `--seq-length`), its type and default are the flag's, its help stands beside it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str) -> Any:
    """A dataclass field that is also a command-line flag. A bool also takes --no-NAME."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    vocab_size: int | None = option(
        None, "vocabulary size V; default: the tokenizer's, from the data's manifest (50257 without one)"
    )
    seq_length: int = option(1024, "sequence length T, in tokens: the context the model sees")
    d_model: int = option(768, "model dimension C")
    num_layers: int = option(12, "number of transformer blocks")
    num_heads: int = option(12, "attention heads H; must divide --d-model")
    d_ff: int | None = option(None, "hidden dimension of the MLP; default: 4 x --d-model")
    dropout: float = option(0.0, "dropout probability on embeddings, attention weights and residual branches")
    activation: Literal["gelu", "relu"] = option("gelu", "MLP non-linearity; gelu is GPT-2's tanh approximation")
    tie_weights: bool = option(True, "share the token embedding with the output layer, as GPT-2 does")

    @property
    def hidden_dim(self) -> int:
        """The MLP's hidden dimension, with the default filled in."""
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

    @property
    def vocabulary(self) -> int:
        """The vocabulary size, with GPT-2's where neither a flag nor a manifest said one."""
        return self.vocab_size if self.vocab_size is not None else 50257


OUTPUT_DIR = "folder that receives train/ and valid/"

# Sizes from the GPT-2 paper, table 2, with the head counts of the released models. `tiny` is for laptops.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(seq_length=128, d_model=192, num_layers=4, num_heads=4),
    "gpt2": dict(seq_length=1024, d_model=768, num_layers=12, num_heads=12),
    "gpt2-medium": dict(seq_length=1024, d_model=1024, num_layers=24, num_heads=16),
    "gpt2-large": dict(seq_length=1024, d_model=1280, num_layers=36, num_heads=20),
    "gpt2-xl": dict(seq_length=1024, d_model=1600, num_layers=48, num_heads=25),
}


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    train_dir: tuple[str, ...] = option(
        (),
        "folders of token shards to train on (from scripts/prepare_*.py), each [NAME=]FOLDER[:WEIGHT], as in web=data/web/train:0.7 code=data/code/train:0.3; without weights each counts by its tokens",
    )
    valid_dir: str | None = option(None, "folder of token shards to validate on; default: no validation")
    train_batch_size: int = option(32, "sequences per micro-step, over all replicas together")
    eval_batch_size: int = option(32, "sequences per validation step, over all replicas together")
    gradient_accum_step: int = option(16, "micro-steps whose gradients are averaged into one optimizer step")
    shuffle: bool = option(
        True, "visit the training windows in a seeded random order, a new one each epoch; --no-shuffle reads in order"
    )
    verify_data: Literal["auto", "full", "size"] = option(
        "auto", "check shards before training: full compares sha256, size only lengths, auto is full up to 1 GiB"
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule"""

    optim_type: Literal["adamw", "adam"] = option("adamw", "optimizer; weight decay applies to matrices only")
    learning_rate: float = option(6e-4, "peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.95), "Adam's two decay rates")
    weight_decay: float = option(0.1, "weight decay of matrices (biases and LayerNorm have none)")
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this; 0 does not clip")
    decay_method: Literal["cosine", "linear", "noam", "trapezoid"] = option(
        "cosine",
        "learning-rate decay after warm-up; trapezoid holds the peak, then falls linearly over --decay-steps (WSD)",
    )
    warmup_steps: int = option(715, "steps of linear warm-up from 0 to the peak")
    min_lr: float = option(6e-5, "learning rate that the decay ends at")
    decay_steps: int | None = option(
        None,
        "cosine, linear: the step at which --min-lr is reached (default --train-steps); trapezoid: length of the final fall (default 1/5 of it)",
    )


@dataclass(frozen=True)
class RunConfig:
    """Run and checkpoints"""

    train_steps: int = option(19073, "optimizer steps in all, those before a resume included")
    valid_steps: int | None = option(None, "validation steps per evaluation; default: the whole of --valid-dir")
    valid_interval: int = option(250, "validate every N steps; 0 only at the end")
    save_interval: int = option(
        1000, "save a checkpoint every N steps; 0 only at the end. A new best validation loss is saved too"
    )
    saved_checkpoint_limit: int = option(
        3, "checkpoints to keep, newest first; the best by validation loss is kept besides"
    )
    checkpoints_dir: str = option("runs/gpt2", "the run's folder: checkpoints, config.json, metrics.jsonl")
    resume: bool = option(False, "continue from the newest good checkpoint in --checkpoints-dir")
    from_checkpoint: str | None = option(None, "continue from this checkpoint folder instead")
    do_test: bool = option(False, "do not train: evaluate the checkpoint on --valid-dir, print loss and perplexity")
    seed: int = option(1337, "seed of the initial weights, the data order and dropout")


@dataclass(frozen=True)
class LoggingConfig:
    """Logging"""

    log_interval: int = option(10, "fetch and log the training loss every N steps")
    wandb_logging: bool = option(False, "also log to Weights & Biases")
    wandb_project: str = option("gpt2_xla", "W&B project")
    wandb_name: str | None = option(None, "W&B run name; default: the run folder's name")
    wandb_tags: tuple[str, ...] = option((), "W&B tags")
    wandb_notes: str | None = option(None, "W&B notes")
    wandb_resume_id: str | None = option(None, "continue this W&B run")
    wandb_logging_interval: int | None = option(
        None, "log training metrics to W&B every N steps, a multiple of --log-interval (its default)"
    )


@dataclass(frozen=True)
class RuntimeConfig:
    """Device and precision"""

    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "bf16",
        "matmul precision under autocast; weights, optimizer state and loss stay float32. fp16 is for CUDA GPUs and uses a gradient scaler",
    )
    matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest", "precision of float32 matmuls; high lets CUDA use TF32"
    )
    loss_chunk: int = option(
        2048, "tokens per chunk of output layer and loss, so that no full float32 logits are ever held; 0 for one chunk"
    )
    profile_steps: str | None = option(
        None, "profile steps FIRST:LAST, both included and counted as in the log, into the run folder's profile/"
    )
    max_recompiles: int | None = option(
        None,
        "save and stop when more than N programs were compiled after warm-up, the first time of each kind of work; default: warn only",
    )


@dataclass(frozen=True)
class TorchConfig(RuntimeConfig):
    """Device and precision"""

    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "device; auto takes the accelerator that torch finds, else the CPU"
    )
    ddp_backend: Literal["auto", "gloo", "nccl"] = option(
        "auto", "torch.distributed backend under torchrun; auto is nccl on CUDA, else gloo"
    )
    compile: bool = option(False, "compile the model with torch.compile")


@dataclass(frozen=True)
class XlaConfig(RuntimeConfig):
    """Device and precision"""

    sharding: Literal["none", "fsdp"] = option(
        "none",
        "none: each device has a copy of the model (xmp.spawn); fsdp: weights, gradients and optimizer state are cut up over the devices of --mesh (SPMD, one process per host)",
    )
    mesh: str | None = option(
        None,
        "devices along each axis of --sharding fsdp, as in data=2,fsdp=2,tensor=2: data copies the model, fsdp cuts it, tensor cuts attention heads and the MLP too; default: all devices on fsdp",
    )
    mp_start_method: Literal["spawn", "fork"] = option(
        "spawn", "how xmp.spawn starts the replicas' processes (--sharding none)"
    )
    use_syncfree_optim: bool = option(
        True, "torch_xla's sync-free AdamW/Adam, which skips a step with non-finite gradients on the device"
    )
    loader_prefetch_size: int = option(8, "host batches that MpDeviceLoader keeps ready")
    device_prefetch_size: int = option(4, "device batches that MpDeviceLoader keeps ready")
    compile_cache: str | None = option(
        None, "folder that keeps compiled programs for the next start, one subfolder per replica; no use on CPU"
    )


@dataclass(frozen=True)
class PretrainConfig:
    """All that a training run is a function of; written to the run folder's config.json."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step sees, over all replicas and micro-steps."""
        return self.data.train_batch_size * self.data.gradient_accum_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.sequences_per_step * self.model.seq_length


@dataclass(frozen=True)
class TorchPretrainConfig(PretrainConfig):
    """Options of run_pretrain.py."""

    runtime: TorchConfig = TorchConfig()


@dataclass(frozen=True)
class XlaPretrainConfig(PretrainConfig):
    """Options of run_pretrain_xla.py."""

    runtime: XlaConfig = XlaConfig()


@dataclass(frozen=True)
class PlanOptions:
    """What to plan"""

    tpu: tuple[str, ...] = option(
        ("v3-8", "v5e-8", "v6e-8"), "slices to compile for, by the names that they are rented by"
    )
    tokens: float = option(10e9, "tokens of the whole training, for days and dollars")
    dollars_per_chip_hour: float | None = option(None, "price of a chip-hour; default: no dollars are told")
    find_batch: bool = option(
        False, "find the largest --train-batch-size that fits each slice, by doubling and halving from the one given"
    )
    compare: tuple[str, ...] = option(
        (),
        "also plan the step with these options changed, and print a table: each value is NAME=VALUE words, as in loss-chunk=0 'num-heads=6 train-batch-size=128'",
    )
    json: bool = option(False, "print JSON instead of text")
    time_limit: int = option(1200, "seconds for one compilation; what has not ended by then is killed and reported")
    jobs: int | None = option(None, "compilations at a time; default: as many as cores and memory allow")
    plan_cache: str = option("~/.cache/gpt2_xla/tpu_plan", "folder that keeps what the compiler said")


@dataclass(frozen=True)
class PlanConfig(XlaPretrainConfig):
    """Options of scripts/plan_tpu.py."""

    plan: PlanOptions = PlanOptions()


@dataclass(frozen=True)
class TextSource:
    """Where prepare_text.py reads."""

    source: tuple[str, ...] = option(
        ("pydoc",),
        "pydoc (Python's language reference), stdlib (its library's source), files or folders (.txt, .md, .rst, .py, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), or their hf://, s3://, gs:// addresses",
    )


@dataclass(frozen=True)
class HubSource:
    """Where prepare_fineweb.py reads."""

    dataset: str = option(
        "HuggingFaceFW/fineweb",
        "Hugging Face dataset; or a file or folder of its rows (.parquet, .jsonl), or an hf://, s3://, gs:// address",
    )
    name: str = option("sample-10BT", "configuration of the dataset, for FineWeb also sample-100BT or sample-350BT")
    split: str = option("train", "split of the dataset")
    fineweb_edu: bool = option(False, "use HuggingFaceFW/fineweb-edu")
    id_column: str = option(
        "id", "column that names each document and so puts it into train/ or valid/; without it, file and row do"
    )
    streaming: bool = option(False, "read over the network without storing the raw text")
    cache_dir: str | None = option(None, "where downloads are kept; default: Hugging Face's cache")


@dataclass(frozen=True)
class Preparation:
    """What both commands that prepare data do with what they read."""

    tokenizer: str = option("gpt2", "bytes, a tiktoken name such as gpt2, or a Hugging Face tokenizer.json or folder")
    output_dir: str = option("data/pydoc", OUTPUT_DIR)
    text_column: str = option("text", "column, or field of .jsonl rows, that holds the text")
    dedup: Literal["no", "exact"] = option("no", "exact drops documents whose text came before, byte for byte")
    shard_size: int = option(100_000_000, "tokens per shard")
    num_workers: int | None = option(None, "processes that tokenize; default: one per core; changes speed, never bytes")
    skip_bad_files: bool = option(False, "leave out files that can't be read, whole, instead of stopping at them")
    fast_tokenizer: bool = option(
        True,
        "tokenize with gigatoken where it knows the vocabulary, one document in 1000 checked against tiktoken or tokenizers",
    )
    dry_run: bool = option(False, "print what would be done, and the disk it needs, and do nothing")
    seed: int = option(1337, "picks the documents that are tokenized a second time; decides no byte of the shards")


# A dataclass takes the fields of its last base first: where from, what to do with it, and what is its own.
@dataclass(frozen=True)
class PrepareConfig(Preparation, TextSource):
    """Preparing data"""

    valid_fraction: float = option(0.1, "share of the tokens, at their end, that becomes valid/")


@dataclass(frozen=True)
class FinewebConfig(Preparation, HubSource):
    """Preparing FineWeb"""

    output_dir: str = option("data/fineweb", OUTPUT_DIR)
    valid_tokens: int = option(
        10_000_000,
        "valid/ takes documents that --valid-share sets apart, by the smallest hashes of their ids, until it holds this many tokens; 0 for no valid/",
    )
    valid_share: float = option(
        0.001,
        "share of all documents that is never trained on, by the hashes of their ids, however the source grows; what --valid-tokens does not take of it is left out",
    )


@dataclass(frozen=True)
class DataBenchConfig:
    """Timing the preparation of data"""

    sample: str = option("../shared/data/web_sample", "folder of parquet files whose pages are the web text")
    megabytes: int = option(200, "text to prepare, in MB of UTF-8, no document twice")
    tokenizer: str = option("gpt2", "a tiktoken name")
    workers: tuple[int, ...] = option((1, 2), "values of --num-workers to time")


@dataclass(frozen=True)
class GenerateConfig:
    """Generation"""

    model: str = option("runs/gpt2", "checkpoint folder, or run folder (its newest good checkpoint)")
    tokenizer: str | None = option(
        None, "bytes, a tiktoken name, or a Hugging Face tokenizer; default: the one recorded in the checkpoint"
    )
    prompt: str | None = option(None, "text to continue; without it, an interactive prompt")
    max_new_tokens: int = option(128, "tokens to add at most; ends earlier at end-of-text")
    temperature: float = option(0.8, "divides the logits; 0 always takes the most likely token")
    top_k: int | None = option(None, "sample among the k most likely tokens")
    top_p: float | None = option(None, "sample among the fewest tokens whose probabilities reach p")
    seed: int = option(1337, "seed of the sampling")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "device; auto takes the accelerator that torch finds, else the CPU"
    )


@dataclass(frozen=True)
class BenchOptions:
    """What to measure"""

    runtimes: tuple[Literal["torch", "xla"], ...] = option(("torch", "xla"), "entry points to measure")
    precisions: tuple[Literal["no", "bf16", "fp16"], ...] = option(
        ("no", "bf16"), "values of --mixed-precision to measure"
    )
    train_batch_size: int = option(4, "sequences per micro-step")
    gradient_accum_step: int = option(1, "micro-steps per optimizer step")
    steps: int = option(20, "steps to time, after 3 that warm up")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option("auto", "device of the torch rows")
    compile: bool = option(False, "compile the torch rows with torch.compile")
    bare: bool = option(
        True, "hold XLA rows of one device against a hand-written loop of the same model, in turns in the same process"
    )


@dataclass(frozen=True)
class BenchConfig:
    """Options of scripts/bench.py."""

    model: ModelConfig = ModelConfig()
    bench: BenchOptions = BenchOptions()


@dataclass(frozen=True)
class BenchLoaderConfig:
    """What to measure"""

    seq_lengths: tuple[int, ...] = option((64, 256, 1024), "sequence lengths T to measure")
    shards: int = option(100, "shards per folder, as sparse files in the temporary folder")
    shard_size: int = option(100_000_000, "tokens per shard")
    tokens_per_step: int = option(16_384, "tokens of one process's batch")
    seek_step: int = option(1_000_000, "step at which reading starts")
    seconds: float = option(2.0, "time to read for, before the same steps are read again and timed")


@dataclass(frozen=True)
class InspectConfig:
    """Inspecting data"""

    data: str | None = option(None, "folder of token shards, such as data/pydoc/train; may stand without its flag")
    verify: bool = option(True, "compare the sha256 of every shard; --no-verify only lengths")
    samples: int = option(3, "documents to decode and print")
    top: int = option(25, "most frequent tokens to list")
    seed: int = option(1337, "seed of the samples and of the documents compared")
    output: str | None = option(None, "picture to write; default: FOLDER_tokens.png in the current folder")
    tokenizer: str | None = option(None, "tokenizer to decode with; default: the one recorded in the manifest")
    against: tuple[str, ...] = option(
        (), "sources of the text, as prepare_text.py takes them: tokenize some of their documents and look for them"
    )
    against_documents: int = option(100, "documents of --against to compare")
    text_column: str = option("text", "field of .jsonl and .parquet rows of --against that holds the text")


@dataclass(frozen=True)
class DoctorConfig:
    """What to examine"""

    train_dir: tuple[str, ...] = option((), "training data to check, as the training commands take it")
    valid_dir: str | None = option(None, "validation data to check")
    verify_data: Literal["auto", "full", "size"] = option(
        "auto", "check shards: full compares sha256, size only lengths, auto is full up to 1 GiB"
    )
    checkpoints_dir: str = option(
        "runs/gpt2", "run folder whose disk is measured and whose newest checkpoint is checked"
    )
    time_limit: int = option(60, "seconds for all checks together; what has not ended by then is killed and reported")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types (tuples become lists)."""
    return {
        name: list(v) if isinstance(v, tuple) else to_dict(v) if dataclasses.is_dataclass(v) else v
        for name, v in vars(config).items()
    }
