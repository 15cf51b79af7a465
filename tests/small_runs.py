"""A few steps of training in this process: starting another one to see a mistake would import torch for seconds."""

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
