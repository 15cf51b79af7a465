"""Every option of the training commands, declared once: a dataclass field, a flag, a line of --help and of docs.

A field's name is its flag (`seq_length` is `--seq-length`), its type and default are the flag's, its help stands beside it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt2_xla.batch_sizes import BatchSizes, parse_batch_sizes


def option(default: Any, help: str, portable: bool = True) -> Any:
    """A dataclass field that is also a command-line flag. A bool also takes --no-NAME.

    One that is not portable means other things to the other entry point: a run continued there does not take it over.
    """
    return field(default=default, metadata={"help": help, "portable": portable})


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
    num_kv_heads: int | None = option(
        None,
        "heads of keys and values, each shared by as many query heads (grouped-query attention); must divide --num-heads; default: --num-heads",
    )
    d_ff: int | None = option(
        None,
        "hidden dimension of the MLP; default: 4 x --d-model; for swiglu, which has three matrices instead of two, 8/3 x --d-model, up to a multiple of 64",
    )
    dropout: float = option(0.0, "dropout probability on embeddings, attention weights and residual branches")
    activation: Literal["gelu", "relu", "relu2", "swiglu"] = option(
        "gelu",
        "MLP non-linearity; gelu is GPT-2's tanh approximation, relu2 the square of relu, swiglu a second matrix's output times silu of the first's",
    )
    position: Literal["learned", "rope"] = option(
        "learned", "a learned vector per position, as in GPT-2, or rotations of queries and keys (RoPE)"
    )
    rope_theta: float = option(10_000.0, "base of the wavelengths of --position rope")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalization before attention, MLP and output layer")
    norm_eps: float = option(1e-5, "what is added to the variance, or to the mean square, in a normalization")
    qk_norm: bool = option(False, "RMSNorm of each head's queries and keys, before any rotation")
    bias: bool = option(True, "biases in linear layers and LayerNorm, as GPT-2 has")
    tie_weights: bool = option(True, "share the token embedding with the output layer, as GPT-2 does")
    vocab_padding: int = option(
        0,
        "rows at the end of --vocab-size that stand for no token: never predicted, left out of checkpoints. --from-checkpoint sets it where --vocab-size is larger than the checkpoint's",
    )

    @property
    def hidden_dim(self) -> int:
        """The MLP's hidden dimension, with the default filled in."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.d_model

    @property
    def head_dim(self) -> int:
        """Dimension D of a head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, with the default filled in."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def vocabulary(self) -> int:
        """The vocabulary size V, with GPT-2's where neither a flag nor a manifest said one; padding included."""
        return self.vocab_size if self.vocab_size is not None else 50257

    @property
    def tokens_known(self) -> int:
        """The ids that stand for tokens, 0 to this: the vocabulary without its padding."""
        return self.vocabulary - self.vocab_padding


_GPT2: dict[str, Any] = dict(position="learned", norm="layernorm", activation="gelu", qk_norm=False, bias=True)
_MODERN: dict[str, Any] = dict(position="rope", norm="rmsnorm", activation="swiglu", qk_norm=True, bias=False)

# Sizes from the GPT-2 paper, table 2, with the head counts of the released models. `tiny` is for laptops.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(seq_length=128, d_model=192, num_layers=4, num_heads=4, **_GPT2),
    "gpt2": dict(seq_length=1024, d_model=768, num_layers=12, num_heads=12, **_GPT2),
    # As many parameters and FLOPs, but heads of D = 128, the width of a TPU's matrix unit: 64 leaves half of it idle.
    "gpt2-6h": dict(seq_length=1024, d_model=768, num_layers=12, num_heads=6, **_GPT2),
    "gpt2-medium": dict(seq_length=1024, d_model=1024, num_layers=24, num_heads=16, **_GPT2),
    "gpt2-large": dict(seq_length=1024, d_model=1280, num_layers=36, num_heads=20, **_GPT2),
    "gpt2-xl": dict(seq_length=1024, d_model=1600, num_layers=48, num_heads=25, **_GPT2),
    # gpt2's matrices (12 C² a block) with what came after it; as Hugging Face sees it, a Qwen3.
    "modern-124m": dict(seq_length=1024, d_model=768, num_layers=12, num_heads=6, **_MODERN),
}
# What some presets set beside the model's shape: fields of OptimConfig. Flags beside --preset win over these, too.
PRESET_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "modern-124m": dict(optim_type="muon", decay_method="wsd-sqrt", min_lr=0.0),
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
    batch_size_schedule: str | None = option(
        None,
        "sequences per optimizer step from given steps on, as in 0:64,2000:128,10000:256, by more or fewer micro-steps of --train-batch-size; takes the place of --gradient-accum-step. XLA compiles a program for each number of micro-steps",
    )
    shuffle: bool = option(
        True, "visit the training windows in a seeded random order, a new one each epoch; --no-shuffle reads in order"
    )
    verify_data: Literal["auto", "full", "size"] = option(
        "auto", "check shards before training: full compares sha256, size only lengths, auto is full up to 1 GiB"
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule"""

    optim_type: Literal["adamw", "adam", "muon"] = option(
        "adamw",
        "optimizer; muon orthogonalizes the momentum of the blocks' matrices and leaves the rest to AdamW. Weight decay applies to matrices only",
    )
    learning_rate: float = option(
        6e-4, "peak learning rate; one for all parameters: Muon's updates are scaled to the size of AdamW's"
    )
    betas: tuple[float, float] = option((0.9, 0.95), "Adam's two decay rates")
    muon_momentum: float = option(0.95, "Muon's (Nesterov) momentum")
    weight_decay: float = option(0.1, "weight decay of matrices (biases and normalizations have none)")
    independent_weight_decay: bool = option(
        False,
        "--weight-decay is the share of a weight that a step at the peak takes away, whatever --learning-rate is (such as 1e-4); else that share is their product",
    )
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this; 0 does not clip")
    decay_method: Literal["cosine", "linear", "noam", "wsd", "wsd-sqrt"] = option(
        "cosine",
        "learning-rate decay after warm-up; wsd (warm-up, stable, decay) holds the peak, then falls over --decay-steps, on a line or (wsd-sqrt) by 1 - sqrt(share done)",
    )
    warmup_steps: int = option(715, "steps of linear warm-up from 0 to the peak")
    min_lr: float = option(6e-5, "learning rate that the decay ends at")
    decay_steps: int | None = option(
        None,
        "cosine, linear: the step at which --min-lr is reached (default --train-steps); wsd: length of the final fall (default 1/5 of it)",
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
    remote_dir: str | None = option(
        None,
        "also copy every checkpoint, and the records of the run, to this address (gs://, s3://, hf:// or another that fsspec opens); a machine with an empty --checkpoints-dir continues from there",
    )
    strict_saving: bool = option(
        False,
        "end the run when a checkpoint can't be saved or copied; else that is a warning, and the next save tries again",
    )
    resume: Literal["auto", "must", "never"] = option(
        "auto",
        "auto continues from the newest good checkpoint in --checkpoints-dir, or begins anew if there is none; must refuses to begin anew; never refuses a folder that holds checkpoints",
    )
    from_checkpoint: str | None = option(
        None,
        "begin with this checkpoint of another run; or with the weights of a Hugging Face GPT-2, Llama or Qwen3, a folder or a name on the hub such as gpt2-medium: a new run, whose --seq-length may be shorter and whose --vocab-size may be larger; given again, the command continues what it began",
    )
    hang_timeout: float = option(
        1800.0,
        "end the run, with each rank's position and a stack of each thread, after N seconds without progress; start-up and compilation may take an hour even so; 0 waits for ever",
    )
    do_test: bool = option(
        False,
        "do not train: evaluate the checkpoint on --valid-dir; print loss and its standard error, perplexity, bits per byte",
    )
    max_skipped_steps: int = option(
        20,
        "save, write the batches to bad_batch-STEP.safetensors and stop when N steps in a row had a loss or gradients that are not finite, which changes nothing; looked at every --log-interval; 0: never stop",
    )
    spike_factor: float | None = option(
        None,
        "go back to the last checkpoint before it, and skip the data, when the mean loss of a log window exceeds X times the median of the up to 20 windows before it (5 at least); default: never",
    )
    seed: int = option(1337, "seed of the initial weights, the data order and dropout")


@dataclass(frozen=True)
class LoggingConfig:
    """Logging"""

    log_interval: int = option(10, "fetch and log the training loss every N steps")
    sample_interval: int = option(
        0, "continue --sample-prompt every N steps and log the text; 0: never. Changes nothing of the training"
    )
    sample_prompt: str = option("", "text that samples continue; empty: they start from end-of-text, as documents do")
    sample_tokens: int | None = option(
        None,
        "tokens of each sample, together with the prompt's no more than --seq-length; default: 64, or half of it if that is less",
    )
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

    mixed_precision: Literal["no", "bf16", "fp16", "fp8"] = option(
        "bf16",
        "matmul precision under autocast; weights, optimizer state and loss stay float32. fp16 is for CUDA GPUs and uses a gradient scaler. fp8 is bf16 with the blocks' matrices multiplied in float8 in training steps, for CUDA GPUs of compute capability 8.9 and later; it needs torchao, and is slower than bf16 without --compile; MFU is against the bf16 peak",
    )
    residual_precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "precision of the residual stream between the blocks under --mixed-precision bf16 or fp8. bf16 halves its memory and traffic; normalizations compute in float32 from either. auto is bf16 on TPU v4 and later, else fp32",
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
    vocab_multiple: int = option(
        1,
        "pad the output matrix to a multiple of N rows while the loss is computed; the padding is in no parameter and no checkpoint. TPUs need none: their compiler pads by itself",
    )
    activation_checkpointing: Literal["none", "block", "selective"] = option(
        "none",
        "activations to compute again in the backward pass instead of keeping them: of each block all but its input; or, selective, the attention matrices alone",
    )


@dataclass(frozen=True)
class TorchDeviceConfig(RuntimeConfig):
    """Device and precision"""

    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "device; auto takes the accelerator that torch finds, else the CPU"
    )
    ddp_backend: Literal["auto", "gloo", "nccl"] = option(
        "auto", "torch.distributed backend under torchrun; auto is nccl on CUDA, else gloo"
    )
    sharding: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = option(
        "auto",
        "how torchrun's processes share the work: ddp, each has a copy of the model; fsdp, weights, gradients and optimizer state are cut up over all of them (FSDP2); hsdp, --mesh's copies, each cut up; none is for one process; auto is ddp under torchrun",
        portable=False,
    )
    mesh: str | None = option(
        None,
        "processes along each axis of --sharding hsdp, as in data=2,fsdp=4: data copies the model, fsdp cuts it; default: a copy per host",
        portable=False,
    )
    compile: bool = option(
        False,
        "compile forward pass, loss and backward pass with torch.compile (inductor), which takes some ten seconds to a minute before the first step; on CUDA and in bf16 on the CPU the faster way",
    )


@dataclass(frozen=True)
class TorchConfig(TorchDeviceConfig):
    """Device and precision"""

    find_batch: bool = option(
        False,
        "before training, measure the largest --train-batch-size that fits into memory, and set --gradient-accum-step so that a step sees as many sequences as these two flags say together; config.json holds what was found",
    )
    memory_limit: float | None = option(
        None,
        "GiB that --find-batch may plan with for each process, of the GPU or, on a CPU, of RAM, a tenth of which stays free; default: what is free",
    )


@dataclass(frozen=True)
class XlaConfig(RuntimeConfig):
    """Device and precision"""

    sharding: Literal["none", "fsdp"] = option(
        "none",
        "none: each device has a copy of the model (xmp.spawn); fsdp: weights, gradients and optimizer state are cut up over the devices of --mesh (SPMD, one process per host)",
        portable=False,
    )
    mesh: str | None = option(
        None,
        "devices along each axis of --sharding fsdp, as in data=2,fsdp=2,tensor=2: data copies the model, fsdp cuts it, tensor cuts attention heads and the MLP too; default: all devices on fsdp",
        portable=False,
    )
    mp_start_method: Literal["spawn", "fork"] = option(
        "spawn", "how xmp.spawn starts the replicas' processes (--sharding none)"
    )
    use_syncfree_optim: bool = option(
        True, "torch_xla's sync-free AdamW/Adam; without it torch's own, which takes more operations for the same"
    )
    loader_prefetch_size: int = option(8, "host batches that MpDeviceLoader keeps ready")
    device_prefetch_size: int = option(4, "device batches that MpDeviceLoader keeps ready")
    compile_cache: str | None = option(
        None, "folder that keeps compiled programs for the next start, one subfolder per replica; no use on CPU"
    )
    scan_layers: bool = option(
        False,
        "trace one block and loop over the layers: a program that barely grows with --num-layers, for more memory traffic",
    )
    attention: Literal["auto", "flash", "math"] = option(
        "auto",
        "flash is the Pallas kernel, which never stores the T x T matrices, on TPUs; auto takes it where it can run, else math",
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
    def sample_tokens(self) -> int:
        """--sample-tokens, with the default filled in."""
        given = self.logging.sample_tokens
        return given if given is not None else min(64, max(1, self.model.seq_length // 2))

    @property
    def batch_sizes(self) -> BatchSizes:
        """The batch of every optimizer step; raises `UserError` for a schedule that says nothing sensible."""
        data = self.data
        if data.batch_size_schedule is None:
            return BatchSizes(data.train_batch_size, ((0, data.gradient_accum_step),))
        return parse_batch_sizes(data.batch_size_schedule, data.train_batch_size)

    def tokens_at(self, step: int) -> int:
        """Tokens that optimizer step `step`, counted from 0, sees."""
        return self.batch_sizes.sequences(step) * self.model.seq_length


@dataclass(frozen=True)
class TorchPretrainConfig(PretrainConfig):
    """Options of run_pretrain.py."""

    runtime: TorchConfig = TorchConfig()


@dataclass(frozen=True)
class XlaPretrainConfig(PretrainConfig):
    """Options of run_pretrain_xla.py."""

    runtime: XlaConfig = XlaConfig()


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types (tuples become lists)."""
    return {
        name: list(v) if isinstance(v, tuple) else to_dict(v) if dataclasses.is_dataclass(v) else v
        for name, v in vars(config).items()
    }


ENTRY_POINTS = {"run_pretrain.py": TorchPretrainConfig, "run_pretrain_xla.py": XlaPretrainConfig}
