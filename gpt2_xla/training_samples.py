"""Text from the model in training (--sample-interval): what it writes, beside what it scores.

Every replica writes the same sample at the same step, though only rank 0's is kept: the replicas' programs stay alike.
Nothing of the training is touched: no dropout, no random number but from a generator of its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gpt2_xla.character_stream import whole_text
from gpt2_xla.config import PretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.decoding import Decoder, Machine, generate
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.compile_watch import CompileWatch
from gpt2_xla.sampling import Sampling
from gpt2_xla.tokenizer import Tokenizer
from gpt2_xla.training_log import TrainingLog

if TYPE_CHECKING:
    from gpt2_xla.train import Run

SAMPLING = Sampling(temperature=0.8, top_k=50)


@dataclass(frozen=True)
class SamplePrompt:
    """What a sample continues."""

    text: str
    tokens: list[int]
    tokenizer: Tokenizer


def sample_prompt(config: PretrainConfig, data: PretrainingData) -> SamplePrompt | None:
    """--sample-prompt in the data's tokens; None without --sample-interval. Raises `UserError` if it can't be."""
    if not config.logging.sample_interval or config.run.do_test:
        return None
    tokenizer = data.tokenizer()
    text, room = config.logging.sample_prompt, config.model.seq_length + 1 - config.sample_tokens
    tokens = tokenizer.encode(text) or [tokenizer.end_of_text]
    if len(tokens) > room:  # the window would slide, and that costs a whole context for each token
        raise UserError(
            f"--sample-prompt has {len(tokens)} tokens, which --sample-tokens {config.sample_tokens} and "
            f"--seq-length {config.model.seq_length} leave no room for; shorten it, or use a smaller --sample-tokens"
        )
    return SamplePrompt(text, tokens, tokenizer)


class TrainingSamples(Protocol):
    """Asked after every step."""

    def after_step(self, step: int) -> None:
        """Write a sample if one is due after optimizer step number `step`."""
        ...


class NoSamples:
    """Without --sample-interval."""

    def after_step(self, step: int) -> None:
        """Nothing."""


def open_samples(run: "Run", log: TrainingLog, watch: CompileWatch) -> TrainingSamples:
    """The samples that the configuration asks for."""
    return Samples(run, run.sample_prompt, log, watch) if run.sample_prompt is not None else NoSamples()


class Samples:
    """Writes a record of kind "sample" every --sample-interval steps."""

    def __init__(self, run: "Run", prompt: SamplePrompt, log: TrainingLog, watch: CompileWatch) -> None:
        self._run, self._prompt, self._log, self._watch = run, prompt, log, watch
        runtime = run.runtime
        machine = Machine(runtime.device, runtime.compiles, runtime.end_step, runtime.autocast)
        self._decoder = Decoder(run.model, machine, 1, run.config.sample_tokens)

    def after_step(self, step: int) -> None:
        if step % self._run.config.logging.sample_interval:
            return
        self._log.pause()
        was_training = self._run.forward.training
        self._run.forward.eval()
        try:
            tokens = self._draw(step)
        except UserError as error:  # a model that has diverged is the step guard's business
            self._run.metrics.say(f"no sample at step {step}: {error}")
        else:
            record = {
                "prompt": self._prompt.text,
                "text": whole_text(self._prompt.tokenizer, tokens),
                "tokens": len(tokens),
            }
            self._run.metrics.write({"kind": "sample", "step": step, **record})
        self._run.forward.train(was_training)
        self._watch.worked("sampling", step)
        self._log.resume()

    def _draw(self, step: int) -> list[int]:
        """Always as many tokens, end-of-text or not: the first sample runs, and so compiles, all that later ones will."""
        config, tokenizer = self._run.config, self._prompt.tokenizer
        tokens = []
        for drawn in generate(
            self._decoder,
            [self._prompt.tokens],
            [config.run.seed],
            config.sample_tokens,
            SAMPLING,
            vocab_size=tokenizer.vocab_size,
        ):
            self._run.phases.mark("sample", step)
            assert drawn.token is not None
            tokens.append(drawn.token)
        end = tokenizer.end_of_text
        return tokens[: tokens.index(end)] if end in tokens else tokens
