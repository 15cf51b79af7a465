"""batches.jsonl: hashes that name the global batch, lines that survive what the run survives; verify_run.py reads them."""

import dataclasses
import errno
import json
import os
import shutil

import pytest
from commands import PYTHON, QUICK_XLA, ROOT, TINY, TRAIN_XLA, data_flags, finish, run, start, torchrun
from small_runs import run_here

import run_pretrain
from gpt2_xla import checkpoint
from gpt2_xla.config import DataConfig, ModelConfig, PretrainConfig
from gpt2_xla.data.batch_hash import BatchOrder, token_hash
from gpt2_xla.data.loader import training_batches
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.errors import UserError
from gpt2_xla.ledger import LedgerFile
from gpt2_xla.run_verification import replay_ledger, verify_run
from gpt2_xla.script_config import VerifyRunConfig

# 64 × 32 tokens a step: an epoch of the 40,000 tokens ends every 19 steps.
FLAGS = [*TINY, "--train-batch-size", "32", "--gradient-accum-step", "2", "--train-steps", "24", "--save-interval", "8"]


def train(monkeypatch, folder, *flags):
    assert run_here(monkeypatch, run_pretrain.main, *flags, "--checkpoints-dir", folder) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_data):
    """A run of 24 steps that was killed after step 8, and again after step 16."""
    folder = tmp_path_factory.mktemp("ledger") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train(patch, folder, *FLAGS, *data_flags(text_data))
        for last in (8, 16):
            for path in checkpoint.checkpoints(folder):
                if int(path.name[5:]) > last:
                    shutil.rmtree(path)
            train(patch, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def verify(folder, **options):
    return verify_run(VerifyRunConfig(**options), folder)


def edit(folder, change):
    """Rewrite the ledger as change(its lines)."""
    path = folder / "batches.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


# the hashes


@pytest.fixture
def data(text_data):
    config = PretrainConfig(
        ModelConfig(257, 32, 32, 1, 1), DataConfig((f"{text_data}/train",), train_batch_size=8, gradient_accum_step=2)
    )
    return PretrainingData.open(config, 0, 1)


def order_of(data, **changes):
    return dataclasses.replace(BatchOrder(data.fingerprint, 1337, True, 32, 8, "0:16", 1), **changes)


def test_the_hash_of_a_global_batch_is_that_of_its_windows_however_they_are_shared(data):
    hashes = list(order_of(data).window_hashes(data.train, 0, 600))  # beyond what is hashed together, over epochs
    assert len(set(hashes)) == 600
    assert list(order_of(data).window_hashes(data.train, 16 * 500, 100)) == hashes[500:]
    assert list(order_of(data, world_size=2).window_hashes(data.train, 0, 600)) == hashes
    assert list(order_of(data, batch_size=16).window_hashes(data.train, 0, 600)) == hashes
    for change in ({"seed": 7}, {"shuffle": False}, {"fingerprint": "other"}):
        assert not set(order_of(data, **change).window_hashes(data.train, 0, 600)) & set(hashes)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_token_hash_is_of_what_rank_zero_reads(data, world_size):
    order = order_of(data, world_size=world_size)
    arguments = dict(seed=1337, shuffle=True, first_sample=48, steps=3, micro_steps=2, batch_size=8, rank=0)
    for step, batch in enumerate(training_batches(data.train, world_size=world_size, vocab_size=257, **arguments)):
        samples = order.own_samples(48 + 16 * step, step)
        rows = data.train.rows(samples, seed=1337, shuffle=True, vocab_size=257)
        assert batch.numel() == rows.size == 16 * 33 // world_size
        assert token_hash(batch.numpy()) == token_hash(rows)
    rows[0, 0] ^= 1
    assert token_hash(batch.numpy()) != token_hash(rows)


# what a run writes


def test_a_run_of_several_starts_saw_every_token_once_an_epoch(finished):
    summary, problems = verify(finished)
    assert problems == []
    assert "24 steps, 1,536 sequences, 49,152 tokens; 3 starts, 24 steps replaced by later ones" in summary
    assert "every token once an epoch, in order" in summary
    lines = [json.loads(line) for line in (finished / "batches.jsonl").read_text().splitlines()]
    starts = [line for line in lines if line["kind"] == "start"]
    assert [(line["step"], line["samples"], line["world_size"]) for line in starts] == [
        (0, 0, 1),
        (8, 512, 1),
        (16, 1024, 1),
    ]
    assert [str(line["checkpoint"])[-13:] for line in starts] == ["None", "step-00000008", "step-00000016"]
    batches = {}
    for line in lines:  # a repeated step saw the same batch again
        if line["kind"] == "batch":
            assert batches.setdefault(line["step"], line) == line
    assert len(batches) == 24


def test_the_ledger_is_on_disk_before_the_checkpoint_is(monkeypatch, text_data, tmp_path):
    known = []
    original = checkpoint.save

    def save(folder, state, *arguments, **options):
        known.append((state.step, replay_ledger(folder / "batches.jsonl").position()[0]))
        return original(folder, state, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    train(monkeypatch, tmp_path, *FLAGS, *data_flags(text_data))
    assert known == [(8, 8), (16, 16), (24, 24)]


def test_lines_wait_for_room_on_a_full_disk(monkeypatch, text_data, tmp_path):
    room = 1000  # bytes; a line takes some 240

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self.file.write(data[:room])
            room -= written
            return written

    told = []
    begin = LedgerFile.__init__

    def on_a_small_disk(self, path, train, order, say):
        begin(self, path, train, order, told.append)
        self._file = Full(self._file)

    def close(self):
        nonlocal room
        room = 2**40
        whole_close(self)

    whole_close = LedgerFile.close
    monkeypatch.setattr(LedgerFile, "__init__", on_a_small_disk)
    monkeypatch.setattr(LedgerFile, "close", close)
    train(monkeypatch, tmp_path / "run", *FLAGS, *data_flags(text_data))
    assert told == [f"warning: {tmp_path / 'run' / 'batches.jsonl'}: No space left on device; training goes on"]
    assert verify(tmp_path / "run")[1] == []


def test_killed_and_cut_short_and_continued_by_two_processes_it_still_verifies(text_data, tmp_path, copied):
    shutil.rmtree(copied / "step-00000024")
    path = copied / "batches.jsonl"
    path.write_bytes(path.read_bytes()[:-50])  # SIGKILL, in the middle of a line
    assert "step-00000016" in str(checkpoint.checkpoints(copied)[0])
    assert verify(copied)[1] == []
    process = start(*torchrun(2), "--checkpoints-dir", copied)
    output = finish(process)
    assert process.returncode == 0, output
    summary, problems = verify(copied)
    assert problems == []
    assert "4 starts" in summary


@pytest.mark.xla
def test_xla_reads_the_same_batches(text_data, tmp_path, finished):
    flags = (*FLAGS, "--train-steps", "8", *data_flags(text_data), "--checkpoints-dir", tmp_path)
    run(*TRAIN_XLA, *flags, **QUICK_XLA)
    ours, theirs = (replay_ledger(folder / "batches.jsonl").batches[:8] for folder in (tmp_path, finished))
    assert [(one.windows, one.tokens) for one in ours] == [(one.windows, one.tokens) for one in theirs]
    assert verify(tmp_path)[1] == []


def test_a_branch_begins_where_its_checkpoint_stood(monkeypatch, finished, tmp_path):
    train(monkeypatch, tmp_path, "--from-checkpoint", finished / "step-00000016")
    summary, problems = verify(tmp_path)
    assert problems == []
    assert "begins after step 16 of another run" in summary


# a ledger that is broken on purpose (line 1 is the first start; line n + 1 is step n)


def test_a_missing_line_is_told(copied):
    edit(copied, lambda lines: lines[:5] + lines[6:])
    assert verify(copied)[1] == ["line 6: step 6 follows step 4: step 5 is missing"]


def test_missing_lines_before_a_start_are_told(copied):
    # After line 50, the start after step 16, and all that made step 16 known.
    edit(copied, lambda lines: [*lines[:5], *[line for line in lines if '"step": 16, "samples"' in line], *lines[-8:]])
    assert (
        verify(copied)[1][0]
        == "line 6: goes on after step 16, but the ledger ends with step 4: steps 5 to 16 are missing"
    )


def test_a_repeated_line_is_told(copied):
    edit(copied, lambda lines: [*lines[:6], *lines[5:]])
    assert verify(copied)[1][0] == "line 7: step 5 again, after step 5"


def test_another_batch_is_told(copied):
    def change(lines):
        lines[5] = json.dumps({**json.loads(lines[5]), "windows": "0" * 32})
        lines[6] = json.dumps({**json.loads(lines[6]), "tokens": "0" * 32})
        return lines

    edit(copied, change)
    assert verify(copied)[1] == [
        "line 6: step 5 saw another batch than samples 256 to 319",
        "line 7: step 6 read other tokens than the data holds now",
    ]
    assert len(verify(copied, tokens=False)[1]) == 1


def test_samples_left_out_and_samples_seen_again_are_told(copied):
    def change(lines):
        for number, by in ((20, 64), (22, -64)):
            record = json.loads(lines[number])
            lines[number] = json.dumps({**record, "first": record["first"] + by})
        return lines

    edit(copied, change)
    problems = verify(copied)[1]
    assert [problem for problem in problems if "begins with" in problem] == [
        "line 21: step 20 begins with sample 1280: samples 1216 to 1279 are left out",
        "line 22: step 21 begins with sample 1280: samples 1280 to 1343 are seen again",
        "line 23: step 22 begins with sample 1280: samples 1280 to 1343 are seen again",
        "line 24: step 23 begins with sample 1408: samples 1344 to 1407 are left out",
    ]


def test_a_checkpoint_beyond_the_ledger_is_told(copied):
    edit(copied, lambda lines: lines[:-3])
    assert "step-00000024 is there, but the ledger has no step 24" in verify(copied)[1]


def test_a_line_of_other_types_is_told_and_two_cut_ones_before_a_start_are_not(copied):
    def change(lines):
        start = next(number for number, line in enumerate(lines) if number and json.loads(line)["kind"] == "start")
        odd = json.dumps({**json.loads(lines[3]), "step": None})
        return [*lines[:3], odd, *lines[4:start], '{"ki', '{"kind": "ba', *lines[start:]]

    edit(copied, change)
    problems = verify(copied)[1]
    assert problems[0] == "line 4 is no record"
    assert not [problem for problem in problems[1:] if "is no record" in problem]


def test_a_window_that_comes_twice_in_an_epoch_is_told(copied, monkeypatch):
    # In order by its own numbers and hashes, but half of the run was trained with another seed.
    train(monkeypatch, copied, "--train-steps", "30", "--seed", "7")
    problems = verify(copied)[1]
    assert problems
    assert all("that epoch 2 already had" in problem for problem in problems)


def test_without_the_data_only_the_order_is_checked(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["data"]["train_dir"] = [str(tmp_path / "gone")]
    (copied / "config.json").write_text(json.dumps(config))
    summary, problems = verify(copied)
    assert problems == []
    assert "the data is not at hand" in summary
    edit(copied, lambda lines: lines[:5] + lines[6:])
    assert verify(copied)[1]


def test_the_script_exits_with_1_for_a_problem_and_2_for_no_ledger(copied, tmp_path):
    script = str(ROOT / "scripts" / "verify_run.py")
    edit(copied, lambda lines: lines[:5] + lines[6:])
    process = start(*PYTHON, script, copied)
    assert "problem: line 6: step 6 follows step 4: step 5 is missing" in finish(process)
    assert process.returncode == 1
    with pytest.raises(UserError, match="a run folder"):
        verify(tmp_path / "nowhere")
