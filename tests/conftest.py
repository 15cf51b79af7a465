"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
