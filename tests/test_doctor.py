"""The doctor finds what is wrong with a machine that was broken on purpose, says how to mend it, and always ends."""

import os
import re
import shutil
from pathlib import Path

import pytest
from commands import PATIENCE, PYTHON, ROOT, finish, start, still_alive
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla.doctor import devices, installation
from gpt2_xla.doctor.children import Deadline, Outcome, run_child
from gpt2_xla.doctor.finding import Finding
from gpt2_xla.doctor.folders import folder_findings
from gpt2_xla.doctor.host import disk, memory
from gpt2_xla.doctor.place import Place, place_findings, recognise
from gpt2_xla.doctor.variables import variables
from gpt2_xla.script_config import DoctorConfig

PATIENT = ("--time-limit", "600")  # other tests hold the cores
HERE, ON_TPU = Place("other", ()), Place("tpu-vm", ("TPU v4",) * 4)


def doctor(*flags, **environment):
    """Run scripts/doctor.py; its exit status, and {name: (state, text and mend)} of what it printed."""
    process = start(*PYTHON, str(ROOT / "scripts" / "doctor.py"), *flags, **environment)
    printed = finish(process)
    assert "Traceback" not in printed
    found = re.findall(r"^(ok|warning|problem|not run) +(\S+(?: \S+)*?)  +(.*(?:\n +→ .*)?)", printed, re.MULTILINE)
    return process.returncode, {name: (state, text) for state, name, text in found}, printed


def by_name(findings):
    """Findings by their names, each name once."""
    found = list(findings)
    named = {finding.name: finding for finding in found}
    assert len(named) == len(found)
    return named


def troubles(findings):
    """What is neither ok nor left out; each has a command that mends it."""
    found = [finding for finding in findings if finding.state in ("warning", "problem")]
    assert all(finding.mend for finding in found)
    return {finding.name: finding for finding in found}


@pytest.fixture
def data(text_data, tmp_path):
    return Path(shutil.copytree(text_data, tmp_path / "data"))


@pytest.fixture
def run_folder(text_data, tmp_path, monkeypatch):
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path / "run"
    flags = (*FOUR_STEPS, "--train-dir", text_data / "train", "--checkpoints-dir", folder, "--save-interval", "2")
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    return folder


# The whole examination


@pytest.mark.xla
def test_a_machine_without_an_accelerator_is_examined_and_found_well(text_data, tmp_path):
    flags = ("--train-dir", text_data / "train", "--valid-dir", text_data / "valid", "--checkpoints-dir", tmp_path)
    flags += PATIENT
    secrets = {"HF_TOKEN": "hf_do_not_tell", "WANDB_API_KEY": "nor_this"}
    status, found, printed = doctor(*flags, WANDB_MODE="offline", **secrets)
    for name in ("python", "packages", "torch_xla", "place", "environment", "train data", "valid data", "checkpoint"):
        assert found[name][0] == "ok", printed
    for name, words in (
        ("torch sum", "gloo, 2 processes, right"),
        ("XLA", "1 × XLA cpu"),
        ("XLA matmul", "right, "),
        ("XLA sum", "right, "),
        ("cpu matmul", "right, "),
    ):
        assert found[name][0] == "ok", printed
        assert words in found[name][1]
    assert found["train data"][1].endswith("40,000 tokens of bytes in 1 shards, sha256 checked")
    assert found["TPU"] == ("not run", "no TPU here")
    for told in ("HF_TOKEN (set)", "PJRT_DEVICE=CPU", "WANDB_API_KEY (set)", "WANDB_MODE=offline"):
        assert told in found["environment"][1]
    assert "hf_do_not_tell" not in printed
    assert "nor_this" not in printed
    assert status == int(any(state == "problem" for state, _ in found.values()))


@pytest.mark.xla
def test_a_broken_machine_is_told_problem_by_problem_with_exit_status_1(data, tmp_path):
    shard = data / "train" / "train_00000.npy"
    os.truncate(shard, shard.stat().st_size - 100)
    (tmp_path / "file").write_text("")
    flags = (*PATIENT, "--train-dir", data / "train", "--checkpoints-dir", tmp_path / "file" / "run")
    status, found, printed = doctor(*flags, PJRT_DEVICE="FOO", KAGGLE_KERNEL_RUN_TYPE="Interactive")
    assert status == 1
    state, text = found["PJRT_DEVICE"]
    assert (state, "→ export PJRT_DEVICE=CPU" in text) == ("problem", True)
    assert found["place"][1].startswith("Kaggle")
    assert "/kaggle/working/runs/gpt2" in found["run folder"][1]
    state, text = found["train data"]
    assert state == "problem"
    assert "bytes, its header promises" in text
    assert f"→ rm -r {data / 'train'} && " in text
    assert found["disk"][0] == "problem"
    assert f"→ mv {tmp_path / 'file'} {tmp_path / 'file'}.old" in found["disk"][1]
    assert found["XLA"] == ("not run", "PJRT_DEVICE=FOO is not supported")
    assert re.fullmatch(r"3 problems and \d warnings?", printed.splitlines()[-1])


def test_wrong_flags_are_exit_status_2():
    status, _, printed = doctor("--train-dri", "x", "--verify-data", "some")
    assert status == 2
    assert "unknown flag --train-dri, did you mean --train-dir?" in printed
    status, _, printed = doctor("--time-limit", "3", "--train-dir", "x:-1")
    assert status == 2
    assert "--time-limit 3 must be at least 10" in printed


# Children


def test_a_child_that_hangs_is_killed_with_what_it_started_and_keeps_what_it_said(tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import subprocess, sys, time\n"
        "from gpt2_xla.doctor.children import report\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "report(stage='begin', pid=child.pid)\n"
        "print('some noise', flush=True)\n"
        "time.sleep(1000)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for seconds in (2, 10, 60):  # a busy machine may take longer until it says something
        outcome = run_child("hangs", seconds=seconds, environ=environ)
        assert outcome.failure == f"did not end within {seconds} s and was killed"
        if outcome.facts:
            break
    (fact,) = outcome.facts
    assert fact["stage"] == "begin"
    assert not still_alive([fact["pid"]])


@pytest.mark.xla
def test_a_torch_xla_that_aborts_is_a_finding_with_its_last_words(tmp_path):
    environ = {**os.environ, "XLA_FLAGS": "--xla_no_such_flag=1", "PJRT_DEVICE": "CPU"}
    found = troubles(devices.xla_devices(Deadline(PATIENCE), HERE, environ))
    assert found["XLA CPU"].text.endswith("Unknown flag in XLA_FLAGS: --xla_no_such_flag=1")
    assert found["XLA CPU"].mend == "unset XLA_FLAGS"


@pytest.mark.xla
def test_a_torch_xla_that_hangs_is_a_finding(tmp_path):
    (tmp_path / "torch_xla").mkdir()
    (tmp_path / "torch_xla" / "__init__.py").write_text("import time; time.sleep(1000)")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "PJRT_DEVICE": "CPU"}
    found = troubles(devices.xla_devices(Deadline(3), HERE, environ))
    assert "did not end within 3 s" in found["XLA CPU"].text
    assert "--time-limit 300" in found["XLA CPU"].mend


# Measurements that only another machine can make, judged


def judge_xla(monkeypatch, facts, failure=None):
    monkeypatch.setattr(devices, "run_child", lambda *_, **__: Outcome(facts, failure))
    monkeypatch.setattr(devices, "installed", lambda _: "2.9.0")
    monkeypatch.setattr(devices, "package_mistakes", list)
    return by_name(devices.xla_devices(Deadline(60), ON_TPU, {"PJRT_DEVICE": "TPU"}))


def replica_facts(rank, error=0.001, right=True, world=4):
    who = {"rank": rank, "world": world}
    return [
        {
            "stage": "device",
            "name": "TPU v4",
            "type": "TPU",
            "used": 0,
            "total": 2**35,
            "coordinates": [rank, 0, 0],
            **who,
        },
        {
            "stage": "matmul",
            "device": f"xla:{rank}",
            "dtype": "bfloat16",
            "size": 4096,
            "seconds": 1e-3,
            "error": error,
        },
        {"stage": "all-reduce", "bytes": 2**24, "seconds": 1e-3 * (rank + 1), "right": right, **who},
    ]


def test_a_tpu_host_is_summed_up_in_three_lines(monkeypatch):
    found = judge_xla(monkeypatch, [fact for rank in range(4) for fact in replica_facts(rank)])
    assert all(finding.state == "ok" for finding in found.values())
    assert "4 × XLA TPU v4, 4 of them on this host, at [0, 0, 0] [1, 0, 0]" in found["XLA"].text
    assert "32.0 GiB each" in found["XLA"].text
    assert "137 TFLOP/s" in found["XLA matmul"].text
    assert found["XLA sum"].text == "16 MiB over 4 × TPU v4, right, 4.0 ms"


def test_a_replica_that_computes_wrongly_or_is_silent_is_named(monkeypatch):
    facts = [
        *replica_facts(0),
        *replica_facts(1, error=float("nan"), right=False),
        *replica_facts(2),
        *replica_facts(3),
    ]
    found = judge_xla(monkeypatch, facts)
    assert "wrong results on xla:1" in found["XLA matmul"].text
    assert "wrong sum on 1" in found["XLA sum"].text
    silent = [fact for rank in range(4) for fact in replica_facts(rank)[: 2 if rank in (1, 3) else 3]]
    found = judge_xla(monkeypatch, silent, "did not end within 60 s and was killed")
    assert found["XLA sum"].state == "problem"
    assert found["XLA sum"].text.startswith("no answer of 1, 3 over 4 × TPU v4: did not end within 60 s")
    assert judge_xla(monkeypatch, replica_facts(0, world=1))["XLA"].state == "warning"  # of 4 chips


# The place


@pytest.mark.parametrize(
    ("environ", "folder", "kind"),
    [
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch", "COLAB_GPU": ""}, None, "kaggle"),
        ({}, "kaggle/working", "kaggle"),
        ({"COLAB_RELEASE_TAG": "release-colab-2026"}, None, "colab"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, None, "tpu-vm"),
        ({}, None, "other"),
    ],
)
def test_places_are_recognised(environ, folder, kind, tmp_path):
    if folder:
        (tmp_path / folder).mkdir(parents=True)
    assert recognise(environ, tmp_path).kind == kind


def fake_chips(root, count):
    for number in range(count):
        folder = root / "sys/bus/pci/devices" / f"0000:00:0{number}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text("0x0063\n" if number else "0xffff\n")  # the first is no TPU


def test_chips_on_the_bus_make_a_tpu_vm_and_must_have_their_device_files(tmp_path):
    fake_chips(tmp_path, 5)
    place = recognise({}, tmp_path)
    assert place == Place("tpu-vm", ("TPU v5e",) * 4)
    found = by_name(place_findings(place, {"TPU_WORKER_HOSTNAMES": "a,b"}, Path("runs"), tmp_path))
    assert "4 × TPU v5e on the PCI bus" in found["place"].text
    assert "2 hosts" in found["place"].text
    assert found["TPU access"].state == "problem"
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "0").write_text("")
    assert "TPU access" not in by_name(place_findings(place, {}, Path("runs"), tmp_path))


def test_a_run_folder_that_a_notebook_service_forgets_is_told():
    colab = Place("colab", ())
    assert "run folder" in troubles(place_findings(colab, {}, Path("/content/runs")))
    assert not troubles(place_findings(colab, {}, Path("/content/drive/MyDrive/runs")))


# Variables


@pytest.mark.parametrize(
    ("environ", "place", "name", "state"),
    [
        ({"PJRT_DEVICE": "TPU"}, HERE, "PJRT_DEVICE", "problem"),
        ({}, ON_TPU, "PJRT_DEVICE", "problem"),
        ({"PJRT_DEVICE": "CPU"}, ON_TPU, "PJRT_DEVICE", "warning"),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}, HERE, "CPU_NUM_DEVICES", "warning"),
        ({"XLA_DOWNCAST_BF16": "1"}, HERE, "XLA_DOWNCAST_BF16", "problem"),
        ({"PT_XLA_DEBUG": "1"}, HERE, "PT_XLA_DEBUG", "warning"),
        ({"XLA_FLAGS": "--xla_dump_to=/tmp/x"}, HERE, "XLA_FLAGS", "warning"),
        ({"PJRT_DEVICE": "TPU", "TPU_PROCESS_ADDRESSES": "local"}, ON_TPU, "TPU_PROCESS_ADDRESSES", "problem"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, HERE, "torchrun", "problem"),
        ({"CUDA_VISIBLE_DEVICES": ""}, HERE, "CUDA_VISIBLE_DEVICES", "warning"),
        ({"OMP_NUM_THREADS": "64"}, HERE, "OMP_NUM_THREADS", "warning"),
        ({"OMP_NUM_THREADS": "all"}, HERE, "OMP_NUM_THREADS", "problem"),
    ],
)
def test_variables_that_hurt_are_told_with_how_to_mend_them(environ, place, name, state):
    found = troubles(variables(environ, place, cores=2))
    assert {name: finding.state for name, finding in found.items()} == {name: state}
    assert found[name].mend.startswith(("unset ", "export "))


def test_harmless_variables_are_no_trouble_and_secrets_stay_secret():
    environ = {
        "PJRT_DEVICE": "CPU",
        "XLA_USE_BF16": "0",
        "HF_HOME": "/x",
        "TOKENIZERS_PARALLELISM": "1",
        "PATH": "/bin",
    }
    environ |= {"HF_TOKEN": "hf_abc", "WANDB_BASE_URL": "https://me:pw@host", "NCCL_DEBUG": "INFO", "RANK": "0"}
    found = list(variables(environ | {"TORCHELASTIC_RUN_ID": "1"}, HERE, cores=2))
    assert not troubles(found)
    (told,) = (finding.text for finding in found if finding.name == "environment")
    assert "HF_HOME=/x, HF_TOKEN (set), NCCL_DEBUG=INFO" in told
    assert not [secret for secret in ("hf_abc", "pw", "PATH") if secret in told]


# Folders


def test_a_damaged_checkpoint_is_told_with_the_one_to_fall_back_to(run_folder):
    config = DoctorConfig(checkpoints_dir=str(run_folder))
    assert by_name(folder_findings(config))["checkpoint"].text == f"{run_folder / 'step-00000004'} is whole"
    for step, state in ((4, "warning"), (2, "problem")):
        os.truncate(run_folder / f"step-0000000{step}" / "model.safetensors", 100)
        found = by_name(folder_findings(config))["checkpoint"]
        assert found.state == state
        assert "step-00000004 is damaged: " in found.text
        assert ("a resume continues from step-00000002" in found.text) == (step == 4)


def test_data_that_is_not_there_or_has_changed_is_told(data, tmp_path):
    shard = data / "valid" / "valid_00000.npy"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 1
    shard.write_bytes(content)
    train, valid = f"web={tmp_path / 'gone' / 'train'}:1", str(data / "valid")
    found = by_name(folder_findings(DoctorConfig((train,), valid, "auto", str(tmp_path))))
    assert found["train data"].mend.endswith(f"prepare_text.py --source YOUR_TEXT --output-dir {tmp_path / 'gone'}")
    assert "sha256 differs" in found["valid data"].text
    assert by_name(folder_findings(DoctorConfig((), valid, "size", str(tmp_path))))["valid data"].state == "ok"


def test_a_disk_that_cannot_be_written_or_is_nearly_full_is_told(tmp_path, monkeypatch):
    assert disk(Path("/proc/run")).state == "problem"
    free = 10**11
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free))
    assert disk(tmp_path / "a" / "b").state in ("ok", "warning")  # by its speed
    assert list(tmp_path.iterdir()) == []
    free = 10**9
    full = disk(tmp_path)
    assert (full.state, "0.9 GiB free" in full.text) == ("problem", True)


def test_memory_is_what_the_container_may_use(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    assert memory(tmp_path) == (800 * 1024, 1000 * 1024, False)
    cgroup = tmp_path / "sys" / "fs" / "cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("102400\n")
    assert memory(tmp_path) == (800 * 1024, 1000 * 1024, False)
    (cgroup / "memory.max").write_text("204800\n")
    assert memory(tmp_path) == (102400, 204800, True)


# The installation


def test_versions_that_do_not_fit_are_told(tmp_path, monkeypatch):
    def pretend(name, version):
        metadata = tmp_path / "site" / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    assert not [f for f in installation.installation(has_tpu=False) if f.state == "problem"]
    for name, version in (("torch_xla", "2.7.0"), ("safetensors", "0.3.1"), ("tqdm", "99.0")):
        pretend(name, version)
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = troubles(installation.installation(has_tpu=False))
    assert found["torch_xla"].text.startswith("torch_xla 2.7.0 does not fit torch ")
    assert found["packages"].text == "safetensors 0.3.1 is older than 0.4"
    assert "tqdm 99.0 (4" in found["versions"].text
    assert all(
        "pip install -r requirements-xla_tpu.txt -c constraints.txt" in finding.mend for finding in found.values()
    )


def test_a_finding_is_one_line_with_its_mend_beneath():
    shown = Finding("disk", "problem", "a\nb", "rm x").shown()
    assert shown == "problem  disk            a b\n                         → rm x"
