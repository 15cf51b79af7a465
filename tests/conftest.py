"""Fixtures that several test files share."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and for every process that a test starts: two OpenMP threads on two busy cores spend their time
# waiting for each other (this suite took four times as long).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest, ShardEntry
from gpt2_xla.data.shards import write_shard
from gpt2_xla.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent

# A suite that a script starts in the background ignores Ctrl-C, and would have all that it starts ignore it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that only a change of the code turns a test red, however slow the machine is.
# `--hypothesis-profile default` draws new ones.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a package that is not there (the torchrun path runs on newer torch without torch_xla)."""
    needed = {"xla": ("torch_xla",), "tpu_compiler": ("torch_xla", "libtpu", "jax", "jaxlib")}
    for marker, packages in needed.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        for item in items if missing else ():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a test sets in the environment of this process ends with it; torch_xla, for one, sets variables."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample data beside the repository, or where GPT2_XLA_SHARED_DATA says; skips where it is absent."""
    folder = Path(os.environ.get("GPT2_XLA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared sample data in {folder} (set GPT2_XLA_SHARED_DATA)")
    return folder


@pytest.fixture
def tiktoken_cache(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiktoken's gpt2 vocabulary without a network."""
    folder = shared_data / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


def write_split(folder: Path, split: str, tokens: np.ndarray) -> Path:
    """A data folder of one shard of byte tokens, with its manifest."""
    tokenizer = ByteTokenizer()
    target = folder / split
    target.mkdir(parents=True)
    digest = write_shard(target / f"{split}_00000.npy", tokens.astype(np.uint16))
    shard = ShardEntry(f"{split}_00000.npy", len(tokens), 1, digest)
    manifest = Manifest(
        split=split,
        dtype="uint16",
        tokens=len(tokens),
        shards=(shard,),
        tokenizer="bytes",
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
    )
    manifests.write(target, manifest)
    return target


def write_text_data(folder: Path) -> Path:
    """Fill a folder with train/ (40,000 byte tokens of English) and valid/ (2,000)."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)).encode()
    tokens = np.frombuffer(text[:42_000], np.uint8)
    write_split(folder, "train", tokens[:40_000])
    write_split(folder, "valid", tokens[40_000:])
    return folder


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_text_data`."""
    return write_text_data(tmp_path_factory.mktemp("text_data"))
