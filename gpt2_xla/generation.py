"""generate.py's work: check the options, load a checkpoint and its tokenizer, stream text."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from gpt2_xla import checkpoint, loading, sampling
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.runtime.torch_runtime import pick_accelerator
from gpt2_xla.script_config import GenerateConfig
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Writer:
    """A model, its tokenizer and the random numbers: all that continuing a text takes."""

    model: GPT
    tokenizer: Tokenizer
    config: GenerateConfig
    generator: torch.Generator

    def write(self, prompt: str) -> None:
        """Print the prompt and its continuation, whole characters as they come, and a line's end.

        An empty prompt starts from end-of-text, as a document does. The model sees the last `seq_length` tokens.
        """
        tokens = self.tokenizer.encode(prompt)
        context = self.model.config.seq_length
        if not tokens:
            note("the prompt is empty; starting from end-of-text")
            tokens = [self.tokenizer.end_of_text]
        elif len(tokens) > context:
            note(f"the prompt has {len(tokens):,} tokens; the model sees the last {context:,}")
        options = sampling.Sampling(self.config.temperature, self.config.top_k, self.config.top_p)
        stream = sampling.CharacterStream(self.tokenizer)
        _print(prompt)
        for token in sampling.generate(
            self.model,
            tokens,
            self.config.max_new_tokens,
            options,
            self.generator,
            self.tokenizer.end_of_text,
            self.tokenizer.vocab_size,
        ):
            _print(stream.push(token))
        _print(stream.finish() + "\n")


def run(config: GenerateConfig) -> None:
    """Continue --prompt, or each line typed at the `>> ` prompt; raises UserError with all mistakes together."""
    writer = prepare(config)
    if config.prompt is not None:
        writer.write(config.prompt)
    else:
        interact(writer)


def interact(writer: Writer) -> None:
    """Continue each line typed; an empty line asks again, Ctrl-D and Ctrl-C end."""
    try:
        while True:
            prompt = input(">> ")
            if prompt:
                writer.write(prompt)
    except (EOFError, KeyboardInterrupt):
        _print("\n")


def prepare(config: GenerateConfig) -> Writer:
    """Load what the options name; raises UserError with every mistake of theirs, before the weights are read."""
    mistakes = check(config)
    device = _try(lambda: pick_accelerator(config.device), mistakes)
    folder = _try(lambda: _resolve(config.model), mistakes)
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = _try(lambda: load_tokenizer(str(config.tokenizer)), mistakes)
    elif folder is not None:
        tokenizer = _try(lambda: recorded_tokenizer(folder), mistakes)
    if folder is not None and tokenizer is not None:
        mistakes += check_tokenizer(tokenizer, folder)
    if mistakes or device is None or folder is None or tokenizer is None:
        raise UserError(mistakes)
    return Writer(load_model(folder, device), tokenizer, config, torch.Generator().manual_seed(config.seed))


def check(config: GenerateConfig) -> list[str]:
    """The mistakes in the numbers."""
    wrong = []
    if config.max_new_tokens < 1:
        wrong.append(f"--max-new-tokens {config.max_new_tokens} is below 1")
    if not (config.temperature >= 0 and math.isfinite(config.temperature)):
        wrong.append(
            f"--temperature {config.temperature} is not a number from 0 (always the most likely token) upwards"
        )
    if config.top_k is not None and config.top_k < 1:
        wrong.append(f"--top-k {config.top_k} is below 1; leave it out to sample among all tokens")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        wrong.append(f"--top-p {config.top_p} is not above 0 and at most 1")
    if not 0 <= config.seed < 2**63:
        wrong.append(f"--seed {config.seed} is not between 0 and 2^63 - 1")
    return wrong


def _try(make: Callable[[], Result], mistakes: list[str]) -> Result | None:
    """The result, or None with the mistakes noted."""
    try:
        return make()
    except UserError as error:
        mistakes += error.mistakes
        return None


def _resolve(model: str) -> Path:
    try:
        return checkpoint.resolve(model)
    except UserError as error:
        raise UserError([f"--model {mistake}" for mistake in error.mistakes]) from error


def recorded_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: the tokenizer.json in it, else the one that its state names."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder))
    name = checkpoint.read_state(folder).tokenizer if checkpoint.has_state(folder) else None
    if name is None:
        raise UserError(f"--model {folder} records no tokenizer; name one with --tokenizer")
    return load_tokenizer(name)


def check_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """The mistake of a tokenizer with more ids than the model; warns of one that the model was not trained with."""
    try:
        vocabulary = checkpoint.read_model_config(folder).vocabulary
    except UserError as error:
        return list(error.mistakes)
    if tokenizer.vocab_size > vocabulary:
        return [
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens, but the model of {folder} knows {vocabulary:,}; "
            f"use the tokenizer that it was trained with"
        ]
    state = checkpoint.read_state(folder) if checkpoint.has_state(folder) else None
    if state is not None and state.tokenizer_hash not in (None, tokenizer.hash):
        note(
            f"tokenizer {tokenizer.name} is not the one that the model was trained with ({state.tokenizer}); "
            f"the text may be nonsense",
            kind="warning",
        )
    return []


def load_model(folder: Path, device: str | torch.device) -> GPT:
    """The model of a checkpoint or of a Hugging Face folder, on the device, in evaluation mode; raises UserError."""
    checkpoint.read_weights(
        folder
    )  # a config.json that tells of a larger model than the file holds is no model to build
    with torch.device("meta"):  # no time spent on initial weights that would be overwritten
        model = GPT(checkpoint.read_model_config(folder))
    model.to_empty(device=device)
    model.tie_weights()
    loading.load(model, folder)
    return model.eval()


def note(sentence: str, kind: str = "note") -> None:
    """A line on standard error, so that standard output is text alone."""
    print(f"{kind}: {sentence}", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    print(text, end="", flush=True)
