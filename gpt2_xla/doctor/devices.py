"""What the children measured of torch's and XLA's devices, judged."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_xla.doctor.children import Deadline, Outcome, run_child
from gpt2_xla.doctor.cuda_plugin import cuda_plugin
from gpt2_xla.doctor.finding import Finding, python_command
from gpt2_xla.doctor.installation import installed, pip_install
from gpt2_xla.doctor.place import Place
from gpt2_xla.runtime.cuda_host import cuda_mistakes
from gpt2_xla.runtime.xla_installation import DEVICES, package_mistakes

GIB = 2**30
LARGEST_ERROR = 2**-7  # a bf16 result has 8 bits
TORCH, XLA = "gpt2_xla.runtime.torch_doctor", "gpt2_xla.runtime.xla_doctor"
# What a failure says → the command that mends it.
REMEDIES = (
    ("Unknown flag in XLA_FLAGS", "unset XLA_FLAGS"),
    ("Unknown command line flag", "unset LIBTPU_INIT_ARGS"),
    ("already in use", "sudo lsof -w /dev/accel* /dev/vfio/*   # then kill the process that it lists"),
    ("Device or resource busy", "sudo lsof -w /dev/accel* /dev/vfio/*   # then kill the process that it lists"),
    (
        "not permitted",
        "docker run --privileged --net=host …   # or run as a user who may open /dev/accel* and /dev/vfio/*",
    ),
    ("out of memory", "nvidia-smi   # then kill the process that holds the memory"),
    ("NCCL", "NCCL_DEBUG=INFO python -m gpt2_xla.runtime.torch_doctor all-reduce"),
    ("gloo", "export GLOO_SOCKET_IFNAME=lo"),
)


def torch_devices(deadline: Deadline, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Each device that torch finds, with its memory and a matmul."""
    outcome = run_child(TORCH, "devices", seconds=deadline.share(0.25), environ=environ)
    facts = outcome.facts
    yield from _hidden_gpus(next((f for f in facts if f["stage"] == "torch"), {}), facts, environ)
    for device in (f for f in facts if f["stage"] == "device"):
        yield from _torch_device(
            device, [f for f in facts if f["stage"] == "matmul" and f["device"] == device["device"]]
        )
    if outcome.failure:
        yield _failed("torch", outcome, f"{python_command()} -m {TORCH} devices")


def torch_all_reduce(deadline: Deadline, environ: Mapping[str, str]) -> Iterator[Finding]:
    """All GPUs through NCCL, or two processes through gloo."""
    outcome = run_child(TORCH, "all-reduce", seconds=deadline.share(0.25), environ=environ)
    begun = next((f for f in outcome.facts if f["stage"] == "begin"), {"world": 0, "backend": "torch.distributed"})
    what = f"{begun['backend']}, {begun['world']} processes"
    yield _all_reduce("torch sum", what, outcome, f"{python_command()} -m {TORCH} all-reduce")


def xla_devices(deadline: Deadline, place: Place, environ: Mapping[str, str]) -> Iterator[Finding]:
    """The replicas that xmp.spawn starts, with their memory, a matmul, and a sum over them all."""
    device = environ.get("PJRT_DEVICE", "TPU" if place.chips else "CPU")
    yield from cuda_plugin(environ)
    if reason := _why_no_xla(device, place):
        yield Finding("XLA", "not run", reason)
        return
    if not place.chips:
        yield Finding("TPU", "not run", "no TPU here")
    # Threads of one process can't sum on the CPU client; training with several of them is not offered either.
    own = {name: value for name, value in environ.items() if device != "CPU" or name != "CPU_NUM_DEVICES"}
    outcome = run_child(XLA, seconds=deadline.share(1.0), environ=own | {"PJRT_DEVICE": device})
    command = f"PJRT_DEVICE={device} {python_command()} -m {XLA}"
    replicas = [f for f in outcome.facts if f["stage"] == "device"]
    if not replicas:
        yield _failed(f"XLA {device}", outcome, command)
        return
    yield _xla_topology(replicas, place)
    yield _matmuls("XLA matmul", [f for f in outcome.facts if f["stage"] == "matmul"], replicas[0]["world"])
    yield _all_reduce("XLA sum", f"{replicas[0]['world']} × {replicas[0]['name']}", outcome, command)


def _why_no_xla(device: str, place: Place) -> str | None:
    if installed("torch_xla") is None:
        return "torch_xla is not installed"
    if package_mistakes():
        return "torch_xla does not fit torch"
    if device not in DEVICES:
        return f"PJRT_DEVICE={device} is not supported"
    if device == "CUDA" and cuda_mistakes():
        return "PJRT_DEVICE=CUDA cannot work here, see CUDA plugin"
    return "PJRT_DEVICE=TPU, but no TPU here" if device == "TPU" and not place.chips else None


def _hidden_gpus(torch: dict[str, Any], facts: list[dict[str, Any]], environ: Mapping[str, str]) -> Iterator[Finding]:
    """An NVIDIA GPU that the driver sees and torch does not."""
    seen = any(f["stage"] == "device" and f["device"].startswith("cuda") for f in facts)
    if (
        seen
        or not torch
        or not any(Path("/dev").glob("nvidia[0-9]*"))
        or environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    ):
        return
    if torch["cuda"] is None:
        yield Finding(
            "GPU", "problem", f"there is a GPU, but torch {torch['version']} is built without CUDA", pip_install()
        )
    else:
        text = f"there is a GPU that torch can't open: torch {torch['version']} needs a driver for CUDA {torch['cuda']}"
        yield Finding(
            "GPU", "problem", text, "nvidia-smi   # shows the driver's CUDA; if older, install a newer driver"
        )


def _torch_device(device: dict[str, Any], matmuls: list[dict[str, Any]]) -> Iterator[Finding]:
    """One device of torch's, and what it multiplied."""
    name, text = device["device"], device["name"]
    if "total" in device:
        text += f", {device['free'] / GIB:.1f} of {device['total'] / GIB:.1f} GiB free"
        text += f", direct access to {device['peers']} of {device['others']} others" if device["others"] else ""
        if device["free"] < 0.9 * device["total"]:
            yield Finding(name, "warning", f"{text}: another process holds memory", "nvidia-smi")
            text = ""
    if text:
        yield Finding(name, "ok", text)
    for one in matmuls:
        yield _matmuls(f"{name} matmul", [one], 1)


def _matmuls(name: str, matmuls: list[dict[str, Any]], world: int) -> Finding:
    """The same matmul on each of some devices: all right, and how fast."""
    if len(matmuls) < world:
        return Finding(
            name, "problem", f"{world - len(matmuls)} of {world} devices gave no result", f"{python_command()} -m {XLA}"
        )
    wrong = [one["device"] for one in matmuls if not one["error"] <= LARGEST_ERROR]
    if wrong:
        text = f"wrong results on {', '.join(wrong)} (relative error {max(one['error'] for one in matmuls):.2g})"
        return Finding(
            name,
            "problem",
            text,
            "take this machine back and rent another: the hardware or its driver computes wrongly",
        )
    size, rates = matmuls[0]["size"], [2 * one["size"] ** 3 / one["seconds"] / 1e12 for one in matmuls]
    speed = f"{min(rates):.3g}" if len(rates) == 1 else f"{min(rates):.3g} to {max(rates):.3g}"
    return Finding(name, "ok", f"{matmuls[0]['dtype']} {size} × {size}, right, {speed} TFLOP/s")


def _all_reduce(name: str, what: str, outcome: Outcome, command: str) -> Finding:
    """A sum over all replicas: every one answered, and answered right."""
    sums = [f for f in outcome.facts if f["stage"] == "all-reduce"]
    begun = next((f["world"] for f in outcome.facts if "world" in f), None)
    if begun is None or len(sums) < begun:
        missing = sorted(set(range(begun or 0)) - {one["rank"] for one in sums})
        silent = f"no answer of {', '.join(map(str, missing))} over {what}" if missing else "it did not start"
        return _failed(name, outcome, command, silent)
    wrong = [str(one["rank"]) for one in sums if not one["right"]]
    if wrong:
        return Finding(name, "problem", f"wrong sum on {', '.join(wrong)} over {what}", command)
    slowest = max(one["seconds"] for one in sums)
    return Finding(name, "ok", f"{sums[0]['bytes'] / 2**20:.0f} MiB over {what}, right, {slowest * 1e3:.1f} ms")


def _failed(name: str, outcome: Outcome, command: str, detail: str = "") -> Finding:
    """A child that ended early; the mend is what its last words ask for, else the command that shows all of them."""
    failure = outcome.failure or "ended without a result"
    remedy = next((mend for part, mend in REMEDIES if part.lower() in failure.lower()), None)
    if "did not end within" in failure and name.startswith("XLA"):
        remedy = f"{python_command()} scripts/doctor.py --time-limit 300   # on all hosts of a slice at once: they wait for each other"
    return Finding(name, "problem", f"{detail + ': ' if detail else ''}{failure}", remedy or command)


def _xla_topology(replicas: list[dict[str, Any]], place: Place) -> Finding:
    """The devices of the whole slice, from what one host's replicas see."""
    first = replicas[0]
    text = f"{first['world']} × XLA {first['name']}, {len(replicas)} of them on this host"
    places = [str(one["coordinates"]) for one in replicas if one["coordinates"]]
    text += f", at {' '.join(places)}" if places else ""
    if first["total"]:
        text += f", {first['total'] / GIB:.1f} GiB each, {max(one['used'] for one in replicas) / GIB:.1f} used"
    if first["type"] == "TPU" and len(replicas) < len(place.chips):
        mend = "unset TPU_VISIBLE_CHIPS TPU_CHIPS_PER_PROCESS_BOUNDS TPU_PROCESS_BOUNDS"
        return Finding("XLA", "warning", f"{text}, of {len(place.chips)} chips", mend)
    return Finding("XLA", "ok", text)
