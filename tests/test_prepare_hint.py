"""The command that is proposed where a data folder is missing makes that folder."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2_xla import cli
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data import prepare
from gpt2_xla.data.prepare_hint import prepare_arguments, prepare_hint
from gpt2_xla.script_config import FinewebConfig, PrepareConfig


def parsed(folder: Path, config_type: type) -> tuple[str, PrepareConfig | FinewebConfig]:
    """The proposed script, and its flags as it would read them."""
    script, *flags = shlex.split(prepare_arguments(folder))
    return script, cli.parse(config_type, flags, "").config


@pytest.mark.parametrize("name", ["data/a b/train", "data/own/valid", "mine", "train"])
def test_the_command_makes_the_folder_asked_for_or_tells_where(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("So many words. " * 99)
    script, config = parsed(Path(name), PrepareConfig)
    assert script == "scripts/prepare_text.py"
    assert config.source == ("YOUR_TEXT",)
    prepare.prepare_text(replace(config, source=("text.txt",), tokenizer="bytes", num_workers=1))
    made = Path(name) if Path(name).name in ("train", "valid") else Path(name, "train")
    assert manifests.read(made).tokens > 100
    assert (f"which writes {made} and" in prepare_hint(Path(name))) == (made != Path(name))


@pytest.mark.parametrize("name", ["/train", "/valid", "/nope"])
def test_nothing_is_to_be_written_into_the_root(name):
    assert prepare_arguments(Path(name)).endswith(f" --output-dir {name}")


@pytest.mark.parametrize(("name", "edu"), [("data/fineweb_edu/train", True), ("/disk/fineweb/valid", False)])
def test_fineweb_comes_from_its_own_script(name, edu):
    script, config = parsed(Path(name), FinewebConfig)
    assert script == "scripts/prepare_fineweb.py"
    assert config.fineweb_edu == edu
    assert config.output_dir == str(Path(name).parent)


def test_the_folders_of_the_built_in_corpora_and_recipes_are_known():
    assert parsed(Path("data/pydoc/train"), PrepareConfig)[1].source == ("pydoc",)
    quickstart = parsed(Path("data/quickstart/valid"), PrepareConfig)[1]
    assert (quickstart.source, quickstart.tokenizer) == (("pydoc",), "bytes")


def test_a_file_is_the_text_itself_or_a_shard(tmp_path):
    (tmp_path / "book.txt").touch()
    _, config = parsed(tmp_path / "book.txt", PrepareConfig)
    assert config.source == (str(tmp_path / "book.txt"),)
    assert config.output_dir == "data/book"
    assert prepare_hint(tmp_path / "train_00000.npy") == f"give the folder of the shards, {tmp_path}"
