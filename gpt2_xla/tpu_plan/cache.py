"""What the compiler said, kept in a folder; nothing that a killed run left there stays."""

import fcntl
import gzip
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from gpt2_xla.tpu_plan.compiler import Answer, Request
from gpt2_xla.tpu_plan.hlo import Program
from gpt2_xla.tpu_plan.shortage import shortage

COMPILER = ("libtpu", "jax", "jaxlib")  # packages that decide what a program becomes


class PlanCache:
    """Answers of the compiler by what they follow from: the program, the slice, and the compiler's version and flags."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for one run's files. It is locked as long as the run lives: one that is not was left by a killed run."""
        with ExitStack() as stack:
            with _locked(self._folder):
                for left in self._folder.glob("run-*"):
                    _remove_unless_locked(left)
                own = Path(tempfile.mkdtemp(prefix="run-", dir=self._folder))
                stack.callback(shutil.rmtree, own, ignore_errors=True)
                stack.enter_context(_locked(own))
            yield own

    def key(self, request: Request, digest: str) -> str:
        """The name of an answer: the hash of all that it follows from; `digest` is the program's."""
        versions = [importlib.metadata.version(name) for name in COMPILER]
        facts = asdict(replace(request, program=digest, hlo="", answer=""))
        content = json.dumps([facts, versions, os.environ.get("LIBTPU_INIT_ARGS", "")])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def find(self, key: str) -> Answer | None:
        """The answer, if it is known."""
        try:
            answer = read_answer(self._folder / f"{key}.json")
        except (OSError, ValueError, TypeError):  # none, or not one that this version wrote
            return None
        return answer if answer.error or self.program(key).exists() else None

    def program(self, key: str) -> Path:
        """The file of the scheduled program's text."""
        return self._folder / f"{key}.hlo.gz"

    def keep(self, key: str, request: Request) -> Answer:
        """Take over the files of a compilation that has ended. Only what will be said again is kept, not a passing trouble."""
        answer = read_answer(Path(request.answer))
        if not answer.error:
            Path(request.hlo).replace(self.program(key))
        if not answer.error or shortage(answer.error):
            Path(request.answer).replace(self._folder / f"{key}.json")
        return answer


def read_answer(file: Path) -> Answer:
    """An answer that a compilation wrote."""
    return Answer(**json.loads(file.read_text()))


def read_program(file: Path) -> Program:
    """A scheduled program that the cache keeps."""
    return Program(gzip.decompress(file.read_bytes()).decode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process at the latest."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its run has just ended
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
