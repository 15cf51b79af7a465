"""Every option of the scripts and of generate.py, declared once, as config.py does for the training commands."""

from dataclasses import dataclass
from typing import Literal

from gpt2_xla.config import ModelConfig, XlaPretrainConfig, option

OUTPUT_DIR = "folder that receives train/ and valid/"


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
    dedup: Literal["no", "exact"] = option(
        "no",
        "exact drops documents whose text came before, byte for byte; else a text that comes twice may be in train/ and valid/",
    )
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
class GenerateConfig:
    """Generation"""

    model: str = option(
        "runs/gpt2",
        "checkpoint folder, run folder (its newest good checkpoint), Hugging Face folder, or name on the hub such as gpt2-medium",
    )
    tokenizer: str | None = option(
        None, "bytes, a tiktoken name, or a Hugging Face tokenizer; default: the one recorded in the checkpoint"
    )
    prompt: str | None = option(None, "text to continue; without it, an interactive prompt")
    prompt_file: str | None = option(
        None, "UTF-8 file of prompts, one a line, blank lines skipped; - reads standard input"
    )
    num_samples: int = option(
        1, "continuations of each prompt; number n, from 0, is what --num-samples 1 writes with --seed plus n"
    )
    batch_size: int = option(8, "continuations computed side by side")
    max_new_tokens: int = option(128, "tokens to add at most; ends earlier at end-of-text")
    temperature: float = option(0.8, "divides the logits; 0 always takes the most likely token")
    top_k: int = option(0, "sample among the k most likely tokens; 0: among all")
    top_p: float = option(
        1.0, "sample among the fewest tokens whose probabilities reach p; 1: among all, 0: only the most likely"
    )
    min_p: float = option(
        0.0, "sample among the tokens at least p times as likely as the most likely one; 0: among all"
    )
    repetition_penalty: float = option(
        1.0,
        "make tokens of the text so far less likely: positive logits are divided by this, negative ones multiplied; 1: no change",
    )
    seed: int = option(1337, "seed of the sampling")
    json: bool = option(
        False,
        "print one JSON object a line for each continuation: prompt, text, prompt_tokens, tokens, finish_reason (length, end_of_text), seed",
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "precision of weights and matmuls; tokens are drawn in float32")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu", "xla"] = option(
        "auto",
        "device; auto takes the accelerator that torch finds, else the CPU; xla is the first device of PJRT_DEVICE, where each length of prompts, up to the next power of two, is compiled once",
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation"""

    model: tuple[str, ...] = option(
        ("runs/gpt2",),
        "models to compare: checkpoint folders, run folders (their newest good checkpoint), Hugging Face folders, or names on the hub such as gpt2-medium",
    )
    data: str | None = option(
        None, "folder of token shards whose loss is measured, such as data/pydoc/valid, or the one above it"
    )
    valid_steps: int | None = option(
        None, "measure the first N batches of --eval-batch-size sequences only; default: the whole of --data"
    )
    eval_batch_size: int = option(8, "sequences at a time, over all processes; changes speed, not the result")
    seq_length: int | None = option(None, "tokens of context; default: each model's own")
    task: Literal["hellaswag"] | None = option(
        None, "multiple-choice questions: choose the ending that is most likely after the context"
    )
    file: str | None = option(
        None, "questions of --task, a .jsonl file as it was published; default: the hub's validation split"
    )
    limit: int | None = option(None, "only the first N questions of --task")
    tokenizer: str | None = option(
        None,
        "tokenizer for --task: bytes, a tiktoken name, or a Hugging Face one; default: the one recorded in each model",
    )
    mixed_precision: Literal["no", "bf16"] = option("no", "matmul precision; the loss stays float32")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "device; auto takes the accelerator that torch finds, else the CPU"
    )
    json: bool = option(False, "print JSON, with all digits, instead of tables")


@dataclass(frozen=True)
class ExportConfig:
    """Export"""

    model: str = option(
        "runs/gpt2",
        "checkpoint folder, run folder (its newest good checkpoint), Hugging Face folder, or name on the hub; may stand without its flag",
    )
    output: str | None = option(None, "folder to write, which must not exist or be empty; may stand without its flag")
    tokenizer: str | None = option(
        None, "bytes, a tiktoken name, or a Hugging Face tokenizer; default: the one recorded in the checkpoint"
    )


@dataclass(frozen=True)
class InspectConfig:
    """Inspecting data"""

    data: str | None = option(
        None,
        "folder of token shards, such as data/pydoc/train, or a bad_batch-STEP.safetensors of a run; may stand without its flag",
    )
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
class CompareRunsConfig:
    """Comparing runs"""

    runs: tuple[str, ...] = option(
        (), "groups of run folders, each NAME=RUN,RUN,…; the first is what others are held against"
    )
    picture: str | None = option(None, "also draw the curves into this file (.png, .svg, .pdf)")


@dataclass(frozen=True)
class VerifyRunConfig:
    """Verifying a run's data order"""

    run: str | None = option(None, "run folder (a --checkpoints-dir); may stand without its flag")
    train_dir: tuple[str, ...] = option(
        (), "where the training data is now, as the training commands take it; default: where config.json says"
    )
    tokens: bool = option(
        True,
        "also read again what rank 0 read, and compare the hash of its tokens; --no-tokens only the windows' hashes",
    )


@dataclass(frozen=True)
class ChaosConfig:
    """Chaos"""

    trials: int = option(10, "trials to run; trial number i has the seed --seed + i")
    seed: int = option(0, "decides the faults and the moments of the first trial; --trials 1 repeats one of them")
    runtimes: tuple[Literal["torch", "torchrun", "xla", "xla-replicas"], ...] = option(
        ("torch",),
        "what to hurt, in turns: run_pretrain.py alone, or two of it under torchrun; run_pretrain_xla.py on CPU, or with two replicas",
    )
    faults: tuple[str, ...] = option(
        (),
        "faults to choose from: SIGKILL, SIGKILL-first, SIGTERM, SIGINT, SIGUSR1, preempt, truncate, flip, delete, full-disk (needs root: it mounts a tmpfs), kill-replica, stop-replica; default: all",
    )
    minutes: float = option(30.0, "time limit for all trials together; none begins after it")
    trial_seconds: float = option(
        150.0,
        "time limit for a trial, or 15 times an uninterrupted run where that takes longer; what has not ended by then has failed, and is killed",
    )
    folder: str | None = option(None, "folder to work in; default: that of temporary files")
    json: bool = option(False, "print the trials as JSON instead of a table; their lines go to standard error")


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


@dataclass(frozen=True)
class HloOptions:
    """What to export and run"""

    export: str | None = option(
        None, "write the step to this new folder, with its first arrays and torch_xla's losses, and run nothing"
    )
    folder: str | None = option(
        None,
        "run the step of this folder, as --export wrote it: jax, numpy and safetensors are enough, and no torch_xla",
    )
    steps: int = option(5, "steps to run; the exported learning rates and dropout seeds are of as many")
    train_batch_size: int = option(8, "sequences per micro-step, of random tokens, the same in each step")
    gradient_accum_step: int = option(1, "micro-steps per optimizer step")
    mixed_precision: Literal["no", "bf16"] = option("bf16", "matmul precision of the step")
    json: bool = option(False, "print JSON instead of text")


@dataclass(frozen=True)
class HloConfig:
    """Options of scripts/run_hlo.py."""

    model: ModelConfig = ModelConfig()
    step: HloOptions = HloOptions()


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
    find_settings: bool = option(
        False,
        "find, among those that make the step fit each slice, the --activation-checkpointing, --loss-chunk and --attention of the lowest bound, or else more micro-steps of fewer sequences; the sequences of a step stay, and so does what the command gives",
    )
    compare: tuple[str, ...] = option(
        (),
        "also plan the step with these options changed, and print a table: each value is NAME=VALUE words, as in reference loss-chunk=0 'num-heads=6 train-batch-size=128', or levers for all that changes memory and speed",
    )
    reference: bool = option(
        False,
        "plan the step that is to beat instead: masked softmax over all T x T scores, LayerNorm written out, all float32 logits at once",
    )
    json: bool = option(False, "print JSON instead of text")
    time_limit: int = option(1200, "seconds for one compilation; what has not ended by then is killed and reported")
    jobs: int | None = option(None, "compilations at a time; default: as many as cores and memory allow")
    plan_cache: str = option("~/.cache/gpt2_xla/tpu_plan", "folder that keeps what the compiler said")


@dataclass(frozen=True)
class PlanConfig(XlaPretrainConfig):
    """Options of scripts/plan_tpu.py."""

    plan: PlanOptions = PlanOptions()
