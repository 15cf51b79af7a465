"""docs/configuration.md, generated from config.py, script_config.py and bench_config.py."""

from gpt2_xla.bench_config import (
    BenchConfig,
    BenchLoaderConfig,
    DataBenchConfig,
    GenerationBenchConfig,
    SavingBenchConfig,
)
from gpt2_xla.cli import flags_of
from gpt2_xla.config import PRESET_OPTIMIZERS, PRESETS, TorchPretrainConfig, XlaPretrainConfig
from gpt2_xla.script_config import (
    ChaosConfig,
    CompareRunsConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    FinewebConfig,
    GenerateConfig,
    HloConfig,
    InspectConfig,
    PlanConfig,
    PrepareConfig,
    VerifyRunConfig,
)

COMMANDS = {
    "run_pretrain.py": TorchPretrainConfig,
    "run_pretrain_xla.py": XlaPretrainConfig,
    "scripts/prepare_text.py": PrepareConfig,
    "scripts/prepare_fineweb.py": FinewebConfig,
    "generate.py": GenerateConfig,
    "scripts/bench_generate.py": GenerationBenchConfig,
    "scripts/evaluate.py": EvaluateConfig,
    "scripts/export_hf.py": ExportConfig,
    "scripts/bench.py": BenchConfig,
    "scripts/bench_data.py": DataBenchConfig,
    "scripts/bench_loader.py": BenchLoaderConfig,
    "scripts/bench_checkpoint.py": SavingBenchConfig,
    "scripts/inspect_data.py": InspectConfig,
    "scripts/verify_run.py": VerifyRunConfig,
    "scripts/compare_runs.py": CompareRunsConfig,
    "scripts/chaos.py": ChaosConfig,
    "scripts/doctor.py": DoctorConfig,
    "scripts/plan_tpu.py": PlanConfig,
    "scripts/run_hlo.py": HloConfig,
}


def configuration_page() -> str:
    """The whole page, as Markdown."""
    lines = [
        "# Options",
        "",
        "Generated from `gpt2_xla/config.py`, `script_config.py` and `bench_config.py` by `python scripts/write_configuration_md.py`; CI checks that it is up to date.",
        "",
        "A value's strength, weakest first: its default, the checkpoint's saved configuration (on a resume), the recipe, the",
        "command line; in each of the two, `--preset` is weaker than the flags beside it. Booleans also take `--no-…`. `--recipe NAME` reads flags from `configs/NAME.flags`.",
        "",
        "## Presets",
        "",
        "| `--preset` | " + " | ".join(f"`--{name.replace('_', '-')}`" for name in PRESETS["gpt2"]) + " |",
        "|---" * (len(PRESETS["gpt2"]) + 1) + "|",
    ]
    for name, preset in PRESETS.items():
        values = ("on" if v is True else "off" if v is False else str(v) for v in preset.values())
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    for name, fields in PRESET_OPTIMIZERS.items():
        flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in fields.items())
        lines += ["", f"`--preset {name}` also sets `{flags}`."]
    shown: dict[str, str] = {}
    for command, config_type in COMMANDS.items():
        lines += ["", f"## {command}"]
        titles: dict[str, list[str]] = {}
        for flag in flags_of(config_type):
            row = f"| `{flag.name}` | {flag.metavar_text} | {flag.default_text} | {flag.field.metadata['help']} |"
            titles.setdefault(flag.title, []).append(row)
        for title, rows in titles.items():
            text = "\n".join(rows)
            if text in shown:
                lines += ["", f"### {title}", "", f"As for {shown[text]}."]
                continue
            shown[text] = command
            lines += ["", f"### {title}", "", "| flag | value | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"
