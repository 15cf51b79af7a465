"""scripts/run_hlo.py: the exported step, run by jax, has torch_xla's losses; a folder runs without torch_xla; one sentence a mistake."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import PYTHON, ROOT, run

pytestmark = pytest.mark.tpu_compiler  # needs torch_xla and jax

MODEL = ("--num-layers", "1", "--num-heads", "2", "--d-model", "32", "--seq-length", "16", "--vocab-size", "257")
RUN_HLO = (*PYTHON, str(ROOT / "scripts" / "run_hlo.py"))


def mistakes(*flags, **environment):
    result = subprocess.run(
        [*RUN_HLO, *map(str, flags)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hlo") / "step"
    run(*RUN_HLO, *MODEL, "--gradient-accum-step", "2", "--export", str(folder), timeout=170)
    return folder


def test_jax_runs_the_step_to_torch_xlas_losses_without_torch_xla(exported, tmp_path):
    # As on a machine that has jax, numpy and safetensors: whoever imports torch gets an error.
    for name in ("torch", "torch_xla"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    output = run(
        *RUN_HLO, "--folder", str(exported), "--steps", "7", "--json", PYTHONPATH=str(tmp_path), JAX_PLATFORMS="cpu"
    )
    found = json.loads(output[output.index("{") :])
    assert len(found["losses"]) == 7
    assert len(found["torch_xla_losses"]) == 5
    assert found["largest_difference"] <= 1.4e-4
    assert found["losses"][4] < found["losses"][0] - 0.05  # it learns the repeated batch: results feed arguments
    assert found["mfu"] is None  # nobody publishes this CPU's peak
    assert found["program_memory"] > 3 * 4 * 20_000  # parameters and Adam's moments
    assert found["step_seconds"] > 0


def test_the_learning_rate_is_an_argument_that_changes(exported):
    from safetensors.numpy import load_file

    step, arrays = json.loads((exported / "step.json").read_text()), load_file(exported / "arrays.safetensors")
    changing = [arrays[one["array"]] for one in step["arguments"] if one["changes"]]
    assert all(len(values) == 5 for values in changing)
    assert any(len(set(values.ravel().tolist())) >= 3 for values in changing)
    fed = [one["fed_by"] for one in step["arguments"] if one["fed_by"] is not None]
    assert sorted(fed) == list(range(1, step["results"]))  # every result but the losses feeds an argument


def test_a_wrong_or_damaged_folder_is_one_sentence(exported, tmp_path):
    assert f"--folder {tmp_path} is no exported step: No such file" in mistakes("--folder", tmp_path)
    for name, content in (("step.json", b"{"), ("arrays.safetensors", b"xx"), ("program.stablehlo", b"ML\xefRxxxx")):
        broken = tmp_path / name
        shutil.copytree(exported, broken)
        (broken / name).write_bytes(content)
        assert f"--folder {broken} is damaged (" in mistakes("--folder", broken)


def test_options_that_do_not_fit_are_told_together(tmp_path):
    (tmp_path / "file").write_text("")
    told = mistakes("--steps", "0", "--export", tmp_path, "--num-heads", "7", "--d-model", "64")
    assert "3 errors" in told
    assert "--steps 0 must be at least 1" in told
    assert f"--export {tmp_path} is not empty; name a new folder" in told
    told = mistakes("--folder", tmp_path, "--num-layers", "3", "--mixed-precision", "no")
    assert "--mixed-precision, --num-layers cannot change the step of --folder" in told
    assert "one of them at a time" in mistakes("--folder", "a", "--export", tmp_path / "b")


def test_a_jax_without_a_device_is_one_sentence(exported):
    assert "finds no device" in mistakes("--folder", exported, JAX_PLATFORMS="cuda")


def test_help_shows_every_option():
    output = run(sys.executable, *RUN_HLO[1:], "--help")
    for flag in ("--export", "--folder", "--steps", "--mixed-precision", "--num-layers"):
        assert flag in output
