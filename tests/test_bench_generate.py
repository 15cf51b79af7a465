"""scripts/bench_generate.py on a tiny model: three ways, the same tokens."""

import pytest
from commands import PYTHON, ROOT, run

from gpt2_xla.bench_config import GenerationBenchConfig, GenerationBenchOptions
from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.generation_benchmark import bench


@pytest.mark.parametrize("architecture", ["", "--position rope --norm rmsnorm --activation swiglu --no-bias --qk-norm"])
def test_the_three_ways_are_timed_and_write_the_same(architecture):
    size = "--num-layers 1 --d-model 32 --num-heads 2 --vocab-size 97 --seq-length 64 --prompt-tokens 5 --new-tokens 40"
    command = (
        *PYTHON,
        str(ROOT / "scripts" / "bench_generate.py"),
        *size.split(),
        *architecture.split(),
        "--turns",
        "1",
        "--device",
        "cpu",
    )
    output = run(*command, "--precisions", "fp32", "--batch-sizes", "1", "3")
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| fp32")]
    assert [[cell.strip() for cell in row][:2] for row in rows] == [["fp32", "1"], ["fp32", "3"]]
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[2:5])
    assert [row[-1].strip() for row in rows] == ["100%", "100%"]


def test_all_mistakes_are_told_before_a_model_is_made():
    options = GenerationBenchOptions(turns=0, batch_sizes=(1, 0), prompt_tokens=32, new_tokens=40)
    with pytest.raises(UserError) as caught:
        next(bench(GenerationBenchConfig(ModelConfig(seq_length=64), options)))
    assert [mistake.split(" must")[0] for mistake in caught.value.mistakes[:2]] == ["--turns 0", "--batch-sizes 0"]
    assert caught.value.mistakes[2].startswith("--prompt-tokens 32 and --new-tokens 40 are more than --seq-length 64")


def test_a_model_that_transformers_lacks_is_refused():
    config = GenerationBenchConfig(ModelConfig(num_heads=5, qk_norm=True))
    with pytest.raises(UserError, match="nothing to compare with: no Hugging Face counterpart") as caught:
        next(bench(config))
    assert len(caught.value.mistakes) == 2
