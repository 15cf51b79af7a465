"""scripts/compare_runs.py: means and spreads of groups of runs, and the tokens that each needs."""

import json
import math

import pytest
from commands import PYTHON, ROOT, finish, run, start
from matplotlib import pyplot

from gpt2_xla.config import DataConfig, ModelConfig, PretrainConfig, to_dict
from gpt2_xla.run_comparison import draw, read_groups, table

COMPARE = (*PYTHON, str(ROOT / "scripts" / "compare_runs.py"))
CONFIG = PretrainConfig(model=ModelConfig(seq_length=10), data=DataConfig(train_batch_size=2, gradient_accum_step=5))


CURVES = {
    "first": {1000: 4.0, 2000: 3.0},
    "below": {1000: 2.9, 2000: 2.5},
    "at": {1000: 3.0, 2000: 2.5},
    "never": {1000: 5.0, 2000: 4.0},
}


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder with these validation losses by step; its path. A step has 100 tokens."""

    def make(name, losses):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(to_dict(CONFIG)))
        lines = [{"kind": "valid", "step": step, "loss": loss} for step, loss in losses.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def test_means_spreads_and_the_tokens_to_the_first_groups_loss(make_run, tmp_path):
    slow = [make_run("a", {0: 5.5, 10: 4.0, 20: 3.0}), make_run("b", {10: 4.2, 20: 3.2})]
    fast = make_run("c", {0: 5.5, 10: 3.5, 20: 2.5})
    output = run(*COMPARE, "--runs", f"gpt2={slow[0]},{slow[1]}", f"modern={fast}", "--picture", tmp_path / "x.png")
    assert "| gpt2 | 2 | 2,000 | 3.1000 | 0.1414 | 2,000 | 1.00 |" in output
    assert "| modern | 1 | 2,000 | 2.5000 | 0.0000 | 1,400 | 0.70 |" in output  # from 3.5 at 1,000 to 2.5 at 2,000
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_group_that_begins_below_the_first_groups_loss_has_an_upper_bound_and_no_cross(
    make_run, tmp_path, monkeypatch
):
    named = [f"{name}={make_run(name, losses)}" for name, losses in CURVES.items()]
    groups = read_groups(named)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(groups).splitlines()[2:]]
    assert {row[0]: tuple(row[5:]) for row in rows} == {
        "first": ("200,000", "1.00"),
        "below": ("≤ 100,000", "≤ 0.50"),
        "at": ("100,000", "0.50"),
        "never": ("never", ""),
    }
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw(groups, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    crosses = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [(100_000, 3.0)]  # of the one whose curve it is on
    assert {label.get_text()[-2:] for label in axes.get_xticklabels() if label.get_text() != "0"} == {" k"}
    monkeypatch.undo()
    pyplot.close(drawn[0])


def test_a_loss_that_is_never_reached_or_reached_at_once(make_run):
    (group,) = read_groups([f"x={make_run('a', {10: 4.0, 20: 3.0})}"])
    assert group.tokens_to(2.9) == math.inf
    assert group.tokens_to(4.5) == 1000


def test_mistakes_are_told_together(make_run, tmp_path):
    good, other, empty = make_run("a", {10: 4.0}), make_run("b", {20: 4.0}), make_run("c", {0: 5.5})
    process = start(*COMPARE, "--runs", "x", f"y={good},{other}", f"z={empty}", f"w={tmp_path / 'none'}")
    output = finish(process)
    assert process.returncode == 2
    for part in (
        "--runs x: expected NAME=RUN_DIR,RUN_DIR",
        f"--runs y: {other} was not validated at the same numbers of tokens as {good}",
        f"--runs z: {empty} has no validation loss after its first step",
        "--runs w: ",
    ):
        assert part in output
    assert "Traceback" not in output
    process = start(*COMPARE, "--runs", f"x={good}", "--picture", tmp_path / "no" / "x.png")
    assert "can't be written" in finish(process)
    assert process.returncode == 2
