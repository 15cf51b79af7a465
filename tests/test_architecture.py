"""The walls of the house, read from the source: who may import what, what may never be called."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "gpt2_xla").rglob("*.py"))
PROGRAM = [*PACKAGE, *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]


def imported(path):
    """The modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def calls(path):
    """The dotted names of what a file calls."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_runtime_imports_torch_xla(path):
    if "runtime" not in path.parts and "tpu_plan" not in path.parts:
        assert not [name for name in imported(path) if name.split(".")[0] == "torch_xla"]


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path):
    assert not set(imported(path)) & {"pickle", "dill", "cloudpickle", "shelve"}
    assert not calls(path) & {"torch.load", "np.lib.format.read_array", "eval", "exec"}
    assert "allow_pickle=True" not in path.read_text()


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_rooms_not_halls(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")


@pytest.mark.parametrize("name", ["train.py", "training_log.py", "evaluate.py", "model.py", "loss.py"])
def test_the_loop_names_no_device_and_never_waits_for_one(name):
    path = ROOT / "gpt2_xla" / name
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not [word for word in names if re.search(r"(^|_)(cuda|xla|tpu|gloo|nccl)(_|$)", word)]
    assert not [call for call in calls(path) if re.search(r"\.(item|cpu|cuda|numpy|tolist|synchronize)$", call)]
