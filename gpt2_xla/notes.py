"""What a command says beside its output."""

import sys


def note(sentence: str, kind: str = "note") -> None:
    """A line on standard error, so that standard output is text alone."""
    print(f"{kind}: {sentence}", file=sys.stderr, flush=True)
