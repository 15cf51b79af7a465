"""Files appear whole, over what was there before, or not at all."""

from pathlib import Path

import pytest

from gpt2_xla.durable_files import atomic_write, flush


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        before = (tmp_path / "a").read_bytes() if (tmp_path / "a").exists() else None
        with atomic_write(tmp_path / "a") as file:
            file.write(content)
            file.flush()
            assert ((tmp_path / "a").read_bytes() if before else None) == before
        assert (tmp_path / "a").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_write(tmp_path / "a.npy") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert not list(tmp_path.iterdir())


def test_flush_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    flush(tmp_path / "a")
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "b")
