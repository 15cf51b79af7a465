"""--profile-steps writes a profile that can be read, changes no loss, and a wrong range is one sentence."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
from commands import QUICK_XLA, TINY, TRAIN_XLA, data_flags, losses, records, run, torchrun
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla.config import PretrainConfig, RunConfig, RuntimeConfig, TorchConfig
from gpt2_xla.metrics import Metrics
from gpt2_xla.profiling import StepProfile
from gpt2_xla.runtime.torch_runtime import TorchRuntime


def torch_events(run_dir, name):
    """The events of a torch profile in a run folder."""
    with gzip.open(run_dir / "profile" / f"{name}.trace.json.gz") as file:
        return json.load(file)["traceEvents"]


@pytest.fixture
def pretrain(monkeypatch, capsys):
    """Run run_pretrain.py in this process; returns the exit status and what it printed."""

    def start(*arguments):
        capsys.readouterr()
        status = run_here(monkeypatch, run_pretrain.main, *arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return start


def test_torch_profiles_the_steps_asked_for_and_no_other(pretrain, text_data, tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir")
    assert pretrain(*flags, plain)[0] == 0
    status, printed = pretrain(*flags, profiled, "--profile-steps", "2:3")
    assert status == 0, printed
    assert f"profile of steps 2 to 3 in {profiled / 'profile'}: open " in printed
    assert "ui.perfetto.dev" in printed
    names = {event.get("name") for event in torch_events(profiled, "steps-2-3")}
    assert {name for name in names if re.fullmatch(r"step \d+", str(name))} == {"step 2", "step 3"}
    assert {"aten::addmm", "aten::mm"} & names
    assert losses(profiled) == losses(plain)
    assert not (plain / "profile").exists()


def test_a_run_that_stops_inside_the_range_keeps_what_it_recorded(tmp_path):
    said: list[str] = []
    metrics, log = Metrics([]), SimpleNamespace(pause=lambda: None, resume=lambda: None)
    metrics.say = said.append
    config = PretrainConfig(
        run=RunConfig(train_steps=9, checkpoints_dir=str(tmp_path)), runtime=RuntimeConfig(profile_steps="2:8")
    )
    profile = StepProfile(config, TorchRuntime(TorchConfig(device="cpu", mixed_precision="no")), log, metrics)
    for step in (1, 2, 3):
        profile.before_step(step)
        profile.after_step(step)
    profile.close()
    profile.close()
    assert len(said) == 1
    assert said[0].startswith("profile of steps 2 to 3 in ")
    assert {"step 2", "step 3"} <= {event.get("name") for event in torch_events(tmp_path, "steps-2-8")}


def test_a_profile_that_cannot_be_written_does_not_end_the_run(pretrain, text_data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run", "--profile-steps", "2:3")
    status, printed = pretrain(*flags)
    assert status == 0, printed
    assert "warning: no profile in " in printed
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("3:2", "--profile-steps 3:2 ends before it begins; did you mean 2:3?"),
        ("2:5", "--profile-steps 2:5 is not within the steps that this run trains, 1 to 4"),
        ("0:2", "--profile-steps 0:2 is not within the steps that this run trains, 1 to 4"),
        ("7", "--profile-steps 7 is not FIRST:LAST, two step numbers, as in 10:15"),
        ("-1:3", "--profile-steps -1:3 is not FIRST:LAST, two step numbers, as in 10:15"),
    ],
)
def test_a_wrong_range_is_one_sentence(pretrain, text_data, tmp_path, given, sentence):
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run")
    assert pretrain(*flags, f"--profile-steps={given}") == (2, f"error: {sentence}\n")
    assert not (tmp_path / "run").exists()


def test_resume_does_not_profile_again_unless_asked_to(pretrain, text_data, tmp_path):
    folder = tmp_path / "run"
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", folder)
    assert pretrain(*flags, "--profile-steps", "3:4")[0] == 0
    resume = ("--checkpoints-dir", folder, "--train-steps", "6")
    status, printed = pretrain(*resume, "--profile-steps", "4:5")
    assert (status, printed) == (
        2,
        "error: --profile-steps 4:5 is not within the steps that this run trains, 5 to 6\n",
    )
    sentence = "--profile-steps 2:3 records steps that are trained, but all 4 steps of this run are done; leave it out"
    assert pretrain("--checkpoints-dir", folder, "--profile-steps", "2:3") == (2, f"error: {sentence}\n")
    status, printed = pretrain(*resume)
    assert status == 0, printed
    assert "profile of" not in printed
    status, printed = pretrain("--do-test", "--checkpoints-dir", folder, "--profile-steps", "1:2")
    assert (status, "--do-test trains none" in printed) == (2, True)


@pytest.mark.xla
def test_xla_writes_an_xplane_and_compiles_nothing_for_it(text_data, tmp_path):
    flags = (*TINY, *data_flags(text_data), "--train-steps", "8", "--profile-steps", "4:6")
    printed = run(*TRAIN_XLA, *flags, "--checkpoints-dir", tmp_path, **QUICK_XLA)
    assert f"profile of steps 4 to 6 in {tmp_path / 'profile'}: pip install xprof" in printed
    (xplane,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = xplane.read_bytes()
    assert b"SyncTensorsGraph" in content  # torch_xla's name of a step's program
    assert b"XLAPjRtCpuClient" in content  # the threads that ran it
    compiles = [record["compiles"] for record in records(tmp_path)]
    assert compiles[3:] == [compiles[2]] * 5


def test_torchrun_profiles_rank_0_with_its_collectives(text_data, tmp_path):
    flags = [*TINY, *data_flags(text_data), "--train-steps", "5", "--device", "cpu", "--checkpoints-dir", tmp_path]
    run(*torchrun(2), *flags, "--profile-steps", "3:4")
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["steps-3-4.trace.json.gz"]
    assert any("gloo" in str(event.get("name")) for event in torch_events(tmp_path, "steps-3-4"))
