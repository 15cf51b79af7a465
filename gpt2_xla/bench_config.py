"""Every option of the benchmarks, declared once, as config.py does for the training commands."""

from dataclasses import dataclass
from typing import Literal

from gpt2_xla.config import ModelConfig, OptimConfig, TorchDeviceConfig, option


@dataclass(frozen=True)
class DataBenchConfig:
    """Timing the preparation of data"""

    sample: str = option("../shared/data/web_sample", "folder of parquet files whose pages are the web text")
    megabytes: int = option(200, "text to prepare, in MB of UTF-8, no document twice")
    tokenizer: str = option("gpt2", "a tiktoken name")
    workers: tuple[int, ...] = option((1, 2), "values of --num-workers to time")


@dataclass(frozen=True)
class BenchOptions:
    """What to measure"""

    runtimes: tuple[Literal["torch", "xla"], ...] = option(("torch",), "entry points to measure")
    against: Literal["none", "bare"] = option(
        "none",
        "bare: also a loop of a page on the same device, model, optimizer and batch, in turns with ours (torch: nanoGPT's way, in a process of its own; xla: a tutorial's, in ours)",
    )
    bare_precisions: tuple[Literal["same", "no", "bf16", "fp16"], ...] = option(
        ("same",), "values of --mixed-precision to give the bare torch loop, one after the other; same: ours"
    )
    bare_models: tuple[Literal["eager", "compiled"], ...] = option(
        ("eager",), "whether the bare torch loop compiles its model with torch.compile"
    )
    train_batch_size: int = option(4, "sequences per micro-step of each process")
    gradient_accum_step: int = option(1, "micro-steps per optimizer step")
    turns: int = option(10, "turns that each loop takes, after 3 steps that warm it up; medians over them are told")
    steps: int = option(10, "optimizer steps of a turn")
    breakdown: bool = option(
        False, "also the parts of our step on torch, in a last turn under torch.profiler: data, forward, backward, …"
    )
    processes: tuple[int, ...] = option(
        (1,),
        "numbers of processes (torchrun's) to run our loop with, in turns; each process has its share of the CPU's cores as threads, unless OMP_NUM_THREADS says otherwise",
    )


@dataclass(frozen=True)
class BenchConfig:
    """Options of scripts/bench.py."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    runtime: TorchDeviceConfig = TorchDeviceConfig()
    bench: BenchOptions = BenchOptions()


@dataclass(frozen=True)
class GenerationBenchOptions:
    """What to measure"""

    precisions: tuple[Literal["fp32", "bf16"], ...] = option(("fp32", "bf16"), "precisions of the weights to measure")
    batch_sizes: tuple[int, ...] = option((1, 8), "texts to continue side by side")
    prompt_tokens: int = option(32, "tokens of each prompt")
    new_tokens: int = option(256, "tokens to add")
    turns: int = option(3, "times that each way is timed, in turns; medians are told")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option("auto", "device")


@dataclass(frozen=True)
class GenerationBenchConfig:
    """Options of scripts/bench_generate.py."""

    model: ModelConfig = ModelConfig()
    bench: GenerationBenchOptions = GenerationBenchOptions()


@dataclass(frozen=True)
class SavingBenchOptions:
    """What to measure"""

    saves: int = option(3, "saves to take the median of, after one that allocates memory")
    train_batch_size: int = option(1, "sequences per step")
    folder: str | None = option(None, "folder on the disk to measure; default: that of temporary files")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option("auto", "device that holds the state")


@dataclass(frozen=True)
class SavingBenchConfig:
    """Options of scripts/bench_checkpoint.py."""

    model: ModelConfig = ModelConfig()
    bench: SavingBenchOptions = SavingBenchOptions()


@dataclass(frozen=True)
class BenchLoaderConfig:
    """What to measure"""

    seq_lengths: tuple[int, ...] = option((64, 256, 1024), "sequence lengths T to measure")
    shards: int = option(100, "shards per folder, as sparse files in the temporary folder")
    shard_size: int = option(100_000_000, "tokens per shard")
    tokens_per_step: int = option(16_384, "tokens of one process's batch")
    seek_step: int = option(1_000_000, "step at which reading starts")
    seconds: float = option(2.0, "time to read for, before the same steps are read again and timed")
