"""A run's checkpoints at --remote-dir: uploaded, verified, then published by a pointer; found and fetched by a new machine.

latest.json                              the published checkpoints, last written first; replaced in one go
step-00001000.0123456789ab/…             a checkpoint's files; the name ends with the start of its COMPLETE record's sha256
config.json  metrics.jsonl  batches.jsonl
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_xla import checkpoint
from gpt2_xla import checkpoint_files as files
from gpt2_xla.durable_files import flush
from gpt2_xla.errors import UserError
from gpt2_xla.remote_store import MissingError, RemoteStore, StoreError, address_mistakes, reason

POINTER = "latest.json"
HISTORY = ("metrics.jsonl", "batches.jsonl")  # files that a run appends to
FOLDER = re.compile(r"step-\d{8,18}\.[0-9a-f]{12}")
PATIENCE = 3600.0  # seconds that a process waits for the one of its host that downloads


class Damaged(UserError):
    """A published checkpoint is not what was saved."""


@dataclass(frozen=True)
class Published:
    """A checkpoint there."""

    name: str  # of its folder
    step: int
    save: int  # its number in the order in which the run's checkpoints were written
    sha256: str  # of its COMPLETE record
    valid_loss: float | None = None

    @classmethod
    def of(cls, folder: Path) -> "Published":
        """How a local checkpoint would be published."""
        try:
            digest = files.sha256(folder / files.RECORD)
        except OSError as error:
            raise StoreError(f"{folder / files.RECORD} can't be read: {reason(error)}") from error
        try:
            state = checkpoint.read_state(folder)
        except UserError as error:
            raise StoreError(error.mistakes) from error
        name = f"step-{state.step:08d}.{digest[:12]}"
        return cls(name, state.step, files.save_number(folder), digest, state.valid_loss)

    @classmethod
    def from_json(cls, entry: Any) -> "Published | None":
        """An entry of the pointer; None for a malformed one."""
        if not isinstance(entry, dict) or entry.keys() != {field.name for field in dataclasses.fields(cls)}:
            return None
        name, step, save, digest, loss = (entry[field.name] for field in dataclasses.fields(cls))
        whole = all(type(number) is int and 0 <= number < 2**62 for number in (step, save))
        texts = isinstance(name, str) and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
        if not (whole and texts and FOLDER.fullmatch(name) and name == f"step-{step:08d}.{digest[:12]}"):
            return None
        if loss is not None and not (isinstance(loss, float) and math.isfinite(loss)):
            return None
        return cls(name, step, save, digest, loss)


class RemoteRun:
    """A run's remote folder. Methods raise StoreError."""

    def __init__(self, url: str) -> None:
        self.store = RemoteStore(url)

    def published(self) -> list[Published]:
        """The checkpoints there, last written first."""
        data = self.store.read(POINTER)
        if data is None:
            return []
        try:
            entries = json.loads(data)["checkpoints"]
            found = [Published.from_json(entry) for entry in entries]
        except (ValueError, TypeError, KeyError, RecursionError):
            found = [None]
        good = [entry for entry in found if entry is not None]
        if len(good) < len(found):
            raise StoreError(
                f"{self.store.url}/{POINTER} is malformed; put another version of it back, or choose another folder"
            )
        return good

    def publish(self, folder: Path, keep: int) -> None:
        """Upload a local checkpoint, verify it, move the pointer, then delete those that it no longer names.

        `keep`: --saved-checkpoint-limit. One that is the last published already is not sent again.
        """
        new, before = Published.of(folder), self.published()
        if before and before[0] == new:
            return
        for name, entry in files.recorded(folder).items():
            self.store.upload(folder / name, f"{new.name}/{name}", entry["sha256"])
        self.store.upload(folder / files.RECORD, f"{new.name}/{files.RECORD}", new.sha256)
        # A higher step is one that was damaged, or of a course that the run has left.
        older = [entry for entry in before if entry.step <= new.step and entry.name != new.name]
        entries = {entry.name: entry for entry in (new, *older)}
        kept = checkpoint.to_keep({name: (e.save, e.step, e.valid_loss) for name, e in entries.items()}, keep)
        self._point_to([entry for name, entry in entries.items() if name in kept])

    def withdraw_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a run that goes back to `step` leaves their course."""
        before = self.published()
        if any(entry.step > step for entry in before):
            self._point_to([entry for entry in before if entry.step <= step])

    def _point_to(self, entries: list[Published]) -> None:
        """Replace the pointer, then delete all checkpoints that it does not name."""
        pointer = {"format": 1, "checkpoints": [vars(entry) for entry in entries]}
        self.store.write(POINTER, (json.dumps(pointer, indent=2) + "\n").encode())
        kept = {entry.name for entry in entries}
        for name in self.store.names():
            if FOLDER.fullmatch(name) and name not in kept:
                self.store.delete(name)

    def copy_records(self, run_dir: Path) -> None:
        """Copy config.json, metrics.jsonl and batches.jsonl as they are now, those that there are."""
        for name in ("config.json", *HISTORY):
            try:
                data = (run_dir / name).read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreError(f"{run_dir / name} can't be read: {reason(error)}") from error
            self.store.write(name, data)

    def fetch(self, entry: Published, run_dir: Path) -> Path:
        """Download a checkpoint, with the run's history where ours is shorter, verify it; return its local folder.

        Raises Damaged where what is there is not what was saved; UserError where it can't be stored here.
        """
        final = run_dir / entry.name.partition(".")[0]
        hidden = final.with_name(f".{final.name}.download")
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            self._download(entry, hidden)
            self._download_history(run_dir)
            files.swap_in(hidden, final)
        except OSError as error:
            raise UserError(f"{self.store.url}/{entry.name} can't be stored in {run_dir}: {reason(error)}") from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        return final

    def _download(self, entry: Published, folder: Path) -> None:
        where = f"{self.store.url}/{entry.name}"
        record = self.store.read(f"{entry.name}/{files.RECORD}")
        if record is None or hashlib.sha256(record).hexdigest() != entry.sha256:
            raise Damaged(f"{where}/{files.RECORD} is {'missing' if record is None else 'not the published one'}")
        (folder / files.RECORD).parent.mkdir(parents=True)
        (folder / files.RECORD).write_bytes(record)
        try:
            recorded = files.recorded(folder)
        except UserError as error:
            raise Damaged(error.mistakes) from error
        size, free = sum(facts["bytes"] for facts in recorded.values()), shutil.disk_usage(folder).free
        if size > free:
            raise UserError(f"{where} has {size:,} bytes, but {folder.parent} has room for {free:,}")
        for name, facts in recorded.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            for last_try in (False, True):  # what the network altered comes right the second time
                try:
                    self.store.download(f"{entry.name}/{name}", target, facts["bytes"])
                except MissingError as error:
                    raise Damaged(error.mistakes) from error
                if files.sha256(target) == facts["sha256"]:
                    break
                if last_try:
                    raise Damaged(f"{where}/{name} was altered: its sha256 is not the recorded one")
            flush(target)
        if found := checkpoint.problems(folder):
            raise Damaged(found)
        for path in (folder / files.RECORD, (folder / files.RECORD).parent, folder):
            flush(path)

    def _download_history(self, run_dir: Path) -> None:
        for name in HISTORY:
            data = self.store.read(name, limit=2**30)
            ours = run_dir / name
            if data is not None and (not ours.exists() or ours.stat().st_size < len(data)):
                ours.write_bytes(data)


def newest_checkpoint(folder: Path, remote_dir: str | None, say: Callable[[str], None]) -> Path | None:
    """The newest good checkpoint of a run: the one in its folder or, where that is older, the remote one, downloaded.

    Of several processes of one host, one downloads while the others wait. Raises UserError if the remote folder cannot be
    read, or holds checkpoints but no good one, and there is none here: beginning anew would be no answer to that.
    """
    local = checkpoint.newest_good(folder, say)
    if remote_dir is None:
        return local
    remote = RemoteRun(remote_dir)
    try:
        step = checkpoint.read_state(local).step if local else -1
        entries = sorted(remote.published(), key=lambda entry: (entry.step, entry.save), reverse=True)
        newer = [entry for entry in entries if entry.step > step]
        fetched = _first_good(remote, newer, folder, say) if newer else None
    except StoreError as error:
        raise UserError([f"--remote-dir {mistake}" for mistake in error.mistakes]) from error
    if newer and fetched is None and local is None:
        raise UserError(f"--remote-dir {remote_dir} holds no good checkpoint; choose another folder to begin anew")
    return fetched or local


def _first_good(remote: RemoteRun, entries: list[Published], folder: Path, say: Callable[[str], None]) -> Path | None:
    with _one_at_a_time(folder):
        for entry in entries:
            here = folder / entry.name.partition(".")[0]
            try:
                if files.sha256(here / files.RECORD) == entry.sha256 and not checkpoint.problems(here):
                    return here  # another process has just fetched it
            except OSError:
                pass
            say(f"downloading checkpoint {remote.store.url}/{entry.name}")
            try:
                return remote.fetch(entry, folder)
            except Damaged as error:
                say(f"warning: checkpoint {remote.store.url}/{entry.name} is damaged: {'; '.join(error.mistakes)}")
    return None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; the system drops it if this one dies."""
    path, deadline = folder / ".download.lock", time.monotonic() + PATIENCE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:  # else the one before us has removed the file that we have locked
                    break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process has been downloading to {folder} for {PATIENCE:.0f} s") from None
                time.sleep(0.2)
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"--checkpoints-dir {folder} cannot be written: {reason(error)}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def remote_mistakes(url: str, other: str | None) -> list[str]:
    """What would keep a run from copying its checkpoints there; writes, reads and deletes a small file to find out.

    `other`: what to do, for a run that is another one, to continue what is there; None for a run that continues it.
    """
    if mistakes := address_mistakes(url):
        return [f"--remote-dir {mistake}" for mistake in mistakes]
    remote = RemoteRun(url)
    try:
        if other is not None and (existing := remote.published()):
            return [
                f"--remote-dir {url} already holds {existing[0].name} of another run; "
                f"{other} to continue that one, or choose another folder"
            ]
        remote.store.probe()
    except StoreError as error:
        return [f"--remote-dir {mistake}" for mistake in error.mistakes]
    return []
