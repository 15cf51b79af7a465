"""scripts/run_hlo.py: the exported step, run by jax, has torch_xla's losses; a folder runs without torch_xla; one sentence a mistake."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import PATIENCE, PYTHON, ROOT, printed_json, run

from gpt2_xla.errors import UserError
from gpt2_xla.hlo.folder import read_folder
from gpt2_xla.runtime.tpu_host import tpu_chips, tpu_device_files

pytestmark = pytest.mark.tpu_compiler  # needs torch_xla and jax

MODEL = ("--num-layers", "1", "--num-heads", "2", "--d-model", "32", "--seq-length", "16", "--vocab-size", "257")
RUN_HLO = (*PYTHON, str(ROOT / "scripts" / "run_hlo.py"))


def mistakes(*flags, **environment):
    result = subprocess.run(
        [*RUN_HLO, *map(str, flags)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hlo") / "step"
    run(*RUN_HLO, *MODEL, "--gradient-accum-step", "2", "--export", str(folder))
    return folder


def test_jax_runs_the_step_to_torch_xlas_losses_without_torch_xla(exported, tmp_path):
    # As on a machine that has jax, numpy and safetensors: whoever imports torch gets an error.
    for name in ("torch", "torch_xla"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    output = run(
        *RUN_HLO, "--folder", str(exported), "--steps", "7", "--json", PYTHONPATH=str(tmp_path), JAX_PLATFORMS="cpu"
    )
    found = printed_json(output)
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda step: step.update(losses=[]), "step.json has no losses to compare with"),
        (lambda step: step["arguments"][0].update(fed_by=step["results"]), "step.json feeds"),
        (lambda step: step["arguments"][0].update(fed_by=-1), "by result -1 of"),
        (lambda step: step.update(losses=["x"]), "could not convert string to float"),
    ],
)
def test_a_step_json_that_was_changed_is_damaged(change, sentence, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "step")
    step = json.loads((exported / "step.json").read_text())
    change(step)
    (tmp_path / "step" / "step.json").write_text(json.dumps(step))
    with pytest.raises(UserError, match=f"is damaged .*{sentence}"):
        read_folder(tmp_path / "step")


@pytest.mark.skipif(bool(tpu_chips() or tpu_device_files()), reason="this machine may have a TPU")
def test_nothing_is_told_of_a_tpu_where_there_is_none(exported):
    command = [*RUN_HLO, "--folder", str(exported), "--steps", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "TPU_" not in result.stderr
    assert "compiling for" in result.stderr


def test_an_export_to_where_no_folder_can_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    told = mistakes("--export", tmp_path / "file", "--steps", "0")
    assert "2 errors" in told
    assert f"--export {tmp_path / 'file'} is a file; name a new folder" in told
    below = tmp_path / "file" / "step"
    assert f"--export {below} cannot be made: Not a directory; name a folder that can" in mistakes("--export", below)


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
