"""generate.py's work: check the options, load a checkpoint and its tokenizer, continue what was asked."""

import math
from pathlib import Path

import torch

from gpt2_xla import checkpoint, loading, pretrained
from gpt2_xla.decoding import Machine
from gpt2_xla.errors import UserError, attempt
from gpt2_xla.model import GPT
from gpt2_xla.notes import note
from gpt2_xla.prompts import given_prompts
from gpt2_xla.runtime.torch_runtime import pick_accelerator
from gpt2_xla.runtime.xla_installation import installation_mistakes
from gpt2_xla.script_config import GenerateConfig
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer
from gpt2_xla.writer import Writer


def run(config: GenerateConfig) -> None:
    """Continue --prompt or those of --prompt-file, or each line typed; raises UserError with all mistakes together."""
    mistakes = check(config)
    prompts = attempt(lambda: given_prompts(config.prompt, config.prompt_file), mistakes)
    writer = prepare(config, mistakes)
    if prompts is not None:
        writer.write(prompts, config.seed)
    else:
        interact(writer)


def interact(writer: Writer) -> None:
    """Continue each line typed; an empty line asks again, Ctrl-D and Ctrl-C end. Each prompt takes seeds of its own."""
    seed = writer.config.seed
    try:
        while True:
            prompt = input(">> ")
            if prompt:
                writer.write([prompt], seed)
                seed += writer.config.num_samples
    except (EOFError, KeyboardInterrupt):
        print(flush=True)


def prepare(config: GenerateConfig, mistakes: list[str]) -> Writer:
    """Load what the options name; raises UserError with every mistake, those found before included, before weights are read."""
    machine = attempt(lambda: open_machine(config.device), mistakes)
    found = attempt(lambda: pretrained.find_model(config.model), mistakes)
    folder, model_config = found or (None, None)
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = attempt(lambda: load_tokenizer(str(config.tokenizer)), mistakes)
    elif folder is not None:
        tokenizer = attempt(lambda: recorded_tokenizer(folder), mistakes)
    if folder is not None and model_config is not None and tokenizer is not None:
        mistakes += check_tokenizer(tokenizer, folder, model_config.tokens_known)
    if mistakes or machine is None or folder is None or tokenizer is None:
        raise UserError(mistakes)
    model = load_model(folder, machine.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return Writer(model, tokenizer, config, machine)


def open_machine(device: str) -> Machine:
    """What --device names; raises UserError if this machine lacks it."""
    if device != "xla":
        return Machine(torch.device(pick_accelerator(device)))
    if mistakes := installation_mistakes():
        raise UserError([f"--device xla: {mistake}" for mistake in mistakes])
    from gpt2_xla.runtime.xla_generation import xla_machine

    return xla_machine()


def check(config: GenerateConfig) -> list[str]:
    """The mistakes in the numbers, and in what goes with what."""
    wrong = [
        f"{flag} {value} is below 1"
        for flag, value in (
            ("--max-new-tokens", config.max_new_tokens),
            ("--num-samples", config.num_samples),
            ("--batch-size", config.batch_size),
        )
        if value < 1
    ]
    if not 0 <= config.temperature < math.inf:
        wrong.append(
            f"--temperature {config.temperature} is not a number from 0 (always the most likely token) upwards"
        )
    if config.top_k < 0:
        wrong.append(f"--top-k {config.top_k} is below 0, which samples among all tokens")
    if not 0 <= config.top_p <= 1:
        wrong.append(f"--top-p {config.top_p} is not from 0 (only the most likely token) to 1 (all tokens)")
    if not 0 <= config.min_p <= 1:
        wrong.append(f"--min-p {config.min_p} is not from 0 (all tokens) to 1 (only the most likely one)")
    if not 0 < config.repetition_penalty < math.inf:
        wrong.append(f"--repetition-penalty {config.repetition_penalty} is not a number above 0; 1 changes nothing")
    if not 0 <= config.seed < 2**63:
        wrong.append(f"--seed {config.seed} is not between 0 and 2^63 - 1")
    if config.json and config.prompt is None and config.prompt_file is None:
        wrong.append("--json needs --prompt or --prompt-file")
    return wrong


def recorded_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: the tokenizer.json in it, else the one that its state names."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder))
    name = checkpoint.read_state(folder).tokenizer if checkpoint.has_state(folder) else None
    if name is None:
        raise UserError(f"--model {folder} records no tokenizer; name one with --tokenizer")
    return load_tokenizer(name)


def check_tokenizer(tokenizer: Tokenizer, folder: Path, known: int) -> list[str]:
    """The mistake of a tokenizer with more ids than the model; warns of one that the model was not trained with."""
    if tokenizer.vocab_size > known:
        return [
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens, but the model of {folder} knows {known:,}; "
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


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a checkpoint or of a Hugging Face folder, on the device, in evaluation mode; raises UserError."""
    checkpoint.read_weights(folder)  # no model is built that a config.json tells of and the file does not hold
    with torch.device("meta"):  # no time spent on initial weights that would be overwritten
        model = GPT(checkpoint.read_model_config(folder))
    model.to_empty(device="cpu")
    model.tie_weights()
    loading.load(model, folder)
    model.to(device, dtype)
    model.tie_weights()  # a move to an XLA device makes two tensors of a tied one
    return model.eval()
