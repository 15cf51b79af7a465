"""Export a checkpoint for transformers: python scripts/export_hf.py CHECKPOINT OUT; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import ExportConfig


def main() -> None:
    """Print where the model is and how to load it."""
    argv = sys.argv[1:]
    bare = argv[: next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))]
    flags = [word for flag, value in zip(("--model", "--output"), bare, strict=False) for word in (flag, value)]
    description = "Export a checkpoint for transformers: python scripts/export_hf.py CHECKPOINT OUT [--flag value ...]"
    config = parse(ExportConfig, [*flags, *argv[min(len(bare), 2) :]], description).config
    from gpt2_xla.export import export

    folder = export(config)
    print(f"exported to {folder}; load it with transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    sys.exit(run_main(main))
