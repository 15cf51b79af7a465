"""scripts/chaos.py: hurt runs end as one that nobody hurt; and what is wrong with a run is seen."""

import dataclasses
import json
import random
import shutil
import signal
import time

import pytest
from commands import PATIENCE, PYTHON, ROOT, finish, run, start

from gpt2_xla.chaos.faults import FAULTS, Moment, delete, flip, truncate
from gpt2_xla.chaos.session import line, table
from gpt2_xla.chaos.trial import Strike, differences, odd_end, plan, reference_run
from gpt2_xla.chaos.victim import LAST, Victim, write_data
from gpt2_xla.script_config import ChaosConfig

CHAOS = (*PYTHON, str(ROOT / "scripts" / "chaos.py"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_trials_or_as_many_as_a_minute_takes(tmp_path):
    output = run(
        *CHAOS,
        *["--trials", "10", "--seed", "20", "--minutes", "0.7", "--trial-seconds", "700", "--json", "--folder"],
        tmp_path,
        timeout=800,
    )
    trials = json.loads(output[output.index("\n[") :].split("--minutes")[0])
    assert trials
    assert all(trial["problems"] == [] for trial in trials)
    assert any(fault["struck"] for trial in trials for fault in trial["faults"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """A finished run, as the reference and as the folder of its victim."""
    folder = tmp_path_factory.mktemp("chaos")
    data = write_data(folder / "data")
    return reference_run("torch", folder / "home", data, PATIENCE), folder / "home", data


@pytest.fixture
def victim(unhurt, tmp_path):
    _, home, data = unhurt
    copy = Victim("torch", tmp_path / "home", data)
    shutil.copytree(home / "run", copy.run)
    return copy


def test_a_run_that_is_whole_differs_in_nothing(unhurt, victim):
    assert differences(victim, unhurt[0]) == []


@pytest.mark.parametrize("damage", [truncate, flip, delete])
def test_damage_of_the_last_checkpoint_is_seen(unhurt, victim, damage, monkeypatch):
    monkeypatch.setattr(victim, "kill", lambda: None)  # nothing runs
    assert damage(victim, random.Random(1), 0.0).startswith(LAST)
    assert differences(victim, unhurt[0])[0].startswith(f"{LAST}: ")


def test_other_weights_a_gap_in_the_data_another_loss_and_litter_are_seen(unhurt, victim):
    ledger = victim.run / "batches.jsonl"
    ledger.write_text("".join(text for text in ledger.read_text().splitlines(True) if '"step": 30,' not in text))
    metrics = victim.run / "metrics.jsonl"
    metrics.write_text("".join(text for text in metrics.read_text().splitlines(True) if '"step": 15,' not in text))
    shutil.copy(victim.run / "step-00000056" / "model.safetensors", victim.run / LAST / "model.safetensors")
    (victim.run / ".step-00000056.deleted").mkdir()
    (victim.temporary / "gpt2_xla-x").write_text("")
    (victim.temporary / "torchelastic_x").mkdir()
    told = "\n".join(differences(victim, unhurt[0]))
    for part in (
        f"{LAST}/model.safetensors differs from the uninterrupted run's",
        "the train loss of step 15 in metrics.jsonl is missing or another",
        "the valid loss of step 15",
        "step 30 is missing",
        "left in the run folder: .step-00000056.deleted",
        "left in the folder of temporary files: gpt2_xla-x",
    ):
        assert part in told
    assert "torchelastic" not in told


@pytest.mark.parametrize(("said", "odd"), [("all are damaged; move them away", False), ("something else", True)])
def test_a_run_that_an_earlier_fault_left_nothing_may_end_as_it_likes(tmp_path, said, odd):
    signalled = Victim("torch", tmp_path, tmp_path)
    signalled.command = [*PYTHON, "-c", f"import sys; print('{said}'); sys.exit(2)"]
    signalled.start()
    status = signalled.wait(PATIENCE)
    (fault,) = (fault for fault in FAULTS if fault.name == "SIGUSR1")
    strikes = (None, Strike(fault, Moment("start-up", 0.5), ""))
    assert [bool(odd_end(signalled, one, end)) for one in strikes for end in (status, -signal.SIGUSR1)] == [odd] * 4


def test_a_seed_decides_the_trial():
    one, other = (plan(3, "torchrun", list(FAULTS)) for _ in range(2))
    assert line(one) == line(other)
    assert line(one) != line(plan(4, "torchrun", list(FAULTS)))
    assert all(
        "torch" in strike.fault.runtimes for seed in range(50) for strike in plan(seed, "torch", list(FAULTS)).strikes
    )


def test_the_table_counts_what_struck_and_what_was_survived():
    trials = [plan(seed, "torch", [FAULTS[0]]) for seed in range(2)]
    trials[0].strikes[0].detail = trials[1].strikes[0].detail = ""
    trials[1].problems.append("lost")
    assert "| SIGKILL | 1 of 2 |" in table(trials)
    assert table(trials).endswith("| **trials** | 1 of 2 |")
    assert line(trials[1]).endswith("FAILED: lost")


def test_all_processes_of_a_victim_are_found_and_ended(tmp_path):
    hiding = Victim("torch", tmp_path, tmp_path)
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True); time.sleep(1000)"
    hiding.command = [*PYTHON, "-c", script]
    hiding.start()
    assert hiding.until(lambda: len(hiding.family()) == 2, time.monotonic() + PATIENCE)
    hiding.kill()
    assert hiding.family() == []


def test_the_help_names_every_fault():
    (faults,) = (field for field in dataclasses.fields(ChaosConfig) if field.name == "faults")
    named = faults.metadata["help"].removeprefix("faults to choose from: ").split("; ")[0].split(", ")
    assert [fault.name for fault in FAULTS] == [name.split(" (")[0] for name in named]


def test_mistakes_of_the_command_are_told_together(tmp_path):
    process = start(*CHAOS, "--trials", "0", "--faults", "flop", "--runtimes", "--folder", tmp_path / "none")
    output = finish(process)
    assert process.returncode == 2
    for part in (
        *("--trials 0 is too small", "--runtimes names none", "--faults flop is not one of SIGKILL, "),
        *("did you mean flip?", f"--folder {tmp_path / 'none'} is no folder"),
    ):
        assert part in output
