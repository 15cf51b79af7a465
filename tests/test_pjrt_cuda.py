"""PJRT_DEVICE=CUDA: the plugin's registration and rename in every process, training through it, and each mistake's sentence.

A CPU that comes as a plugin stands in for the CUDA plugin (tests/cuda_stand_in.py).
"""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from commands import PATIENCE, PYTHON, ROOT, TINY, TRAIN_XLA, data_flags, finish, losses, records, run, start

from gpt2_xla.doctor import cuda_plugin, devices
from gpt2_xla.doctor.children import Deadline
from gpt2_xla.doctor.place import Place
from gpt2_xla.runtime import cuda_host
from gpt2_xla.runtime.cuda_host import Driver, Gpu, cuda_mistakes
from gpt2_xla.runtime.xla_installation import installation_mistakes

pytestmark = pytest.mark.xla

STAND_IN = (*PYTHON, str(ROOT / "tests" / "cuda_stand_in.py"))
needs_stand_in = pytest.mark.skipif(
    importlib.util.find_spec("xla_plugins") is None or shutil.which("cc") is None,
    reason="needs xla-cpu-pjrt, a CPU that comes as a PJRT plugin, and a C compiler for its padding",
)
FLAGS = [
    *TINY,
    "--num-layers",
    "1",
    "--d-model",
    "32",
    "--gradient-accum-step",
    "2",
    "--warmup-steps",
    "5",
    "--train-steps",
    "20",
]
H100 = Driver("550.54.15", 12_040, tuple(Gpu("NVIDIA H100 80GB HBM3", f"GPU-{n}aaa-bbb") for n in range(4)))


def trained(command, text_data, folder, *flags):
    """The losses of 20 steps."""
    run(*command, *FLAGS, *data_flags(text_data), "--checkpoints-dir", folder, *flags)
    return losses(folder)


# Training through the plugin


@needs_stand_in
@pytest.mark.parametrize(("precision", "start_method", "tolerance"), [("bf16", "spawn", 1e-3), ("no", "fork", 1e-5)])
def test_the_plugin_trains_as_the_cpu_does(precision, start_method, tolerance, text_data, tmp_path):
    flags = ("--mixed-precision", precision, "--mp-start-method", start_method)
    plugin = trained((*STAND_IN, "train"), text_data, tmp_path / "plugin", *flags)
    cpu = trained(TRAIN_XLA, text_data, tmp_path / "cpu", *flags)
    assert len(plugin) == len(cpu) == 20
    assert max(abs(a - b) for a, b in zip(plugin, cpu, strict=True)) <= tolerance
    assert plugin[-1] < plugin[0] - 0.5
    last = records(tmp_path / "plugin")[-1]
    assert last["compiles"] == records(tmp_path / "cpu")[-1]["compiles"]
    assert last["skipped_steps"] == 0
    assert last["peak_memory_bytes"] is None  # this plugin does not tell


@needs_stand_in
def test_the_sharded_path_and_generation_reach_the_plugin(text_data, tmp_path):
    flags = (*data_flags(text_data), "--checkpoints-dir", tmp_path, "--sharding", "fsdp", "--train-steps", "3")
    output = run(*STAND_IN, "train", *FLAGS, *flags, GPU_NUM_DEVICES="4")
    assert "4 × XLA CUDA" in output
    assert len(losses(tmp_path)) == 3
    flags = ("--model", str(tmp_path), "--prompt", "The ", "--max-new-tokens", "8", "--json")
    texts = [run(*STAND_IN, "generate", *flags, "--device", device) for device in ("xla", "cpu")]
    samples = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in texts]
    assert samples[0] == samples[1]


@needs_stand_in
def test_the_doctor_looks_at_the_plugins_devices():
    output = run(*STAND_IN, "doctor")
    facts = [
        json.loads(line.partition("gpt2_xla.doctor ")[2]) for line in output.splitlines() if "gpt2_xla.doctor" in line
    ]
    assert [fact["stage"] for fact in facts] == ["device", "matmul", "all-reduce"]
    assert facts[0]["type"] == "CUDA"
    assert facts[2]["right"]


@needs_stand_in
def test_two_processes_meet_in_the_coordinator():
    # Without it neither would get its client. The CPU plugin then knows no others: each is rank 0 of 1, which xmp.spawn ends at.
    torchrun = {"RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "elsewhere.invalid"}
    output = finish(start(*STAND_IN, "doctor", GPU_NUM_DEVICES="2", **torchrun))
    assert output.count('"stage": "all-reduce"') == 2, output
    assert "2 results for replica 0" in output


@pytest.mark.parametrize(
    ("rank", "count", "spmd", "devices"), [("1", "2", False, [1]), (None, None, False, [0]), (None, None, True, [0, 1])]
)
def test_a_process_of_spawn_takes_its_gpu_and_spmd_all(rank, count, spmd, devices, monkeypatch):
    from gpt2_xla.runtime import pjrt_cuda

    monkeypatch.setenv("GPU_NUM_DEVICES", "2")
    monkeypatch.setenv("PJRT_ALLOCATOR_FRACTION", "0.5")
    monkeypatch.setenv("PJRT_ALLOCATOR_PREALLOCATE", "0")
    for name, value in (("RANK", rank), ("COUNT", count)):
        if value is not None:
            monkeypatch.setenv(f"PJRT_LOCAL_PROCESS_{name}", value)
    monkeypatch.setattr(pjrt_cuda.torch_xla.runtime, "is_spmd", lambda: spmd)
    plugin = pjrt_cuda.CudaPlugin(Path("x.so"))
    assert plugin.client_create_options() == {
        "platform_name": "cuda",
        "visible_devices": devices,
        "node_id": int(rank or 0),
        "num_nodes": int(count or 1),
        "allocator": "default",
        "preallocate": False,
        "memory_fraction": 0.5,
    }
    assert plugin.requires_xla_coordinator() == (count == "2")
    assert plugin.physical_chip_count() == 2


@pytest.mark.parametrize(("given", "order"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_cuda_counts_its_gpus_as_nvml_does(given, order, monkeypatch):
    from gpt2_xla.runtime import pjrt_cuda

    monkeypatch.setattr(
        pjrt_cuda.os, "environ", {"PJRT_DEVICE": "CUDA"} | ({"CUDA_DEVICE_ORDER": given} if given else {})
    )
    monkeypatch.setattr(pjrt_cuda, "knows_cuda", lambda: True)  # no plugin to be registered
    pjrt_cuda.register_devices()
    assert pjrt_cuda.os.environ["CUDA_DEVICE_ORDER"] == order


@needs_stand_in
def test_a_plugin_of_another_api_is_refused_with_both_versions():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import os; os.environ['PJRT_DEVICE'] = 'CUDA'\n"
        "from gpt2_xla.runtime import pjrt_cuda\n"
        "real = pjrt_cuda.load_api\n"
        "import cuda_stand_in\n"
        "pjrt_cuda.load_api = real\n"
        "from gpt2_xla.errors import run_main\n"
        "sys.exit(run_main(pjrt_cuda.register_devices))"
    )
    process = start(*PYTHON, "-c", code)
    output = finish(process)
    assert process.returncode == 2, output
    assert "speaks PJRT's C API 0.81, and torch_xla 2.9.0 speaks 0.75; pip install jax-cuda12-pjrt==0.7.1" in output


def test_the_fallback_asks_for_one_torch_only():
    told = (ROOT / "requirements-xla_cuda.txt").read_text()
    (filtered,) = re.findall(r"pip install -r <\((.*)\) torch==2.7.0 ", told)
    lines = subprocess.run(
        filtered.split(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True
    ).stdout
    assert "safetensors" in lines
    assert not re.findall(r"^torch\b", lines, re.MULTILINE)


def test_a_file_that_is_no_plugin_is_one_sentence(tmp_path):
    (tmp_path / "x.so").write_text("not a library")
    process = start(*STAND_IN, "doctor", STAND_IN=str(tmp_path / "x.so"))
    output = finish(process)
    assert process.returncode == 2, output
    assert "x.so is no PJRT plugin that can be loaded" in output
    assert "Traceback" not in output


@pytest.mark.skipif(cuda_host.plugin_library() is None, reason="needs jax-cuda12-pjrt, which is over 100 MB")
@pytest.mark.skipif(cuda_host.read_driver() is not None, reason="this machine may have a GPU")
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_the_cuda_plugin_without_a_gpu_is_one_sentence(sharding, text_data, tmp_path):
    library = str(cuda_host.plugin_library())
    flags = (*FLAGS, *data_flags(text_data), "--sharding", sharding, "--checkpoints-dir", tmp_path)
    process = start(*STAND_IN, "train", *flags, STAND_IN=library)
    output = finish(process)
    assert process.returncode == 2, output
    assert "error: PJRT_DEVICE=CUDA: the plugin could not open the GPU (No visible GPU devices); nvidia-smi" in output
    assert "Traceback" not in output


@pytest.mark.gpu
@pytest.mark.skipif(
    cuda_host.read_driver() is None or cuda_host.plugin_library() is None,
    reason="needs an NVIDIA GPU and jax-cuda12-pjrt",
)
def test_a_gpu_trains_as_the_cpu_does(text_data, tmp_path):
    flags = ("--mixed-precision", "no")
    folders = [tmp_path / device for device in ("CUDA", "CPU")]
    for folder in folders:
        flags_of_run = (*FLAGS, *data_flags(text_data), *flags, "--checkpoints-dir", folder)
        run(*TRAIN_XLA, *flags_of_run, PJRT_DEVICE=folder.name, GPU_NUM_DEVICES="1")
    gpu, cpu = map(losses, folders)
    assert max(abs(a - b) for a, b in zip(gpu, cpu, strict=True)) <= 1e-3
    assert records(folders[0])[-1]["peak_memory_bytes"] > 0


# What is wrong, told before anything starts


FAKE_NVML = """
#include <stdio.h>
#include <string.h>
static int gpus[2] = {0, 1};
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *cuda) { *cuda = 12040; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "550.54.15"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &gpus[index]; return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) { snprintf(text, size, "GPU %d", *(int *)device); return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { snprintf(text, size, "GPU-%d", *(int *)device); return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, for a library that answers as NVML does")
def test_nvml_is_asked_for_driver_and_gpus(tmp_path):
    (tmp_path / "nvml.c").write_text(FAKE_NVML)
    library = tmp_path / "nvml.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True, timeout=PATIENCE)
    driver = cuda_host.read_driver(str(library))
    assert driver == Driver("550.54.15", 12_040, (Gpu("GPU 0", "GPU-0"), Gpu("GPU 1", "GPU-1")))
    assert driver.cuda_text == "12.4"
    assert cuda_host.read_driver(str(tmp_path / "none.so")) is None


@pytest.fixture
def machine(monkeypatch):
    """A machine with everything; the returned function changes it and tells what is wrong then."""
    monkeypatch.setenv("PJRT_DEVICE", "CUDA")
    for name in ("GPU_NUM_DEVICES", "CUDA_VISIBLE_DEVICES", cuda_host.ALLOCATOR):
        monkeypatch.delenv(name, raising=False)

    def mistakes(driver=H100, plugin="0.7.1", torch_xla="2.9.0", library=True, **environment):
        versions = {cuda_host.PLUGIN: plugin, "torch_xla": torch_xla}

        def version(name):
            if versions.get(name) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        with monkeypatch.context() as patch:
            patch.setattr(cuda_host, "read_driver", lambda: driver)
            patch.setattr(cuda_host, "plugin_library", lambda: Path("x.so") if library else None)
            patch.setattr(importlib.metadata, "version", version)
            for name, value in environment.items():
                patch.setenv(name, value)
            return cuda_mistakes()

    return mistakes


def test_a_machine_with_everything_is_fine(machine):
    assert machine() == []
    assert machine(GPU_NUM_DEVICES="4", CUDA_VISIBLE_DEVICES="3,2,1,0", PJRT_ALLOCATOR_FRACTION="0.9") == []
    assert machine(driver=replace(H100, cuda=13_000)) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"plugin": None},
            "needs the package jax-cuda12-pjrt, which is not installed; pip install -r requirements-xla_cuda.txt",
        ),
        ({"plugin": "0.8.0"}, "jax-cuda12-pjrt 0.8.0 with torch_xla 2.9.0 was never tried"),
        ({"torch_xla": "2.10.0"}, "needs jax-cuda12-pjrt 0.7.1 with torch_xla 2.9"),
        ({"library": False}, "its xla_cuda_plugin.so is missing; pip install --force-reinstall jax-cuda12-pjrt==0.7.1"),
        ({"driver": None}, "NVIDIA's driver does not answer here"),
        ({"driver": replace(H100, gpus=())}, "NVIDIA's driver 550.54.15 finds no GPU"),
        ({"driver": replace(H100, cuda=11_040)}, "is for CUDA up to 11.4, and PJRT_DEVICE=CUDA needs one for CUDA 12"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES=-1 hides every GPU of this machine, which has 4"),
        ({"GPU_NUM_DEVICES": "8"}, "GPU_NUM_DEVICES=8, but there are 4 GPUs; set 1 to 4"),
        ({"GPU_NUM_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "1"}, "there are 1 GPUs with this CUDA_VISIBLE_DEVICES"),
        ({"GPU_NUM_DEVICES": "two"}, "GPU_NUM_DEVICES=two is not a number of GPUs; set 1 to 4"),
        ({"GPU_NUM_DEVICES": "0"}, "GPU_NUM_DEVICES=0 is not a number of GPUs"),
        ({"PJRT_ALLOCATOR_FRACTION": "90"}, "PJRT_ALLOCATOR_FRACTION=90 is not a share of the GPU's memory"),
    ],
)
def test_each_mistake_is_one_sentence(machine, changed, sentence):
    (found,) = machine(**changed)
    assert sentence in found


def test_all_mistakes_are_told_together(machine):
    assert len(machine(plugin=None, driver=replace(H100, cuda=11_000), GPU_NUM_DEVICES="9")) == 3


@pytest.mark.parametrize(
    ("listed", "numbers"),
    [("2,0", [2, 0]), ("GPU-1,GPU-3aaa", [1, 3]), ("0,7,1", [0]), ("", []), ("GPU-", []), ("MIG-x", [None])],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(listed, numbers, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    found = [H100.gpus.index(gpu) if gpu in H100.gpus else None for gpu in cuda_host.visible_gpus(H100)]
    assert found == numbers


def test_a_torch_xla_that_knows_cuda_needs_no_plugin(machine, monkeypatch, tmp_path):
    assert not cuda_host.knows_cuda()  # 2.9
    (tmp_path / "_internal").mkdir()
    (tmp_path / "_internal" / "gpu.py").write_text("")  # as in 2.7 and 2.8
    assert cuda_host.knows_cuda(tmp_path)
    monkeypatch.setattr(cuda_host, "knows_cuda", lambda: True)
    assert machine(plugin=None, torch_xla="2.7.0") == []


@pytest.mark.parametrize(("plugin", "state"), [("0.7.1", "ok"), ("0.8.0", "problem")])
def test_the_doctor_tells_of_the_plugin(plugin, state, monkeypatch):
    versions = {cuda_host.PLUGIN: plugin, "torch_xla": "2.9.0"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(cuda_host, "read_driver", lambda: H100)
    monkeypatch.setattr(cuda_plugin, "read_driver", lambda: H100)
    monkeypatch.setattr(cuda_host, "plugin_library", lambda: Path("x.so"))
    (found,) = cuda_plugin.cuda_plugin({"PJRT_DEVICE": "CUDA"})
    assert (found.name, found.state) == ("CUDA plugin", state)
    if state == "ok":
        assert found.text.endswith("0.7.1, driver 550.54.15 for CUDA 12.4, 4 × NVIDIA H100 80GB HBM3")
    else:
        assert "was never tried" in found.text
        assert found.mend == cuda_host.INSTALL


def test_the_doctor_does_not_start_what_cannot_work(monkeypatch):
    monkeypatch.setattr(devices, "cuda_mistakes", lambda: ["x"])
    found = list(devices.xla_devices(Deadline(60), Place("other", ()), {"PJRT_DEVICE": "CUDA"}))
    assert found[-1].state == "not run"
    assert "see CUDA plugin" in found[-1].text


@pytest.mark.skipif(cuda_host.read_driver() is not None, reason="this machine may have a GPU")
def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CUDA")
    found = installation_mistakes()
    assert found[-1].startswith("PJRT_DEVICE=CUDA, but NVIDIA's driver does not answer here")
