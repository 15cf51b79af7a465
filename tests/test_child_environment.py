"""A child process finds the package from anywhere, and what its parent's PYTHONPATH names besides."""

import subprocess
import sys

from commands import PATIENCE, ROOT

from gpt2_xla.child_environment import child_environment


def test_a_child_imports_this_checkout_first(tmp_path):
    for name in ("gpt2_xla", "beside"):
        (tmp_path / f"{name}.py").write_text("")
    environ = {"PYTHONPATH": str(tmp_path), "KEPT": "x"}
    child = child_environment(environ)
    code = "import gpt2_xla.errors, beside; print(gpt2_xla.errors.__file__)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, env=child, cwd=tmp_path.parent, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert found.stdout.strip() == str(ROOT / "gpt2_xla" / "errors.py")
    assert child["KEPT"] == "x"
    assert environ["PYTHONPATH"] == str(tmp_path)
    assert child_environment({})["PYTHONPATH"] == str(ROOT)
