"""What a run tells: exact numbers, in files that survive crashes, without ever waiting for the device."""

import importlib.util
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event, current_thread, main_thread
from time import monotonic

import numpy as np
import pytest
import torch
from commands import PATIENCE, TRAIN, data_flags, finish, losses, records, start
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla import checkpoint
from gpt2_xla.config import LoggingConfig, PretrainConfig, RunConfig
from gpt2_xla.errors import UserError
from gpt2_xla.metrics import JsonlSink, Metrics, WandbSink, open_metrics
from gpt2_xla.report import draw_loss_curve, read_metrics


@pytest.fixture
def train(monkeypatch, text_data, tmp_path):
    """Run run_pretrain.py in this process; returns the run folder."""

    def run(name: str, *flags: object, data: tuple[str, ...] | None = None) -> Path:
        data = tuple(data_flags(text_data)) if data is None else data
        folder = tmp_path / name
        arguments = (*FOUR_STEPS, *data, "--checkpoints-dir", folder, *flags)
        assert run_here(monkeypatch, run_pretrain.main, *arguments) == 0
        return folder

    return run


def write_records(folder: Path, *lines: dict | str) -> Path:
    folder.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def train_record(step: int, loss: float | None) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3}


def valid_record(step: int, loss: float | None) -> dict:
    return {"kind": "valid", "step": step, "loss": loss}


# metrics.jsonl


def test_a_run_leaves_one_complete_record_per_interval(train):
    folder = train("run", "--log-interval", 2, "--valid-interval", 2, "--train-steps", 5, "--gradient-accum-step", 3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    written = [(line["kind"], line["step"]) for line in lines]
    assert written == [
        *[("valid", 0), ("train", 2), ("valid", 2), ("train", 4), ("valid", 4), ("train", 5), ("valid", 5)]
    ]
    for record in (line for line in lines if line["kind"] == "train"):
        assert record["tokens"] == record["step"] * 3 * 8 * 32
        assert record["step_seconds"] > 0
        assert 0 <= record["input_wait"] <= 1
        assert record["peak_memory_bytes"] > 2**20
        assert record["mfu"] is None  # a CPU has no published peak
        assert record["compiles"] == 0
    valid = [line for line in lines if line["kind"] == "valid"]
    assert all(record["perplexity"] == pytest.approx(math.exp(record["loss"])) for record in valid)
    assert valid[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    lowest = [min(r["loss"] for r in valid[: i + 1]) for i in range(len(valid))]
    assert [record["best"] for record in valid] == [r["loss"] == low for r, low in zip(valid, lowest, strict=True)]


def test_the_logged_learning_rate_is_the_one_that_the_step_used(train):
    folder = train("run", "--warmup-steps", 4, "--learning-rate", 1e-3)
    assert [record["learning_rate"] for record in records(folder)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])


def test_a_window_is_the_mean_of_its_steps(train):
    steps = ("--train-steps", 10, "--valid-interval", 5)  # validation and the end fall inside of windows
    each, windows = train("each", *steps), train("windows", *steps, "--log-interval", 4)
    assert [record["step"] for record in records(windows)] == [4, 8, 10]
    for name in ("loss", "grad_norm"):
        single = np.array([record[name] for record in records(each)], np.float32)
        for record, first in zip(records(windows), (0, 4, 8), strict=True):
            total = np.float32(0)
            for value in single[first : record["step"]]:
                total += value  # in float32, in order, as the device adds
            assert record[name] == float(total) / (record["step"] - first), (name, record["step"])


def test_losses_that_are_no_number_become_null_and_the_run_goes_on(train, capsys):
    folder = train("run", "--learning-rate", 1e30, "--max-grad-norm", 0, "--valid-interval", 2)
    forbidden = lambda name: pytest.fail(f"{name} is not JSON")  # noqa: E731
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=forbidden) for line in lines]
    assert [record["step"] for record in parsed if record["kind"] == "train"] == [1, 2, 3, 4]
    assert parsed[-1]["loss"] is None
    assert draw_loss_curve(folder).stat().st_size > 1000
    assert checkpoint.problems(folder / "step-00000004") == []


def test_a_record_after_a_line_cut_short_is_whole(tmp_path):
    write_records(tmp_path, train_record(1, 5.0), '{"kind": "train", "st')
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(train_record(2, 4.0))
    sink.close()
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(train_record(3, 3.0))
    sink.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)["train"]] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_and_does_not_end_the_run(capsys):
    sink = JsonlSink(Path("/dev/full"))
    sink.write(train_record(1, 5.0))
    sink.close()
    assert "warning: /dev/full: No space left on device; training goes on" in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path):
    metrics = open_metrics(PretrainConfig(), step=0, rank=1)
    metrics.write(train_record(1, 5.0))
    metrics.advance(1)
    metrics.say("nothing")
    metrics.close()
    assert metrics.sinks == []
    assert metrics.wandb_id is None
    assert Metrics([]).wandb_id is None


# The report


def test_of_a_step_run_twice_the_later_record_counts(tmp_path):
    write_records(
        tmp_path,
        *(train_record(1, 5.0), train_record(2, 4.0), valid_record(2, 4.5), train_record(3, 3.0)),
        *(train_record(2, 4.1), valid_record(2, 4.6), "", "5", '{"kind": "later version", "step": 1}', '{"kind": "tr'),
    )
    found = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in found["train"]] == [(1, 5.0), (2, 4.1), (3, 3.0)]
    assert [(r["step"], r["loss"]) for r in found["valid"]] == [(2, 4.6)]


def test_a_folder_without_metrics_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "lines",
    [
        [train_record(1, 5.0), train_record(2, 4.0), valid_record(1, 5.1), valid_record(2, 4.1)],
        [train_record(1, 5.0), train_record(2, 4.0)],
        [train_record(1, None), train_record(2, 4.0), valid_record(1, None), valid_record(2, 4.1)],
        [train_record(1, None), valid_record(1, None)],
        [valid_record(0, 5.5)],
    ],
    ids=["both", "no validation", "some null", "only null", "no training"],
)
def test_the_loss_curve_is_a_picture(tmp_path, lines):
    content = draw_loss_curve(write_records(tmp_path, *lines)).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (960, 720)
    assert content[-8:-4] == b"IEND"
    assert len(content) > 5000


# What logging costs


READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__array__", "__format__")


@pytest.fixture
def count_reads(monkeypatch):
    """Counts, from now on, every way of Python to read a tensor's value, by thread: the main one, and the one that waits for the log."""
    calls: Counter[str] = Counter()
    for name in READS:
        original = getattr(torch.Tensor, name)

        def counted(self, *arguments, _original=original, **options):
            name = current_thread().name
            calls["log" if name.startswith("log reader") else name] += 1
            return _original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls


def test_nothing_reads_the_device_between_log_steps(train, count_reads):
    def reads(name: str, steps: int, interval: int) -> tuple[int, int]:
        count_reads.clear()
        train(name, "--train-steps", steps, "--log-interval", interval, "--gradient-accum-step", 2)
        return count_reads[main_thread().name], count_reads["log"]

    few, windows = reads("few", 5, 1000)
    assert windows == 1
    assert reads("many", 25, 1000) == (few, 1)
    assert reads("logged", 25, 5) == (few, 5)
    assert reads("always", 25, 1) == (few, 25)


# Weights & Biases


NEEDS_WANDB = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@NEEDS_WANDB
def test_wandb_offline_keeps_the_run_and_a_resume_continues_it(train, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    folder = train("run", "--wandb-logging", "--wandb-tags", "a", "b", "--wandb-notes", "a note")
    identity = checkpoint.read_state(folder / "step-00000004").wandb_id
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert identity
    assert offline.name.endswith(identity)
    (log,) = offline.glob("*.wandb")
    parts, pause, deadline = (
        (b"train/loss", b"valid/loss", b"learning_rate", b"a note"),
        Event(),
        monotonic() + PATIENCE,
    )
    # A process of W&B's own writes the file, and may still be at it.
    while not all(part in log.read_bytes() for part in parts) and monotonic() < deadline:
        pause.wait(0.1)
    assert [part for part in parts if part not in log.read_bytes()] == []
    train("run", "--wandb-logging", "--train-steps", 5)
    assert checkpoint.read_state(folder / "step-00000005").wandb_id == identity
    # Two that begin in the same second have a number behind their name.
    assert {path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")} == {identity}
    assert len(losses(folder)) == 5


def wandb_records(log: Path) -> Iterator[bytes]:
    """The records of W&B's file: a header of 7 bytes, then LevelDB's log, in blocks of 32 KiB."""
    content, place, record = log.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)  # behind a checksum
        if place + 7 + length > len(content):
            return  # it is being written
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@NEEDS_WANDB
def test_wandb_shows_the_course_after_a_rollback_and_the_last_step(monkeypatch, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"MODE": "offline", "SILENT": "true", "CONFIG_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    logging = LoggingConfig(wandb_logging=True, wandb_logging_interval=20)
    sink = WandbSink(PretrainConfig(run=RunConfig(train_steps=75), logging=logging), tmp_path, None)
    for step in (80, 90, 100):
        sink.write({"kind": "train", "step": step, "loss": 3.0})
    sink.write({"kind": "rollback", "step": 110, "to_step": 50})
    for step in (60, 70, 75):
        sink.write({"kind": "train", "step": step, "loss": 2.0})
    sink.close()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    seen, pause, deadline = [], Event(), monotonic() + PATIENCE
    while len(seen) < 5 and monotonic() < deadline:  # a process of W&B's own writes the file, and may still be at it
        pause.wait(0.1)
        seen = []
        for data in wandb_records(log):
            record = Record()
            record.ParseFromString(data)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if items:
                seen.append((items["step"], items.get("train/loss")))
    assert seen == [(80, 3.0), (100, 3.0), (110, None), (60, 2.0), (75, 2.0)]


@NEEDS_WANDB
def test_wandb_without_an_account_is_a_users_mistake(monkeypatch, text_data, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", str(tmp_path / "run"), "--wandb-logging")
    # In a process of its own, for wandb remembers its mode; and in a home where nobody is logged in.
    process = start(*TRAIN, *flags, HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"))
    printed = finish(process)
    assert process.returncode == 2, printed
    assert re.search(r"^error: --wandb-logging: .+ \(WANDB_MODE=offline logs without an account\)$", printed, re.M)
    assert "Traceback" not in printed
