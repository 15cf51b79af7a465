"""Python and the packages: there, new enough, fitting each other, and of the versions that the tests ran with."""

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from gpt2_xla.doctor.finding import Finding, python_command
from gpt2_xla.runtime.cuda_host import PLUGIN as CUDA_PLUGIN
from gpt2_xla.runtime.xla_installation import package_mistakes

ROOT = Path(__file__).resolve().parent.parent.parent


def installation(has_tpu: bool, root: Path = ROOT) -> Iterator[Finding]:
    """Findings on Python (scripts/doctor.py itself needs a new enough one), the required packages, torch_xla with its companions, and constraints.txt."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _required(root)
    yield _xla(has_tpu)
    yield from _companions(root)
    if (root / "constraints.txt").is_file():
        yield _tested(root / "constraints.txt")


def installed(name: str) -> str | None:
    """A package's version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip_install() -> str:
    """The command that installs everything at the tested versions."""
    file = "requirements-xla_tpu.txt" if installed("torch_xla") else "requirements.txt"
    return f"{python_command()} -m pip install -r {file} -c constraints.txt"


def _required(root: Path) -> Finding:
    """Whether all of requirements.txt is there and new enough."""
    missing, old, present = [], [], []
    for name, limits in _lines(root / "requirements.txt"):
        version = installed(name)
        least = re.search(r">=([0-9.]+)", limits)
        if version is None:
            missing.append(f"{name} is not installed")
        elif least and _numbers(version) < _numbers(least[1]):
            old.append(f"{name} {version} is older than {least[1]}")
        else:
            present.append(name)
    if missing or old:
        return Finding("packages", "problem", "; ".join(missing + old), pip_install())
    return Finding("packages", "ok", f"torch {installed('torch')} and the other {len(present) - 1} of requirements.txt")


def _xla(has_tpu: bool) -> Finding:
    """torch_xla, which only run_pretrain_xla.py needs."""
    mistakes = package_mistakes()
    mend = f"{python_command()} -m pip install -r requirements-xla_tpu.txt -c constraints.txt"
    if installed("torch_xla") is None and not has_tpu:
        return Finding("torch_xla", "ok", "not installed, and no TPU here: use run_pretrain.py")
    if mistakes:
        return Finding("torch_xla", "problem", mistakes[0].partition(";")[0], mend)
    return Finding("torch_xla", "ok", f"{installed('torch_xla')} fits torch {installed('torch')}")


def _companions(root: Path) -> Iterator[Finding]:
    """What torch_xla loads: libtpu and jax as its own metadata asks for them, and the CUDA plugin that we pin."""
    if installed("torch_xla") is None:
        return
    wanted = {}
    for requirement in importlib.metadata.requires("torch_xla") or []:  # in its extras `tpu` and `pallas`
        if match := re.match(r"(libtpu|jax|jaxlib)==([0-9.]+)", requirement):
            wanted[match[1]] = match[2]
    wanted |= {name: limits[2:] for name, limits in _lines(root / "requirements-xla_cuda.txt") if name == CUDA_PLUGIN}
    for name, version in wanted.items():
        found = installed(name)
        if found is not None and found.split("+")[0] != version:
            text = f"{found}, but torch_xla {installed('torch_xla')} goes with {version}"
            mend = f"{python_command()} -m pip install {name}=={version}"
            yield Finding(name, "problem" if name in ("libtpu", CUDA_PLUGIN) else "warning", text, mend)
    parts = [f"{name} {installed(name) or 'not installed'}" for name in wanted]
    yield Finding(
        "plugins", "ok", f"{', '.join(parts)} (libtpu is for TPUs, jax for Pallas kernels, the last for NVIDIA GPUs)"
    )


def _tested(constraints: Path) -> Finding:
    """Which installed packages have another version than the tests ran with."""
    pins = {name: limits.removeprefix("==") for name, limits in _lines(constraints)}
    present = {name: version for name in pins if (version := installed(name)) is not None}
    other = [
        f"{name} {version} ({pins[name]})" for name, version in present.items() if version.split("+")[0] != pins[name]
    ]
    if not other:
        return Finding("versions", "ok", f"all {len(present)} that are installed are those of constraints.txt")
    text = f"{len(other)} are not those that the tests ran with: {', '.join(other)}"
    return Finding("versions", "warning", text, pip_install())


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Name and version limits of each requirement in a file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]*\])?\s*([<>=!~].*)?$", line.partition("#")[0].strip())
        if match and not line.startswith("-"):
            yield match[1], match[2] or ""


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 9, 0) of 2.9.0+cu128."""
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))
