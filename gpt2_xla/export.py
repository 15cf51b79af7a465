"""scripts/export_hf.py's work: a checkpoint as a clean folder that `transformers` loads, with the run's numbers on its card."""

import json
import math
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2_xla import checkpoint, hf, pretrained, tensor_files
from gpt2_xla.checkpoint import TrainerState
from gpt2_xla.config import ModelConfig
from gpt2_xla.durable_files import flush
from gpt2_xla.errors import UserError, attempt
from gpt2_xla.evaluate import perplexity
from gpt2_xla.generation import recorded_tokenizer
from gpt2_xla.script_config import ExportConfig
from gpt2_xla.shares import whole_shares
from gpt2_xla.tensor_files import DTYPE_NAMES
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer
from gpt2_xla.tokenizer_export import write_tokenizer

HF_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export(config: ExportConfig) -> Path:
    """Write the folder --output and return it; it appears whole or not at all. Raises UserError with all mistakes together."""
    mistakes: list[str] = []
    output = _output_folder(config, mistakes)
    found, tokenizer = attempt(lambda: pretrained.find_model(config.model), mistakes), None
    folder, model = found or (None, None)
    if folder is not None and model is not None:
        try:
            if hf.counterpart(model) is None:
                raise UserError(f"--model {config.model} can't be exported, it has {hf.exports_to(model)}")
            tokenizer = _tokenizer(config, folder, model.tokens_known)
            checkpoint.read_weights(folder)
        except UserError as error:
            mistakes += error.mistakes
    if mistakes or output is None or folder is None or tokenizer is None:
        raise UserError(mistakes)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        _fill(partial, folder, tokenizer, config.model, output)
        partial.replace(output)  # over an empty folder, if there is one
        flush(output.parent)
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _output_folder(config: ExportConfig, mistakes: list[str]) -> Path | None:
    if config.output is None:
        mistakes.append("no folder to write was named: python scripts/export_hf.py CHECKPOINT OUT")
        return None
    output = Path(os.path.abspath(config.output))  # noqa: PTH100 - resolve() would follow a link; OUT may end in /. or ..
    if output.is_dir() and not output.is_symlink():
        if any(output.iterdir()):
            mistakes.append(f"--output {config.output} is not empty; name a folder that does not exist yet")
    elif output.exists() or output.is_symlink():
        mistakes.append(f"--output {config.output} exists and is no folder; name a folder that does not exist yet")
    return output


def _tokenizer(config: ExportConfig, folder: Path, known: int) -> Tokenizer:
    """The model's tokenizer; raises UserError where none is recorded or it has more ids than the model."""
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else recorded_tokenizer(folder)
    if tokenizer.vocab_size > known:
        raise UserError(
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids, but the model of {folder} knows {known:,}; "
            "use the tokenizer that it was trained with"
        )
    return tokenizer


def _fill(new: Path, folder: Path, tokenizer: Tokenizer, name: str, output: Path) -> None:
    """Write all files, each flushed; raises OSError and UserError."""
    config = checkpoint.read_model_config(folder)
    weights = checkpoint.read_weights(folder)
    entries = checkpoint.hugging_face_entries(whole_shares(weights), config)
    with (new / checkpoint.MODEL).open("wb") as file:
        for part in tensor_files.parts(entries, {}):
            file.write(part)
    kinds = {HF_DTYPES.get(DTYPE_NAMES.get(entry.dtype, ""), "float32") for entry in entries}
    hf_config = hf.hugging_face_config(config, tokenizer.end_of_text) | {
        "dtype": kinds.pop() if len(kinds) == 1 else "float32"
    }
    _write_json(new / checkpoint.CONFIG, hf_config)
    end = tokenizer.end_of_text
    _write_json(new / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    _write_tokenizer(new, folder, tokenizer, config)
    parameters = sum(math.prod(entry.shape) for entry in entries)
    state = checkpoint.read_state(folder) if checkpoint.has_state(folder) else None
    card = model_card(output.name, name, config, parameters, tokenizer, state)
    (new / "README.md").write_text(card, encoding="utf-8")
    for path in [*new.iterdir(), new]:
        flush(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(new: Path, folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """The tokenizer's files: those of a Hugging Face model as they are, else made from ours."""
    theirs = [folder / name for name in pretrained.TOKENIZER_FILES if (folder / name).is_file()]
    kept = {path.name for path in theirs} >= {"tokenizer.json", "tokenizer_config.json"}
    if kept and not checkpoint.has_state(folder) and load_tokenizer(str(folder)).hash == tokenizer.hash:
        for path in theirs:
            (new / path.name).write_bytes(path.read_bytes())
    else:
        write_tokenizer(tokenizer, new, config.seq_length)


def model_card(
    title: str, source: str, config: ModelConfig, parameters: int, tokenizer: Tokenizer, state: TrainerState | None
) -> str:
    """README.md: what the model is, how it was trained, how to load it."""
    rows = [
        ("architecture", str(hf.counterpart(config))),
        ("parameters", f"{parameters:,}"),
        ("layers, heads, dimension", f"{config.num_layers}, {config.num_heads}, {config.d_model}"),
        ("context", f"{config.seq_length:,} tokens"),
        ("vocabulary", f"{config.vocabulary:,} ({_shown(tokenizer.name)})"),
    ]
    if state is not None:
        rows += _run_rows(state)
    rows.append(("exported", f"{datetime.now(UTC):%Y-%m-%d}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    origin = "Trained" if state is not None else "Converted"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2_xla
---

# {title}

{origin} with gpt2_xla, from `{_shown(source)}`.

| | |
|---|---|
{table}

```python
from transformers import pipeline

print(pipeline("text-generation", model="{title}")("Once upon a time", max_new_tokens=50)[0]["generated_text"])
```

`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` take the same path.
"""


def _run_rows(state: TrainerState) -> list[tuple[str, str]]:
    """The numbers of the run that made the model."""
    saved = state.config
    length = saved.get("model", {}).get("seq_length", 0)
    rows = [
        ("steps", f"{state.step:,}"),
        ("tokens trained on", f"{state.samples * length:,}"),
        ("data", _shown(" ".join(saved.get("data", {}).get("train_dir") or ["unknown"]))),
    ]
    if began := saved.get("run", {}).get("from_checkpoint"):
        rows.append(("began with", _shown(str(began))))
    if state.valid_loss is not None:
        shown = f"{state.valid_loss:.4f} nats per token, perplexity {perplexity(state.valid_loss):.2f}"
        rows.append(("validation loss", shown))
    elif state.best_valid_loss is not None:
        rows.append(("best validation loss of the run", f"{state.best_valid_loss:.4f} nats per token"))
    return rows


def _shown(text: str) -> str:
    """The last parts of a path, or a name as it is: a card is public, the folders of a machine are not."""
    return " ".join("/".join(Path(word).parts[-3:]) if Path(word).is_absolute() else word for word in text.split(" "))
