"""Prompts → their continuations, as text that streams, as blocks under headers, or as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpt2_xla.character_stream import CharacterStream, whole_text
from gpt2_xla.decoding import Decoder, Drawn, Finish, Machine, generate
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.notes import note
from gpt2_xla.sampling import Sampling
from gpt2_xla.script_config import GenerateConfig
from gpt2_xla.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """One continuation of one prompt."""

    prompt: str
    text: str  # the continuation alone
    prompt_tokens: int
    tokens: int  # of the continuation
    finish_reason: Finish
    seed: int  # --num-samples 1 with this seed writes the same


@dataclass(frozen=True)
class _Row:
    prompt: str
    tokens: list[int]
    seed: int


@dataclass(frozen=True)
class Writer:
    """A model, its tokenizer and the options: all that continuing texts takes."""

    model: GPT
    tokenizer: Tokenizer
    config: GenerateConfig
    machine: Machine

    def write(self, prompts: Sequence[str], first_seed: int) -> None:
        """Print every prompt with its continuations: as characters come if there is only one, else each when it is done.

        Sample number n of every prompt is drawn with the seed `first_seed` + n, counted from 0. Raises UserError for a
        prompt with tokens that the model does not know.
        """
        rows = self._rows(prompts, first_seed)
        if self.config.json:
            for sample in self._samples(rows):
                _print(json.dumps(vars(sample), ensure_ascii=False) + "\n")
        elif len(rows) == 1:
            self._stream(rows[0])
        else:
            for number, sample in enumerate(self._samples(rows)):
                prompt, which = divmod(number, self.config.num_samples)
                title = [f"prompt {prompt + 1}"] if len(prompts) > 1 else []
                title += [f"sample {which + 1}"] if self.config.num_samples > 1 else []
                ended = ", ended by itself" if sample.finish_reason == "end_of_text" else ""
                _print(f"--- {', '.join(title)}: seed {sample.seed}, {sample.tokens} tokens{ended}\n")
                _print(f"{sample.prompt}{sample.text}\n\n")

    def _rows(self, prompts: Sequence[str], first_seed: int) -> list[_Row]:
        rows, mistakes = [], []
        context, vocabulary = self.model.config.seq_length, self.model.config.vocabulary
        for number, prompt in enumerate(prompts, start=1):
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            tokens = self.tokenizer.encode(prompt)
            if not tokens:
                note(f"{name} is empty; starting from end-of-text")
                tokens = [self.tokenizer.end_of_text]
            elif len(tokens) > context:
                note(f"{name} has {len(tokens):,} tokens; the model sees the last {context:,}")
            if max(tokens) >= vocabulary:
                mistakes.append(
                    f"{name} has token {max(tokens)}, but the model's vocabulary ends at {vocabulary - 1}; "
                    "use the tokenizer that it was trained with"
                )
            rows += [_Row(prompt, tokens, (first_seed + n) % 2**63) for n in range(self.config.num_samples)]
        if mistakes:
            raise UserError(mistakes)
        return rows

    def _stream(self, row: _Row) -> None:
        stream = CharacterStream(self.tokenizer)
        _print(row.prompt)
        for drawn in self._generate([row], 1):
            if drawn.token is not None:
                _print(stream.push(drawn.token))
        _print(stream.finish() + "\n")

    def _samples(self, rows: list[_Row]) -> Iterator[Sample]:
        """Samples in the order of the rows, each as soon as those before it are done too."""
        at_once = min(self.config.batch_size, len(rows))
        for first in range(0, len(rows), at_once):
            batch = rows[first : first + at_once]
            texts: list[list[int]] = [[] for _ in batch]
            done: dict[int, Sample] = {}
            told = 0
            for drawn in self._generate(batch, at_once):
                if drawn.token is not None:
                    texts[drawn.row].append(drawn.token)
                if drawn.finish is not None:
                    done[drawn.row] = self._sample(batch[drawn.row], texts[drawn.row], drawn.finish)
                while told in done:
                    yield done[told]
                    told += 1

    def _sample(self, row: _Row, tokens: list[int], finish: Finish) -> Sample:
        return Sample(row.prompt, whole_text(self.tokenizer, tokens), len(row.tokens), len(tokens), finish, row.seed)

    def _generate(self, rows: list[_Row], at_once: int) -> Iterator[Drawn]:
        config = self.config
        return generate(
            Decoder(self.model, self.machine, at_once, config.max_new_tokens),
            [row.tokens for row in rows],
            [row.seed for row in rows],
            config.max_new_tokens,
            Sampling(config.repetition_penalty, config.temperature, config.top_k, config.top_p, config.min_p),
            self.tokenizer.end_of_text,
            self.tokenizer.vocab_size,
        )


def _print(text: str) -> None:
    print(text, end="", flush=True)
