"""A few steps of training in this process: starting another one to see a mistake would import torch for seconds."""

import contextlib
import io
import sys
from collections.abc import Callable

import pytest
from commands import TINY

from gpt2_xla.errors import run_main

FOUR_STEPS = (*TINY, "--warmup-steps", "0", "--train-steps", "4", "--device", "cpu")


def run_here(monkeypatch: pytest.MonkeyPatch, main: Callable[[], int | None], *arguments: object) -> int:
    """Run an entry point's main as `python ENTRY.py arguments…` would, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["entry.py", *map(str, arguments)])
    return run_main(main)


def said_here(main: Callable[[], int | None], *arguments: object) -> str:
    """What an entry point's main prints in this process; it must come to its end."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.MonkeyPatch.context() as patch,
    ):
        assert run_here(patch, main, *arguments) == 0, printed.getvalue()
    return printed.getvalue()
