"""The environment in which a child process finds this package, wherever it is started from."""

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """That environment, with this checkout first among what Python imports from."""
    return {**environ, "PYTHONPATH": import_path(environ)}


def import_path(environ: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH with this checkout first."""
    return os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
