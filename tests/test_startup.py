"""A user's mistakes, each as the user makes it: exit status 2, one clear sentence, no traceback, nothing lost."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import PYTHON, TRAIN, TRAIN_XLA, data_flags, finish, records, start, torchrun
from small_runs import FOUR_STEPS, run_here

import run_pretrain
import run_pretrain_xla
from gpt2_xla import checkpoint
from gpt2_xla.config import DataConfig, OptimConfig, PretrainConfig, RunConfig, XlaConfig, XlaPretrainConfig
from gpt2_xla.validation import config_mistakes, replica_mistakes

CPU_ONLY = pytest.mark.skipif(
    "__import__('torch').accelerator.is_available()", reason="this machine has an accelerator"
)


@pytest.fixture
def pretrain(monkeypatch, capsys):
    """Run run_pretrain.py in this process; returns the exit status and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = run_here(monkeypatch, run_pretrain.main, *arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


@pytest.fixture
def mistakes_of(pretrain):
    """The mistakes that run_pretrain.py finds in a command line."""

    def find(*arguments: object) -> list[str]:
        status, printed = pretrain(*arguments)
        assert status == 2, printed
        assert "Traceback" not in printed
        return mistakes_in(printed)

    return find


def mistakes_in(printed: str) -> list[str]:
    """The sentences after `error:`, or the numbered ones after `N errors:`."""
    numbered = re.findall(r"^  \d+\. (.+)$", printed, re.MULTILINE)
    assert len(numbered) == int((re.search(r"^(\d+) errors:$", printed, re.MULTILINE) or [0, 0])[1])
    return numbered or re.findall(r"^error: (.+)$", printed, re.MULTILINE)


@pytest.fixture
def own_data(text_data, tmp_path) -> Path:
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(text_data, tmp_path / "own_data"))


@pytest.fixture(scope="module")
def finished_run(text_data, tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", folder, "--save-interval", "2")
        assert run_here(patch, run_pretrain.main, *flags) == 0
    return folder


@pytest.fixture
def own_run(finished_run, tmp_path) -> Path:
    """A copy of the run that a test may continue or damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "own_run"))


def flip_byte(path: Path, position: int = -6) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# Data


def test_data_that_is_not_there_is_named_with_the_remedy(mistakes_of, text_data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run = ("--checkpoints-dir", tmp_path / "run")
    assert "--train-dir is missing" in mistakes_of(*FOUR_STEPS, *run)[0]
    for name, reason in (("absent", "does not exist"), ("empty", "holds neither"), ("file", "is a file")):
        (found,) = mistakes_of(*FOUR_STEPS, "--train-dir", tmp_path / name, *run)
        assert found.startswith("--train-dir: ")
        assert str(tmp_path / name) in found
        assert reason in found
        assert "prepare_text.py" in found
    (found,) = mistakes_of(*FOUR_STEPS, "--train-dir", text_data, *run)
    assert f"did you mean {text_data / 'train'}?" in found
    assert not (tmp_path / "run").exists()


def test_a_shard_cut_short_and_one_with_a_flipped_byte_are_both_named(mistakes_of, own_data, tmp_path):
    cut, flipped = own_data / "train" / "train_00000.npy", own_data / "valid" / "valid_00000.npy"
    os.truncate(cut, cut.stat().st_size - 100)
    flip_byte(flipped)
    found = mistakes_of(*FOUR_STEPS, *data_flags(own_data), "--checkpoints-dir", tmp_path / "run")
    assert len(found) == 2
    assert str(cut) in found[0]
    assert "bytes, its header promises" in found[0]
    assert str(flipped) in found[1]
    assert "sha256 differs" in found[1]


def test_a_flipped_byte_is_found_where_contents_are_compared(pretrain, own_data, tmp_path):
    flip_byte(own_data / "train" / "train_00000.npy")
    flags = (*FOUR_STEPS, *data_flags(own_data), "--checkpoints-dir")
    assert pretrain(*flags, tmp_path / "a", "--verify-data", "full")[0] == 2
    status, printed = pretrain(*flags, tmp_path / "b", "--verify-data", "size")
    assert status == 0
    assert "lengths checked" in printed


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(mistakes_of, text_data, tmp_path):
    flags = ("--vocab-size", 200, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run")
    (found,) = mistakes_of(*FOUR_STEPS, *flags)  # training and validation data in one sentence
    assert "--vocab-size 200 is smaller than the 257 ids" in found
    assert f"--train-dir {text_data / 'train'} and --valid-dir {text_data / 'valid'}" in found


def test_a_token_beyond_the_vocabulary_is_found_though_no_manifest_tells(mistakes_of, tmp_path):
    tokens = np.full(2000, 7, np.uint16)
    tokens[1000:] = 60
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "bare.npy", tokens)
    flags = ("--train-dir", tmp_path / "data", "--vocab-size", 50, "--checkpoints-dir", tmp_path / "run")
    (found,) = mistakes_of(*FOUR_STEPS, *flags)
    assert re.search(r"token \d+ of bare\.npy is 60, but --vocab-size 50 allows only 0\.\.49", found)


def test_fewer_tokens_than_one_batch_are_refused(mistakes_of, tmp_path):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "bare.npy", np.zeros(200, np.uint16))
    flags = (*FOUR_STEPS, "--train-dir", tmp_path / "data", "--checkpoints-dir", tmp_path / "run")
    (found,) = mistakes_of(*flags)
    assert (
        "holds 200 tokens, that is 5 sequences of --seq-length 32, fewer than one batch of --train-batch-size 8"
        in found
    )
    (found,) = mistakes_of(*flags, "--seq-length", 200)
    assert "needs at least 201" in found


def test_data_of_two_tokenizers_is_refused(mistakes_of, own_data, tmp_path):
    manifest = own_data / "valid" / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"bytes"', '"gpt2"').replace('"tokenizer_hash": "', '"tokenizer_hash": "0')
    )
    (found,) = mistakes_of(*FOUR_STEPS, *data_flags(own_data), "--checkpoints-dir", tmp_path / "run")
    assert "different tokenizers: bytes and gpt2" in found


# Options


def test_all_mistakes_of_options_and_data_come_together(mistakes_of, tmp_path):
    found = mistakes_of(
        *FOUR_STEPS,
        *("--d-model", 100, "--num-heads", 7, "--min-lr", 1, "--warmup-steps", -9, "--betas", 0.9, 1.0, "--dropout", 1),
        *("--train-batch-size", 0, "--learning-rate", "nan", "--log-interval", 4, "--wandb-logging-interval", 6),
        *("--train-dir", tmp_path / "absent", "--valid-dir", tmp_path / "gone"),
    )
    expected = (
        "--d-model 100 is not divisible by --num-heads 7; use --num-heads 5",
        "--warmup-steps -9 must be a finite number, 0 or more",
        "--betas 0.9 1.0",
        "--dropout 1.0 must be at least 0 and below 1",
        "--train-batch-size 0 must be at least 1",
        "--learning-rate nan must be a number above 0",
        "--wandb-logging-interval 6 is not a multiple of --log-interval 4",
        f"--train-dir: data folder {tmp_path / 'absent'} does not exist",
        f"--valid-dir: data folder {tmp_path / 'gone'} does not exist",
    )
    text = "\n".join(found)
    assert all(part in text for part in expected), text
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("optim", "part"),
    [
        ({"decay_method": "noam", "decay_steps": 5}, "has no meaning for --decay-method noam"),
        ({"decay_method": "cosine", "decay_steps": 0}, "--decay-steps 0 must be at least 1"),
        ({"decay_method": "wsd", "decay_steps": 91}, "--warmup-steps 10 leaves 90 of --train-steps 100"),
        ({"min_lr": 1.0}, "--min-lr 1.0 is above --learning-rate 0.0006"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(optim, part):
    config = PretrainConfig(run=RunConfig(train_steps=100), optim=OptimConfig(**({"warmup_steps": 10} | optim)))
    (found,) = config_mistakes(config)
    assert part in found


def test_an_option_that_would_do_nothing_is_refused():
    config = PretrainConfig()
    assert config_mistakes(config) == []
    assert config_mistakes(config, {"muon_momentum", "sample_prompt", "sample_tokens"}) == [
        "--muon-momentum 0.95 has no meaning with --optim-type adamw; add --optim-type muon, or leave it out",
        "--sample-prompt and --sample-tokens have no meaning without --sample-interval; add it, such as 500",
    ]


def test_a_queue_of_no_batches_is_refused():
    config = XlaPretrainConfig(runtime=XlaConfig(loader_prefetch_size=0, device_prefetch_size=-1))
    assert config_mistakes(config) == [
        "--loader-prefetch-size 0 must be at least 1",
        "--device-prefetch-size -1 must be at least 1",
    ]


def test_a_batch_that_the_replicas_cannot_share_names_the_nearest_that_they_can():
    config = PretrainConfig(data=DataConfig(train_batch_size=100, eval_batch_size=3))
    assert replica_mistakes(config, 8) == [
        "--train-batch-size 100 is not divisible by the 8 replicas; use 96 or 104",
        "--eval-batch-size 3 is not divisible by the 8 replicas; use 8",
    ]
    assert replica_mistakes(config, 1) == []


def test_torchrun_ends_with_the_sentence(text_data, tmp_path):
    flags = ("--train-batch-size", "5", "--eval-batch-size", "4", "--checkpoints-dir", str(tmp_path / "run"))
    process = start(*torchrun(2), *FOUR_STEPS, *data_flags(text_data), *flags)
    printed = finish(process)
    assert process.returncode != 0
    assert "--train-batch-size 5 is not divisible by the 2 replicas; use 4 or 6" in printed
    # torchrun shows a traceback of its own; ours would lead through the program's files.
    assert "gpt2_xla/" not in printed
    assert not (tmp_path / "run").exists()


def test_the_xla_program_refuses_torchrun_at_once(monkeypatch, capsys, text_data, tmp_path):
    flags = [flag for flag in FOUR_STEPS if flag not in ("--device", "cpu")]
    flags += [*data_flags(text_data), "--checkpoints-dir", str(tmp_path / "run")]
    process = start(*torchrun(2, TRAIN_XLA[-1]), *flags)
    printed = finish(process)
    assert process.returncode != 0
    sentence = "torchrun is for run_pretrain.py; run_pretrain_xla.py starts its own processes"
    assert f"error: {sentence}" in printed
    assert "gpt2_xla/" not in printed  # no traceback through the program's files
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run_here(monkeypatch, run_pretrain_xla.main, "--no-such-flag") == 2
    (found,) = mistakes_in(capsys.readouterr().err)
    assert found.startswith(sentence)


def test_unknown_flags_and_presets_are_refused_with_the_nearest(mistakes_of):
    found = mistakes_of("--preset", "gpt2-x", "--leraning-rate", "1e-3", "--device", "gpu")
    assert len(found) == 4  # and --train-dir is missing
    assert "unknown flag --leraning-rate, did you mean --learning-rate?" in found[0]
    assert "--preset gpt2-x is unknown, did you mean gpt2-xl?" in found[1]
    assert "--device gpu is not one of auto, cpu, cuda" in found[2]


def test_a_flag_of_the_other_program_is_said_to_be_that_ones(mistakes_of, monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "own.flags"
    recipe.write_text("--scan-layers")
    found = mistakes_of("--attention", "flash", "--recipe", recipe)
    assert found[:2] == [
        "unknown flag --attention, which belongs to run_pretrain_xla.py",
        f"in recipe {recipe}: unknown flag --scan-layers, which belongs to run_pretrain_xla.py",
    ]
    assert run_here(monkeypatch, run_pretrain_xla.main, "--no-compile", "--find-batch", "--compil-cache", "x") == 2
    assert mistakes_in(capsys.readouterr().err)[:3] == [
        "unknown flag --no-compile, which belongs to run_pretrain.py",
        "unknown flag --find-batch, which belongs to run_pretrain.py",
        "unknown flag --compil-cache, did you mean --compile-cache?",
    ]


@CPU_ONLY
def test_what_the_device_cannot_do_is_refused(mistakes_of, text_data, tmp_path):
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run")
    (found,) = mistakes_of(*flags, "--mixed-precision", "fp16")
    assert "--mixed-precision fp16 needs a CUDA GPU, but the device is cpu; use --mixed-precision bf16 or no" in found
    (found,) = mistakes_of(*flags, "--ddp-backend", "nccl")
    assert "--ddp-backend nccl needs CUDA devices" in found
    (found,) = mistakes_of(*flags, "--device", "cuda")
    assert "--device cuda: torch" in found
    assert "finds no such device here" in found


# The run folder


def test_a_run_folder_that_cannot_be_written_is_named(mistakes_of, text_data, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "metrics.jsonl").mkdir(parents=True)
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir")
    for folder in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/run"), tmp_path / "taken"):
        (found,) = mistakes_of(*flags, folder)
        assert "--checkpoints-dir" in found
        assert str(folder) in found
        assert "cannot be written" in found


def test_with_never_a_run_does_not_write_into_another_ones_folder(mistakes_of, own_run, text_data):
    before = sorted(own_run.rglob("*"))
    flags = (*FOUR_STEPS, "--min-lr", 9, *data_flags(text_data), "--checkpoints-dir", own_run)
    found = mistakes_of(*flags, "--resume", "never")
    assert len(found) == 2  # together with the other mistakes
    assert (
        f"--checkpoints-dir {own_run} already holds step-00000004 of another run; leave --resume never out" in found[0]
    )
    (found,) = mistakes_of(
        "--checkpoints-dir", own_run, "--resume", "never"
    )  # no word of the data, which the run knows
    assert "already holds step-00000004" in found
    assert sorted(own_run.rglob("*")) == before


def test_the_run_folder_alone_continues_with_the_saved_options(pretrain, own_run):
    assert pretrain("--checkpoints-dir", own_run, "--train-steps", 6)[0] == 0
    before, after = (checkpoint.read_state(own_run / f"step-0000000{step}").config for step in (4, 6))
    assert after == before | {"run": before["run"] | {"train_steps": 6, "checkpoints_dir": str(own_run)}}
    assert [record["step"] for record in records(own_run)] == [1, 2, 3, 4, 5, 6]


def test_the_very_same_command_resumes_and_says_so(pretrain, own_run, text_data):
    status, printed = pretrain(*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", own_run)
    assert (status, "Traceback" in printed) == (0, False)
    assert f"resuming after step 4 of 4 from {own_run / 'step-00000004'}\n" in printed
    assert "all 4 steps are done" in printed


def test_the_very_same_command_continues_a_branch(pretrain, own_run, tmp_path):
    command = ("--from-checkpoint", own_run / "step-00000002", "--checkpoints-dir", tmp_path / "branch")
    for steps, begin in ((3, own_run / "step-00000002"), (4, tmp_path / "branch" / "step-00000003")):
        status, printed = pretrain(*command, "--train-steps", steps)
        assert status == 0
        assert f"resuming after step {steps - 1} of {steps} from {begin}\n" in printed
    assert [record["step"] for record in records(tmp_path / "branch")] == [3, 4]


def test_conflicting_model_flags_on_resume_are_refused_each_by_name(mistakes_of, own_run):
    conflicts = ("--d-model", 32, "--num-layers", 3, "--no-tie-weights", "--activation", "relu", "--seq-length", 16)
    found = mistakes_of("--checkpoints-dir", own_run, *conflicts, "--dropout", 0.1)
    names = ("--seq-length 16", "--d-model 32", "--num-layers 3", "--activation relu", "--tie-weights off")
    assert len(found) == len(names)
    for name, mistake in zip(names, found, strict=True):
        assert mistake.startswith(f"{name} conflicts with step-00000004, which has ")


def test_resume_passes_over_a_corrupt_checkpoint_and_says_so(pretrain, own_run):
    flip_byte(own_run / "step-00000004" / "model.safetensors")
    status, printed = pretrain("--checkpoints-dir", own_run)
    assert status == 0
    assert re.search(
        r"^warning: checkpoint \S+step-00000004 is damaged: .*model\.safetensors was altered", printed, re.MULTILINE
    )
    assert f"falling back to checkpoint {own_run / 'step-00000002'}" in printed
    assert "continuing at 2" in printed
    assert checkpoint.problems(own_run / "step-00000004") == []  # trained again, and replaced


def test_resume_without_a_good_checkpoint_is_refused(mistakes_of, own_run, text_data, tmp_path):
    for step in (2, 4):
        (own_run / f"step-{step:08d}" / "trainer_state" / "state.json").unlink()
    (found,) = mistakes_of("--resume", "must", "--checkpoints-dir", own_run)
    assert found == f"--resume must: there is no good checkpoint in --checkpoints-dir {own_run}"
    (found,) = mistakes_of("--resume", "must", "--checkpoints-dir", tmp_path / "absent")
    assert "there is no good checkpoint in" in found
    (found,) = mistakes_of(*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", own_run)  # nor is it overwritten
    assert found.startswith(
        f"--checkpoints-dir {own_run} holds checkpoints, step-00000004 the newest, but all are damaged"
    )
    assert mistakes_of("--checkpoints-dir", own_run) == [found]
    (found,) = mistakes_of("--from-checkpoint", own_run / "step-00000004")
    assert found.startswith(f"--from-checkpoint {own_run / 'step-00000004'} is a damaged checkpoint")
    (found,) = mistakes_of("--from-checkpoint", tmp_path / "absent")
    assert "no such folder" in found


def test_a_checkpoint_of_another_tokenizer_is_refused(mistakes_of, own_run, own_data):
    for manifest in own_data.glob("*/manifest.json"):
        text = manifest.read_text()
        manifest.write_text(text.replace('"tokenizer_hash": "', '"tokenizer_hash": "0'))
    (found,) = mistakes_of("--checkpoints-dir", own_run, *data_flags(own_data), "--train-steps", 5)
    assert "the checkpoint was trained on tokens of bytes" in found
    assert "prepare the data with the checkpoint's tokenizer" in found


def test_do_test_evaluates_and_leaves_the_run_as_it_was(pretrain, mistakes_of, own_run, text_data, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in own_run.rglob("*")}
    status, printed = pretrain("--do-test", "--checkpoints-dir", own_run)
    assert "optimizer" not in printed
    assert status == 0
    loss = checkpoint.read_state(own_run / "step-00000004").valid_loss
    assert f"4 steps trained: validation loss {loss:.4f}, perplexity {np.exp(loss):.2f}" in printed
    elsewhere = ("--from-checkpoint", own_run / "step-00000004", "--checkpoints-dir", tmp_path / "absent")
    assert pretrain("--do-test", *elsewhere)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in own_run.rglob("*")} == before
    assert not (tmp_path / "absent").exists()


# XLA


@pytest.mark.xla
def test_xla_tells_what_its_installation_lacks(monkeypatch, capsys, text_data, tmp_path):
    flags = [flag for flag in FOUR_STEPS if flag not in ("--device", "cpu")]
    flags += [*data_flags(text_data), "--checkpoints-dir", str(tmp_path / "run")]

    def mistakes() -> list[str]:
        assert run_here(monkeypatch, run_pretrain_xla.main, *flags) == 2
        return mistakes_in(capsys.readouterr().err)

    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    (found,) = mistakes()
    assert "PJRT_DEVICE is not set; start with PJRT_DEVICE=TPU or CUDA" in found
    assert "python scripts/doctor.py tells" in found
    for device in ("CUDA:0", "tpu", ""):
        monkeypatch.setenv("PJRT_DEVICE", device)
        (found,) = mistakes()
        assert f"PJRT_DEVICE={device} is not supported; use TPU, CUDA or CPU" in found
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("XLA_USE_BF16", "1")
    (found,) = mistakes()
    assert found.startswith("XLA_USE_BF16=1 makes torch_xla keep float32 tensors in bf16")
    assert "unset XLA_USE_BF16" in found
    monkeypatch.delenv("XLA_USE_BF16")
    for count in ("0", "two"):
        monkeypatch.setenv("CPU_NUM_DEVICES", count)
        (found,) = mistakes()
        assert found.startswith(f"CPU_NUM_DEVICES={count} is not a number of devices, 1 or more")
    monkeypatch.setenv("CPU_NUM_DEVICES", "2")  # replicas would be threads, whose collectives hang or crash
    (found,) = mistakes()
    assert "unset CPU_NUM_DEVICES, or add --sharding fsdp" in found
    monkeypatch.delenv("CPU_NUM_DEVICES")
    monkeypatch.setenv("XLA_USE_SPMD", "1")
    (found,) = mistakes()
    assert "unset XLA_USE_SPMD, or use --sharding fsdp" in found
    monkeypatch.delenv("XLA_USE_SPMD")
    # A torch_xla of another version, found before the real one.
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    metadata = tmp_path / "site" / "torch_xla-2.7.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch_xla\nVersion: 2.7.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delenv("PJRT_DEVICE")
    found = mistakes()
    assert len(found) == 2
    assert found[0].startswith("torch_xla 2.7.0 does not fit torch 2.")
    assert "requirements-xla_tpu.txt" in found[0]


def test_xla_without_torch_xla_is_one_sentence(text_data, tmp_path):
    # An import system that finds every package but torch_xla, as on a machine without it.
    code = (
        "import importlib.machinery, runpy, sys\n"
        "class Finder(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.partition('.')[0] == 'torch_xla' else super().find_spec(name, path, target)\n"
        "sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path"
        " if 'editable' not in str(f)]\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = (
        *data_flags(text_data),
        "--preset",
        "tiny",
        "--train-batch-size",
        "8",
        "--checkpoints-dir",
        tmp_path / "run",
    )
    process = start(*PYTHON, "-c", code, TRAIN_XLA[-1], *flags)
    printed = finish(process)
    assert process.returncode == 2, printed
    assert printed.startswith("error: torch_xla is not installed; pip install -r requirements-xla_tpu.txt")
    assert len(printed.splitlines()) == 1


@pytest.mark.xla
def test_xla_replicas_tell_of_damaged_data_and_of_fp16(own_data, tmp_path):
    flags = [flag for flag in FOUR_STEPS if flag not in ("--device", "cpu")]
    flags += [*data_flags(own_data), "--checkpoints-dir", str(tmp_path / "run")]
    half = start(*TRAIN_XLA, *flags, "--mixed-precision", "fp16")
    flip_byte(own_data / "valid" / "valid_00000.npy")
    damaged = start(*TRAIN_XLA, *flags)
    for process, sentence in (
        (half, "--mixed-precision fp16 is not supported on XLA devices; use --mixed-precision bf16 or no"),
        (damaged, "its sha256 differs"),
    ):
        printed = finish(process)
        assert process.returncode == 2, printed
        assert sentence in "".join(mistakes_in(printed))
        assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_plain_command_exits_with_status_2(text_data):
    process = start(*TRAIN, "--preset", "gpt3", "--train-dir", text_data / "train", "--seq-length", "64")
    printed = finish(process)
    assert process.returncode == 2
    assert (
        printed
        == "error: --preset gpt3 is unknown, did you mean gpt2?; there are tiny, gpt2, gpt2-6h, gpt2-medium, gpt2-large, gpt2-xl, modern-124m\n"
    )


# What a run may not do to another one, and what it does not need


def test_a_branch_into_the_folder_of_another_run_is_refused(mistakes_of, own_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(own_run, other)
    (found,) = mistakes_of(
        "--from-checkpoint", own_run / "step-00000004", "--checkpoints-dir", other, "--train-steps", 6
    )
    assert f"--checkpoints-dir {other} already holds step-00000004 of another run" in found


def test_resume_and_from_checkpoint_exclude_each_other(mistakes_of, own_run):
    (found,) = mistakes_of("--resume", "must", "--from-checkpoint", own_run / "step-00000004")
    assert "use one of them" in found


def test_fewer_train_steps_than_the_checkpoint_has_done(mistakes_of, own_run):
    (found,) = mistakes_of("--checkpoints-dir", own_run, "--train-steps", 2)
    assert "--train-steps 2 is below the 4 steps that the checkpoint has done" in found


def test_a_mistake_with_a_saved_option_says_where_it_was_saved(mistakes_of, own_run):
    (found,) = mistakes_of("--checkpoints-dir", own_run, "--train-steps", 6, "--min-lr", 9)
    assert "--learning-rate 0.001" in found
    assert found.endswith(f"(--learning-rate 0.001: saved in {own_run / 'step-00000004'})")


def test_do_test_needs_no_training_data(pretrain, own_run, text_data):
    flags = ("--train-dir", "gone", "--valid-dir", text_data / "valid")
    status, printed = pretrain("--do-test", "--checkpoints-dir", own_run, *flags)
    assert status == 0, printed
    assert "4 steps trained: validation loss" in printed


def test_an_unknown_flag_does_not_hide_the_other_mistakes(mistakes_of, own_data, tmp_path):
    flags = (*FOUR_STEPS, *data_flags(own_data), "--checkpoints-dir", tmp_path / "run")
    found = mistakes_of(
        *flags, "--lerning-rate", 3, "--num-heads", 5, "--mixed-precision", "fp16", "--ddp-backend", "nccl"
    )
    text = "\n".join(found)
    for part in (
        "unknown flag --lerning-rate, did you mean --learning-rate?",
        "--num-heads 5",
        "fp16 needs",
        "nccl needs",
    ):
        assert part in text


def test_bare_shards_are_not_said_to_be_checked(pretrain, own_data, tmp_path):
    for manifest in own_data.glob("*/manifest.json"):
        manifest.unlink()
    flags = (*FOUR_STEPS, *data_flags(own_data), "--vocab-size", 257, "--checkpoints-dir", tmp_path / "run")
    status, printed = pretrain(*flags)
    assert status == 0, printed
    assert "lengths checked" in printed
    assert "sha256" not in printed


@pytest.mark.xla
def test_tpu_without_a_tpu(monkeypatch):
    from gpt2_xla.runtime.xla_installation import installation_mistakes

    if Path("/dev/accel0").exists() or Path("/dev/vfio").exists():
        pytest.skip("this machine may have a TPU")
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    (found,) = installation_mistakes()
    assert "this machine has no TPU" in found


def test_an_address_that_is_none_hides_no_other_mistake(mistakes_of, tmp_path):
    found = mistakes_of(
        "--remote-dir", "/tmp/x", "--learning-rate", "-1", "--num-heads", "7", "--checkpoints-dir", tmp_path / "run"
    )
    assert len([line for line in found if line.startswith(("--remote-dir", "--learning-rate", "--d-model"))]) == 3
