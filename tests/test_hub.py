"""Hub datasets, through the real datasets and huggingface_hub, against a local server that answers like the hub."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import PATIENCE
from small_hub import small_hub

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.shards import open_shard

ROOT = Path(__file__).resolve().parent.parent
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*.parquet
---
A dataset.
"""


def parquet_of(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": [f"<urn:{text}>" for text in texts]}), out, row_group_size=3)
    return out.getvalue()


TEXTS = [[f"page {i} of file {file}" for i in range(10)] for file in range(2)]
FILES = {
    "README.md": CARD.encode(),
    "data/000_00000.parquet": parquet_of(["the whole"]),
    "sample/10BT/000_00000.parquet": parquet_of(TEXTS[0]),
    "sample/10BT/001_00000.parquet": parquet_of(TEXTS[1]),
}


def run(out: Path, home: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_fineweb.py"), "--dataset", "some/web"]
    command += [
        "--tokenizer",
        "bytes",
        "--output-dir",
        str(out),
        "--valid-tokens",
        "0",
        "--num-workers",
        "1",
        *arguments,
    ]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}  # for its answers, on shared cores
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_downloaded_once_or_streamed(tmp_path: Path, streaming: bool) -> None:
    with small_hub("some/web", FILES) as (endpoint, asked):
        done = run(tmp_path / "out", tmp_path / "home", endpoint, *(["--streaming"] if streaming else []))
        assert done.returncode == 0, "\n".join([done.stderr, *asked])
        manifest = manifests.read(tmp_path / "out" / "train")
        tokens = np.concatenate([open_shard(path) for path in manifest.paths(tmp_path / "out" / "train")])
        expected = [token for texts in TEXTS for text in texts for token in (*text.encode(), 256)]
        assert tokens.tolist() == expected
        assert manifest.source == ("some/web sample-10BT train",)
        names = [entry.file for entry in manifest.inputs]
        assert names == ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]
        assert all(entry.version for entry in manifest.inputs)
        stored = list((tmp_path / "home" / "hub").rglob("*.parquet")) if (tmp_path / "home" / "hub").exists() else []
        assert len(stored) == (0 if streaming else 2)
        assert ("\ndownload " in done.stdout) == (not streaming)
        again = run(tmp_path / "again", tmp_path / "home", endpoint, "--dry-run")
        assert again.returncode == 0, again.stderr
        assert ("\ndownload " in again.stdout) == streaming  # what is kept is not asked for twice


def test_files_are_downloaded_while_others_are_tokenized(tmp_path: Path, tiktoken_cache: Path) -> None:
    text = "".join(f"word{i} " for i in range(2_000_000))  # 2 s for tiktoken, against milliseconds for a download
    files = FILES | {"sample/10BT/000_00000.parquet": parquet_of([text])}
    downloads: list[tuple[str, int]] = []  # what was asked for, and how many units were finished then

    def on_download(name: str) -> None:
        units = (tmp_path / "out" / ".preparing" / "units").glob("*.json")
        downloads.append((name, len(list(units))))

    arguments = ["--tokenizer", "gpt2", "--no-fast-tokenizer"]
    with small_hub("some/web", files, on_download) as (endpoint, _):
        done = run(tmp_path / "out", tmp_path / "home", endpoint, *arguments)
    assert done.returncode == 0, done.stderr
    names = ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]
    assert [entry for entry in downloads if entry[0] != "README.md"] == [(name, 0) for name in names]  # and each once


def test_mistakes_about_a_hub_dataset_are_one_sentence(tmp_path: Path) -> None:
    with small_hub("some/web", FILES) as (endpoint, _):
        for arguments, said in (
            (("--name", "sample-9BT"), "sample-9BT"),
            (("--split", "test"), "has no --split test; it has train"),
            (("--text-column", "body"), "has no --text-column body; its columns: text, id"),
            (("--dataset", "some/other"), "--dataset some/other is not on"),
        ):
            done = run(tmp_path / "out", tmp_path / "home", endpoint, *arguments)
            assert done.returncode == 2, done.stderr
            assert said in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize("dataset", ["some/web", "hf://datasets/some/web"])
def test_without_a_network_the_host_and_local_paths_are_named(tmp_path: Path, dataset: str) -> None:
    with small_hub("some/web", FILES) as (endpoint, _):
        pass  # and the server is gone
    done = run(tmp_path / "out", tmp_path / "home", endpoint, "--dataset", dataset)
    assert done.returncode == 2, done.stderr
    assert endpoint.removeprefix("http://") in done.stderr
    assert "give local" in done.stderr
    assert "Traceback" not in done.stderr
