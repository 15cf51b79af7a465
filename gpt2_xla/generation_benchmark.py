"""How fast text is generated: with the cache, by computing the whole prefix again for each token, and by transformers."""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2_xla import hf
from gpt2_xla.bench_config import GenerationBenchConfig
from gpt2_xla.decoding import Decoder, Machine, generate
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT, build_model
from gpt2_xla.model_validation import model_mistakes
from gpt2_xla.runtime.torch_runtime import pick_accelerator
from gpt2_xla.sampling import Sampling

EVERY = 32  # tokens of which one is timed where each computes the whole prefix again
WARM_UP_TOKENS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One line of the table: tokens/s of all rows of the batch together, medians over the turns."""

    precision: str
    batch: int
    ours: float
    transformers: float
    again: float
    same_tokens: float  # share of ours and transformers' tokens that agree up to where a row first differs


def bench(config: GenerationBenchConfig) -> Iterator[Row]:
    """Measure every precision and batch size on one model with random weights; raises `UserError` if it can't."""
    options = config.bench
    numbers = [
        ("--prompt-tokens", options.prompt_tokens),
        ("--new-tokens", options.new_tokens),
        ("--turns", options.turns),
        *(("--batch-sizes", size) for size in options.batch_sizes),
    ]
    mistakes = [f"{flag} {value} must be at least 1" for flag, value in numbers if value < 1]
    if options.prompt_tokens + options.new_tokens > config.model.seq_length:
        mistakes.append(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} are more than --seq-length "
            f"{config.model.seq_length} together; past the context every way computes everything again"
        )
    mistakes += model_mistakes(config.model)
    if hf.counterpart(config.model) is None:
        mistakes.append(f"there is nothing to compare with: {hf.exports_to(config.model)}")
    try:
        import transformers
    except ImportError:
        mistakes.append("transformers is not installed; pip install -r tests/requirements.txt -c constraints.txt")
    if mistakes:
        raise UserError(mistakes)
    device = torch.device(pick_accelerator(options.device))
    model = build_model(config.model, 0, seed=0).eval()
    their_config = transformers.AutoConfig.for_model(**hf.hugging_face_config(config.model, None))
    theirs = transformers.AutoModelForCausalLM.from_config(their_config).eval()
    weights = hf.to_hugging_face(dict(model.state_dict()), config.model)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert {*missing, *unexpected} <= {"lm_head.weight"}, (missing, unexpected)  # that of a tied one
    theirs.tie_weights()
    for precision in options.precisions:
        for part in (model, theirs):
            part.to(device, DTYPES[precision])
        for batch in options.batch_sizes:
            generator = torch.Generator().manual_seed(batch)
            prompts = torch.randint(config.model.vocabulary, (batch, options.prompt_tokens), generator=generator)
            ways = _Ways(model, theirs, Machine(device), prompts, options.new_tokens)
            yield _measure(ways, precision, options.turns)


@dataclass(frozen=True)
class _Ways:
    """The same prompts (B, T) continued greedily, without an end, in three ways; each returns seconds and tokens (B, N)."""

    model: GPT
    theirs: torch.nn.Module
    machine: Machine
    prompts: Tensor
    count: int

    def ours(self) -> tuple[float, Tensor]:
        prompts, texts = self.prompts.tolist(), [[] for _ in self.prompts]  # type: ignore[var-annotated]
        start = time.perf_counter()
        decoder = Decoder(self.model, self.machine, len(prompts), self.count)
        for drawn in generate(decoder, prompts, range(len(prompts)), self.count, Sampling(temperature=0)):
            texts[drawn.row].append(drawn.token)
        return time.perf_counter() - start, torch.tensor(texts)

    def transformers(self) -> tuple[float, Tensor]:
        start = time.perf_counter()
        prompts = self.prompts.to(self.machine.device)
        made = self.theirs.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=self.count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).cpu()
        return time.perf_counter() - start, made[:, self.prompts.shape[1] :]

    def again(self, written: Tensor, lengths: Sequence[int] | None = None) -> float:
        """Seconds for all tokens, from one in `EVERY`, where each computes the logits of the whole prefix again."""
        seconds = []
        for length in lengths or range(min(EVERY, self.count) // 2, self.count, EVERY):
            prefix = torch.cat([self.prompts, written[:, :length]], dim=1)
            start = time.perf_counter()
            with torch.inference_mode():
                self.model(prefix.to(self.machine.device))[:, -1].float().cpu().argmax(dim=-1)
            seconds.append(time.perf_counter() - start)
        return self.count * statistics.fmean(seconds)


def _measure(ways: _Ways, precision: str, turns: int) -> Row:
    brief = dataclasses.replace(ways, count=WARM_UP_TOKENS)
    brief.ours(), brief.transformers(), ways.again(brief.prompts[:, :0], lengths=[0])
    taken: dict[str, list[float]] = {"ours": [], "transformers": [], "again": []}
    for _ in range(turns):  # in turns, so that what else the machine does hurts all alike
        seconds, written = ways.ours()
        taken["ours"].append(seconds)
        seconds, theirs = ways.transformers()
        taken["transformers"].append(seconds)
        taken["again"].append(ways.again(written))
    agreeing = (written == theirs).long().cumprod(dim=1).float().mean()
    rates = {name: written.numel() / statistics.median(seconds) for name, seconds in taken.items()}
    return Row(precision, len(written), rates["ours"], rates["transformers"], rates["again"], float(agreeing))


def machine_text(config: GenerationBenchConfig) -> str:
    """Where this was measured, and with what."""
    import transformers

    device = pick_accelerator(config.bench.device)
    return (
        f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; prompts of {config.bench.prompt_tokens} tokens, {config.bench.new_tokens} new ones"
    )


HEADER = """\
| precision | batch | with the cache | transformers' generate | whole prefix again | against the prefix | against transformers | same tokens |
|---|---|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    """The row as a line of a Markdown table under `HEADER`."""
    cells = [
        row.precision,
        str(row.batch),
        f"{row.ours:,.1f}",
        f"{row.transformers:,.1f}",
        f"{row.again:,.2f}",
        f"{row.ours / row.again:.1f} ×",
        f"{row.ours / row.transformers:.2f} ×",
        f"{row.same_tokens:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"
