"""flaky://, a store in memory whose network, disk and permissions fail as a test says."""

from hashlib import md5
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyStore(MemoryFileSystem):
    """What it does wrong is in its class attributes; `reset` makes it empty and honest."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012 - of its own, not MemoryFileSystem's
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    failures = 0  # so many of the next writes fail
    error: Exception = ConnectionError("connection reset by peer")
    cut = 0  # bytes that each write loses at its end, silently
    flip = False  # whether each write changes its last byte, silently
    checksums = False  # whether it tells an ETag: True for the content's md5, a text for that
    reads = 0  # so many files were opened to read them
    log: list[tuple[str, str]] = []  # noqa: RUF012 - (what, path) of each operation that changes or fetches

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    @classmethod
    def reset(cls):
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.failures, cls.cut, cls.flip, cls.checksums, cls.reads = 0, 0, False, False, 0
        cls.error = ConnectionError("connection reset by peer")
        cls.log.clear()
        fsspec.register_implementation("flaky", cls, clobber=True)

    def pipe_file(self, path, value, **_):
        cls = type(self)
        cls.log.append(("write", path))
        if cls.failures:
            cls.failures -= 1
            raise cls.error
        value = value[: len(value) - cls.cut]
        if cls.flip:
            value = value[:-1] + bytes([value[-1] ^ 1])
        super().pipe_file(path, value)

    def put_file(self, lpath, rpath, **_):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath, lpath, **_):
        self.log.append(("fetch", rpath))
        super().get_file(rpath, lpath)

    def rm(self, path, **named):
        self.log.append(("delete", path))
        super().rm(path, **named)

    def _open(self, path, mode="rb", **named):
        type(self).reads += mode == "rb"
        return super()._open(path, mode, **named)

    def info(self, path, **_):
        found = super().info(path)
        if self.checksums and found["type"] == "file":
            found["ETag"] = self.checksums if self.checksums is not True else md5(self.cat_file(path)).hexdigest()
        return found
