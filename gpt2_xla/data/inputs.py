"""Which files a source means, always in the same order: built-in ones, local files and folders, remote addresses."""

import platform
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2_xla.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FILE_SYSTEM_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "http": "aiohttp"}


class UnreadableInput(UserError):
    """A file whose content is not what it should be; --skip-bad-files leaves it out."""

    def __init__(self, file: str, mistake: str) -> None:
        """`file`: the InputFile's name."""
        super().__init__(mistake)
        self.file = file

    def __reduce__(self) -> tuple:
        return UnreadableInput, (self.file, self.mistakes[0])


# What is raised for missing credentials, permissions and buckets.
STORE_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}


@dataclass(frozen=True)
class InputFile:
    """One file of a source. Its documents' ids start with its name, so they do not change when a folder moves.

    That a local file has changed is told by its size and the time of its last change, not by reading it: a change that
    keeps both goes unnoticed.
    """

    name: str
    url: str  # a local path, or an address that fsspec opens
    kind: Literal["text", "jsonl", "parquet", "pydoc"]
    size: int  # bytes
    version: str  # etag, or time of the last change: with the size, enough to notice a change

    @property
    def is_local(self) -> bool:
        """Whether `url` is a path."""
        return "://" not in self.url


def kind_of(name: str) -> Literal["text", "jsonl", "parquet"]:
    """How to read a file of this name."""
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if name.endswith(JSONL_SUFFIXES) else "text"


def describe(source: str) -> str:
    """A source as the manifest records it: the built-in ones are those of one Python version."""
    return f"{source} of CPython {platform.python_version()}" if source in ("pydoc", "stdlib") else source


def text_inputs(sources: tuple[str, ...]) -> list[InputFile]:
    """The files of all sources: "pydoc", "stdlib", paths, addresses. UserError with all those that hold nothing to read."""
    found: list[InputFile] = []
    mistakes: list[str] = []
    for source in sources:
        try:
            found += inputs_of(source, "--source")
        except UserError as error:
            mistakes += error.mistakes
    if mistakes:
        raise UserError(mistakes)
    return found


def inputs_of(source: str, flag: str) -> list[InputFile]:
    """The files of one source. `flag` is the option that named it."""
    if source == "pydoc":
        # The language reference that every CPython carries for help(), one topic per document.
        return [InputFile("pydoc", "pydoc", "pydoc", 0, platform.python_version())]
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in root.rglob("*.py") if not SKIPPED_FOLDERS & set(file.relative_to(root).parts)]
        return _local(files, root, "stdlib")
    if "://" in source:
        return _remote_inputs(source, flag)
    return _local_inputs(Path(source), flag)


def _local_inputs(path: Path, flag: str) -> list[InputFile]:
    """The file itself, or a folder's readable files, recursively, in the order of their names; hidden ones left out."""
    if path.is_file():
        return _local([path], path.parent, "")
    if not path.is_dir():
        builtin = "pydoc, stdlib, " if flag == "--source" else ""
        raise UserError(f"{flag} {path} does not exist; expected {builtin}a file or a folder")
    files = [
        file
        for file in path.rglob("*")
        if file.name.endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"{flag} {path} holds no {', '.join(SUFFIXES)} files")
    return _local(files, path, path.resolve().name)


def _local(files: list[Path], root: Path, prefix: str) -> list[InputFile]:
    inputs = []
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        status = file.stat()
        name = "/".join(filter(None, (prefix, file.relative_to(root).as_posix())))
        inputs.append(InputFile(name, str(file), kind_of(file.name), status.st_size, str(status.st_mtime_ns)))
    return inputs


def _remote_inputs(url: str, flag: str) -> list[InputFile]:
    with clear_remote_errors(url):
        fs, path = file_system(url)
        if fs.isfile(path):
            return [remote_input(fs, path, path.rsplit("/", 1)[-1])]
        names = sorted(name for name in fs.find(path) if name.endswith(SUFFIXES))
        if not names:
            raise UserError(f"{flag} {url} holds no {', '.join(SUFFIXES)} files")
        root = path.rstrip("/")
        return [remote_input(fs, name, f"{root.rsplit('/', 1)[-1]}{name.removeprefix(root)}") for name in names]


def remote_input(fs: Any, path: str, name: str) -> InputFile:
    """A remote file, with its version as the store tells it: content hash, etag or time."""
    info = fs.info(path)
    lfs = info.get("lfs") or {}
    marks = (info.get(key) for key in ("ETag", "etag", "blob_id", "md5Hash", "crc32c", "LastModified", "mtime"))
    version = lfs.get("sha256") or next((mark for mark in marks if mark), "")
    return InputFile(name, str(fs.unstrip_protocol(path)), kind_of(path), int(info["size"]), str(version))


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it."""
    import fsspec

    scheme = url.split("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = FILE_SYSTEM_PACKAGES.get(scheme.rstrip("s") if scheme == "https" else scheme)
        hint = f"install it (pip install {package})" if package else f"{error}"
        raise UserError(f"{url}: {scheme}:// needs a package that is not installed: {hint}") from error
    except ValueError as error:
        raise UserError(
            f"{url}: unknown kind of address {scheme}://; expected hf://, s3://, gs:// or a path"
        ) from error


def network_errors() -> tuple[type[Exception], ...]:
    """What reading over a network raises: OSErrors, those of the HTTP package that this huggingface_hub is built on, and
    those of the packages for stores that are in use.

    That HTTP package has been requests, httpx and httpx2; each calls the base of its errors HTTPError.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    loaded = [(sys.modules[module], names) for module, names in STORE_ERRORS.items() if module in sys.modules]
    return (OSError, *http, *(getattr(module, name) for module, names in loaded for name in names))


def host_of(url: str) -> str:
    """Whom an address asks."""
    if url.startswith("hf://"):
        from huggingface_hub import constants

        return constants.ENDPOINT.removeprefix("https://")
    return url.split("://", 1)[-1].split("/", 1)[0] if url.startswith("http") else "/".join(url.split("/")[:3])


@contextmanager
def clear_remote_errors(url: str) -> Iterator[None]:
    """Failures to reach a store become one sentence that names it."""
    try:
        yield
    except network_errors() as error:
        what = f"{error}".splitlines()[0][:160] if f"{error}" else type(error).__name__
        raise UserError(
            f"{url} can't be read from {host_of(url)} ({what}); check the network and the address, or give local files"
        ) from error
