"""What a run prints: lines that a log file can be searched for, and a bar on a terminal."""

import os
import re
import sys
import termios

import pytest
from commands import data_flags, records
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla.config import DataConfig, PretrainConfig, RunConfig
from gpt2_xla.progress import ProgressBar, ProgressLines, open_progress

CONFIG = PretrainConfig(run=RunConfig(train_steps=1000))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def train_record(step: int, **fields: object) -> dict:
    return {"kind": "train", "step": step, "loss": 3.21044, "tokens_per_second": 41_200.4, **fields}


def test_lines_come_ten_seconds_apart_and_the_first_and_the_last_record_always(clock, capsys):
    lines = ProgressLines(CONFIG, clock)
    for step in range(10, 1001, 10):  # 3 s each
        lines.write(train_record(step))
        clock.now += 3
    lines.close()
    printed = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in printed] == [*range(10, 1000, 40), 1000]
    assert printed[0] == "step 10 of 1000: loss 3.2104, 41,200 tokens/s"
    assert printed[1] == "step 50 of 1000: loss 3.2104, 41,200 tokens/s, 0:04:45 left"
    assert printed[-1] == "step 1000 of 1000: loss 3.2104, 41,200 tokens/s"


def test_a_run_that_ends_early_tells_its_last_record(clock, capsys):
    lines = ProgressLines(CONFIG, clock)
    for step in (1, 2, 3):
        lines.write(train_record(step))
    lines.close()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1", "3"]


def test_programs_are_told_when_there_are_more(clock, capsys):
    lines = ProgressLines(CONFIG, clock)
    for step, compiles in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 3)):
        lines.write(train_record(step, mfu=0.381, compiles=compiles, compile_seconds=12.3))
        clock.now += 6
    told = [line.split("MFU 38.1%")[1].partition(", 1:")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [", 1 program compiled in 12 s", ", 2 programs compiled in 12 s", ", 3 programs compiled in 12 s"]


def test_the_time_left_counts_sequences_and_begins_anew_after_a_rollback(clock, capsys):
    batch = DataConfig(train_batch_size=8, batch_size_schedule="0:8,100:24")
    lines = ProgressLines(PretrainConfig(data=batch, run=RunConfig(train_steps=200)), clock)

    def left(step: int) -> str:
        clock.now += 50
        lines.write(train_record(step))
        return capsys.readouterr().out.split(", ", 1)[1].strip().removeprefix("41,200 tokens/s, ")

    # 50 of 100 small steps take 50 s; the 100 large ones are 300 small ones.
    assert [left(50), left(100), left(150)] == ["41,200 tokens/s", "0:05:00 left", "0:01:15 left"]
    lines.write({"kind": "rollback", "step": 150, "to_step": 50})
    assert [left(100), left(150)] == ["41,200 tokens/s", "0:00:50 left"]


def test_a_log_file_has_whole_lines_in_order(monkeypatch, text_data, tmp_path, capsys):
    run = (*FOUR_STEPS, *data_flags(text_data), "--valid-interval", "2", "--checkpoints-dir", tmp_path)
    assert run_here(monkeypatch, run_pretrain.main, *run) == 0
    shown = capsys.readouterr()
    assert "\r" not in shown.out + shown.err
    assert re.findall(r"^step (\d)(?: of 4)?: (loss|validation)", shown.out, re.M) == [
        *[("0", "validation"), ("1", "loss"), ("2", "validation"), ("4", "loss"), ("4", "validation")]
    ]
    last = records(tmp_path)[-1]["loss"]
    assert f"step 4 of 4: loss {last:.4f}, " in shown.out


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = open_progress(CONFIG, step=40)
        assert isinstance(bar, ProgressBar)
        bar.write(train_record(50))
        bar.advance(50)
        bar.close()
        terminal.flush()
        shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert "\r" in shown
    assert "50/1000" in shown
    assert "loss=3.2104, tokens/s=41,200" in shown
    assert capsys.readouterr().out == ""
