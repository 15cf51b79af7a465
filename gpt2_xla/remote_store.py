"""A folder at an address that fsspec opens (gs://, s3://, hf://, file://, …): copies that are verified, and tried again."""

import base64
import hashlib
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from gpt2_xla.errors import UserError

T = TypeVar("T")
PAUSES = (
    1.0,
    2.0,
    4.0,
    8.0,
)  # seconds before each further try, times 0.5 to 1.5: many runs shall not come back at once
# Stores where a file needs its folder, and where a file that is written over is seen half-written. The others take each
# object whole, and making a "folder" could create a bucket.
WITH_FOLDERS = {"file", "local", "sftp", "ssh", "hdfs", "webhdfs", "smb", "ftp"}
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"max_concurrency": 4}
}  # of 50 MB each, held in memory; s3fs's own 10 are many
SMALL = 2**20  # bytes; a smaller file is read back where the store tells no checksum
IN_VAIN = (PermissionError, FileNotFoundError, NotImplementedError, ImportError)  # to try again


class StoreError(UserError):
    """A remote folder could not be read or written, all tries included."""


class MissingError(StoreError):
    """A file is not there, or is not of the size that it should have."""


@dataclass(frozen=True)
class Content:
    """What a copy must be equal to."""

    size: int  # bytes
    sha256: str
    md5: str

    @classmethod
    def of(cls, parts: Iterable[bytes]) -> "Content":
        """That of a file read in parts."""
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        for part in parts:
            sha256.update(part)
            md5.update(part)
            size += len(part)
        return cls(size, sha256.hexdigest(), md5.hexdigest())


class RemoteStore:
    """Files below an address, by names relative to it. Opened at the first use; every method raises StoreError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from gpt2_xla.data.inputs import file_system

        scheme = self.url.partition("://")[0]
        try:
            return file_system(self.url, **OPTIONS.get(scheme, {}))
        except UserError as error:
            raise StoreError(error.mistakes) from error
        except Exception as error:  # each store has errors of its own, for want of credentials say
            raise StoreError(f"{self.url} can't be opened: {reason(error)}") from error

    def _path(self, name: str) -> str:
        return f"{self._opened[1].rstrip('/')}/{name}"

    def _retried(self, work: Callable[[Any], T], doing: str) -> T:
        """What `work` returns, given the file system; tries again a few times, later and later."""
        fs, _ = self._opened
        for pause in (*PAUSES, None):
            try:
                fs.invalidate_cache()
                return work(fs)
            except UserError:
                raise
            except Exception as error:  # each store has errors of its own
                if pause is None or isinstance(error, IN_VAIN):
                    kind = MissingError if isinstance(error, FileNotFoundError) else StoreError
                    raise kind(f"{self.url}: could not {doing}: {reason(error)}") from error
            time.sleep(pause * random.uniform(0.5, 1.5))
        raise AssertionError

    def upload(self, file: Path, name: str, sha256: str) -> None:
        """Copy a local file there and verify the copy; a file that is not the one of that hash any more is refused."""
        try:
            with file.open("rb") as stream:
                content = Content.of(iter(lambda: stream.read(2**23), b""))
        except OSError as error:
            raise StoreError(f"{file} can't be read: {reason(error)}") from error
        if content.sha256 != sha256:
            raise StoreError(f"{file} was altered since it was saved: its sha256 is not the recorded one")

        def put(fs: Any) -> None:
            self._make_folder(fs, name)
            fs.put_file(str(file), self._path(name))
            self._verify(fs, name, content)

        self._retried(put, f"write {name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, replacing one of the name in one go, and verify it."""

        def put(fs: Any) -> None:
            self._make_folder(fs, name)
            if _protocols(fs) & WITH_FOLDERS:
                fs.pipe_file(self._path(f"{name}.tmp"), data)
                fs.mv(self._path(f"{name}.tmp"), self._path(name))
            else:
                fs.pipe_file(self._path(name), data)
            self._verify(fs, name, Content.of([data]))

        self._retried(put, f"write {name}")

    def _make_folder(self, fs: Any, name: str) -> None:
        if _protocols(fs) & WITH_FOLDERS:
            fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _verify(self, fs: Any, name: str, content: Content) -> None:
        """Raise OSError unless the file there is this: by size, by checksum if the store tells one, else by reading it.

        A checksum that differs says nothing yet: an encrypted S3 object's ETag is no md5. Then the file is read too.
        """
        fs.invalidate_cache()
        try:
            info = fs.info(self._path(name))
        except FileNotFoundError:
            raise OSError(f"{name} is not there after it was written") from None
        if info["size"] != content.size:
            raise OSError(f"{name} has {info['size']:,} bytes there instead of {content.size:,}")
        told = _checksum(info)
        if told in (content.sha256, content.md5) or (told is None and content.size > SMALL):
            return
        with fs.open(self._path(name), "rb") as stream:
            if Content.of(iter(lambda: stream.read(2**23), b"")) != content:
                raise OSError(f"{name} is not there what was written")

    def read(self, name: str, limit: int = SMALL) -> bytes | None:
        """A small file's content; None if there is none of the name."""

        def get(fs: Any) -> bytes | None:
            try:
                size = fs.info(self._path(name))["size"]
                if size <= limit:
                    return bytes(fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None
            raise StoreError(f"{self.url}/{name} has {size:,} bytes; expected no more than {limit:,}")

        return self._retried(get, f"read {name}")

    def download(self, name: str, file: Path, size: int) -> None:
        """Copy a file of `size` bytes from there; raises MissingError if it has another size."""

        def get(fs: Any) -> None:
            if (there := fs.info(self._path(name))["size"]) != size:
                raise FileNotFoundError(f"it has {there:,} bytes instead of {size:,}")
            fs.get_file(self._path(name), str(file))
            if file.stat().st_size != size:
                raise OSError(f"{file.stat().st_size:,} of {size:,} bytes came")

        self._retried(get, f"read {name}")

    def names(self) -> list[str]:
        """The names of files and folders directly in it."""

        def names(fs: Any) -> list[str]:
            try:
                found = fs.ls(self._opened[1], detail=False)
            except FileNotFoundError:
                return []
            return [str(path).rstrip("/").rpartition("/")[2] for path in found]

        return self._retried(names, "list it")

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it."""
        self._retried(lambda fs: fs.rm(self._path(name), recursive=True), f"delete {name}")

    def probe(self) -> None:
        """Write, read and delete a small file: what a run will have to do."""
        name = f".write-test-{uuid.uuid4().hex[:8]}"
        self.write(name, b"gpt2_xla")
        self.delete(name)


def address_mistakes(url: str) -> list[str]:
    """What forbids an address before anything is asked of it."""
    import fsspec

    scheme, found, rest = url.partition("://")
    if not found:
        return [f"{url} is a path; expected an address such as gs://bucket/run (file:///… for a mounted disk)"]
    if re.match(r"[^/]*:[^/]*@", rest) or "?" in rest:
        return [
            f"{redacted(url)} holds a password or key, which would be written into config.json; "
            "leave it out: the store's package takes it from the environment or its own configuration"
        ]
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        return [
            f"{url}: unknown kind of address {scheme}://; expected gs://, s3://, hf:// or another that fsspec opens"
        ]
    except ImportError:
        pass  # opening it tells which package to install
    return []


def redacted(text: str) -> str:
    """The text without passwords in addresses and without what follows a `?` in them, such as a signature."""
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1?…", re.sub(r"://[^/\s]*:[^/\s]*@", "://…@", text))


def reason(error: BaseException) -> str:
    """An error in a few words, without secrets."""
    text = (error.strerror if isinstance(error, OSError) else None) or f"{error}"
    lines = [line for line in redacted(text).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _checksum(info: dict[str, Any]) -> str | None:
    """The md5 or sha256 that a store tells of a file, in hexadecimal: hf's, GCS's, S3's of objects sent in one part."""
    if sha256 := (info.get("lfs") or {}).get("sha256"):
        return str(sha256)
    if md5 := info.get("md5Hash"):
        return base64.b64decode(md5).hex()
    etag = str(info.get("ETag") or "").strip('"')
    return etag if re.fullmatch("[0-9a-f]{32}", etag) else None
