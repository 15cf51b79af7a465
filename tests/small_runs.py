"""A few steps of training in this process: starting another one to see a mistake would import torch for seconds."""

import signal
import sys
from collections.abc import Callable

import pytest
from commands import TINY

from gpt2_xla.errors import run_main

FOUR_STEPS = (*TINY, "--warmup-steps", "0", "--train-steps", "4", "--device", "cpu")


def run_here(monkeypatch: pytest.MonkeyPatch, main: Callable[[], int | None], *arguments: object) -> int:
    """Run an entry point's main as `python ENTRY.py arguments…` would, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["entry.py", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run_main(main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
