"""The parts of the pipeline: units, documents, encoders, splits; and what a person sees of it."""

import contextlib
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data import prepare, prepare_report, splits, units
from gpt2_xla.data.manifest import Manifest, ShardEntry
from gpt2_xla.data.shards import open_shard
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import FinewebConfig, PrepareConfig
from gpt2_xla.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EOT = 256


def tokens_of(folder: Path) -> list[int]:
    manifest = manifests.read(folder)
    manifests.verify(folder, manifest, full=True)
    return np.concatenate([open_shard(path) for path in manifest.paths(folder)]).tolist()


def text_config(source: Path | str, output: Path, **options) -> PrepareConfig:
    defaults = PrepareConfig((str(source),), "bytes", str(output), num_workers=1, valid_fraction=0.0)
    return replace(defaults, **options)


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files need not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Units and documents


@pytest.mark.usefixtures("no_flush")
def test_blocks_of_files_give_each_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{'long ' * (i * 37 % 90)}{i} é\n日" for i in range(150)]
    lines = "".join(json.dumps({"text": text}) + "\n" * (1 + i % 3) for i, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    frames = [zstandard.compress(part.encode()) for part in (lines[:999], lines[999:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "d.txt").write_text("word\n" * 3000)
    (tmp_path / "e.txt").write_text("no place to cut " * 500)
    pq.write_table(pa.table({"text": texts}), tmp_path / "f.parquet", row_group_size=30)
    expected = [*texts * 3, "word\n" * 3000, "no place to cut " * 500, *texts]
    stream = [token for text in expected for token in (*text.encode(), EOT)]
    for size in (97, 1000, 10**7):
        monkeypatch.setattr(units, "UNIT_BYTES", size)
        out = tmp_path / f".{size}"
        prepare.prepare_text(text_config(tmp_path, out))
        assert tokens_of(out / "train") == stream
        assert manifests.read(out / "train").documents == len(expected)


def test_errors_in_blocks_name_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 50)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 40 + "{bad\n")
    with pytest.raises(UserError, match=r"a.jsonl:41 is not a line of JSON"):
        prepare.prepare_text(text_config(tmp_path / "a.jsonl", tmp_path / "out"))


def test_exact_duplicates_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "abacab"))
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("d")
    monkeypatch.setattr(units, "UNIT_BYTES", 30)
    monkeypatch.setattr(splits, "HASHES_AT_ONCE", 2)
    prepare.prepare_text(text_config(tmp_path, tmp_path / ".out", dedup="exact"))
    assert tokens_of(tmp_path / ".out" / "train") == [97, EOT, 98, EOT, 99, EOT, 100, EOT]
    assert manifests.read(tmp_path / ".out" / "train").duplicates == 4
    assert "4 exact duplicates dropped" in capsys.readouterr().out


def test_manifest_names_the_documents_at_the_shards_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 60)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "123"}) + "\n" for i in range(12)))
    prepare.prepare_text(text_config(tmp_path / "a.jsonl", tmp_path / "out", shard_size=10))
    shards = manifests.read(tmp_path / "out" / "train").shards
    names = [f"a.jsonl#{16 * i}" for i in range(12)]
    assert [(s.first_document, s.last_document) for s in shards] == [
        (names[start * 10 // 4], names[(min(start * 10 + 10, 48) - 1) // 4]) for start in range(5)
    ]
    assert [s.documents for s in shards] == [2, 3, 2, 3, 2]


PAGE = "The quick brown fox, 1234 times, jumps over the lazy dog\nand sees another fox. \0 \ud800 end\n"


@pytest.mark.parametrize(("text", "workers"), [(PAGE * 550_000, 2), ("x" * 50_000_000, 1)], ids=["page", "letter"])
def test_documents_of_50_megabytes_stay_within_memory(
    tmp_path: Path, tiktoken_cache: Path, text: str, workers: int
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(workers):  # one for each at the same time
        rows = [{"text": text}, {"text": ""}, {"text": "\ud83d"}, {"text": "\0"}]
        (tmp_path / "in" / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert (tmp_path / "in" / f"{i}.jsonl").stat().st_size > 50e6
    command = [sys.executable, str(ROOT / "scripts" / "prepare_text.py"), "--source", str(tmp_path / "in")]
    command += ["--output-dir", str(tmp_path / "out"), "--num-workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            running = psutil.Process(process.pid)
            for one in [running, *running.children(recursive=True)]:
                peaks[one.pid] = max(peaks.get(one.pid, 0), peak_memory(one.pid))
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()[1]
    assert 0.2e9 < sum(peaks.values()) < 1.2e9  # the aim is 1.5
    train, valid = (manifests.read(tmp_path / "out" / split) for split in ("train", "valid"))
    assert train.documents + valid.documents == 3 * workers
    tail = open_shard(valid.paths(tmp_path / "out" / "valid")[-1])[-4:].tolist()
    tokenizer = load_tokenizer("gpt2")
    assert tail == [token for end in ("\ufffd", "\0") for token in (*tokenizer.encode(end), 50256)]


def peak_memory(pid: int) -> int:
    """Bytes. Not getrusage's ru_maxrss, which a process inherits from the one that started it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


# A crash at every step


class Crash(BaseException):
    """Stands for a kill, but runs the clean-up code, as Ctrl-C does."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Raise Crash before the state["left"]-th rename or deletion of a file."""
    state = {"left": 10**9}
    for name in ("replace", "rename", "unlink"):
        original = getattr(Path, name)

        def step(self: Path, *args, original=original, **options):
            if not self.name.endswith(".tmp") or original.__name__ == "replace":
                state["left"] -= 1
                if state["left"] == 0:
                    raise Crash
            return original(self, *args, **options)

        monkeypatch.setattr(Path, name, step)
    return state


@pytest.mark.usefixtures("no_flush")
def test_a_crash_at_any_step_is_continued(tmp_path: Path, crash_at: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    rows = [f"document {i} " * (i % 9 + 1) for i in range(160)]
    pq.write_table(
        pa.table({"text": rows, "id": list(map(str, range(160)))}), tmp_path / "a.parquet", row_group_size=20
    )
    config = FinewebConfig(str(tmp_path / "a.parquet"), tokenizer="bytes", num_workers=1, shard_size=3000)

    def run(out: Path) -> dict[str, bytes]:
        prepare.prepare_fineweb(replace(config, output_dir=str(out), dedup="exact", valid_tokens=1500, valid_share=0.2))
        return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}

    expected = run(tmp_path / "whole")
    assert len(expected) > 4
    steps = 0
    while True:
        steps += 1
        crash_at["left"] = steps
        try:
            run(tmp_path / str(steps))
        except Crash:
            crash_at["left"] = 10**9
            assert run(tmp_path / str(steps)) == expected, f"after a crash at step {steps}"
        else:
            break
    assert steps > 30


# What a person sees; where sources may be


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("hello " * 1000)
    prepare.prepare_text(text_config(tmp_path / "a.txt", tmp_path / "out", dry_run=True))
    said = capsys.readouterr().out
    assert "1 files, about 0.0 MB of text in 1 units" in said
    assert "MB needed" in said
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_said_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello " * 1000)
    monkeypatch.setattr(prepare_report, "disk_free", lambda folder: 100)
    with pytest.raises(UserError, match=r"--output-dir .*: about 0.0 MB needed, 0.0 MB free; make room"):
        prepare.prepare_text(text_config(tmp_path / "a.txt", tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_downloads_count_towards_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_report, "disk_free", lambda folder: 5_000_000_000)
    out, cache = tmp_path / "out", tmp_path / "cache"
    prepare_report.check_disk(out, 4_000_000_000, cache, 1_000_000_000)
    with pytest.raises(UserError, match=r"about 6\.0 GB needed \(2\.0 GB of it downloads.* 5\.0 GB free"):
        prepare_report.check_disk(out, 4_000_000_000, cache, 2_000_000_000)
    monkeypatch.setattr(prepare_report, "_disk", str)  # each folder a disk of its own
    prepare_report.check_disk(out, 4_000_000_000, cache, 2_000_000_000)
    with pytest.raises(UserError, match=r"--cache-dir .*cache: about 6\.0 GB needed"):
        prepare_report.check_disk(out, 4_000_000_000, cache, 6_000_000_000)


def test_addresses_are_read_through_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "row"}\n')
    pq.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "in" / "c.parquet")
    stream = [token for text in ("text", "row", "x", "y") for token in (*text.encode(), EOT)]
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare.prepare_text(text_config(f"file://{tmp_path / 'in'}", out, num_workers=workers))
        assert tokens_of(out / "train") == stream
    for url, said in (("gs://bucket/x", "pip install gcsfs"), ("gopher://x", "unknown kind of address gopher://")):
        with pytest.raises(UserError, match=said):
            prepare.prepare_text(text_config(url, tmp_path / "out3"))


def test_a_store_without_credentials_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="the package for s3:// is missing")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"s3://bucket/x can't be read from s3://bucket .*credentials"):
        prepare.prepare_text(text_config("s3://bucket/x", tmp_path / "out"))


def test_lone_surrogates_in_parquet_are_replaced_and_other_bad_utf8_is_named(tmp_path: Path) -> None:
    def write(*texts: bytes | None) -> None:
        strings = pa.array(texts, pa.binary()).view(pa.string())  # arrow believes that they are UTF-8
        pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")

    write(b"good \xc3\xa9", b"lone \xed\xa0\x80 high", None, b"")
    config = text_config(tmp_path / "a.parquet", tmp_path / "out")
    prepare.prepare_text(config)
    texts = ("good é", "lone \ufffd high")
    assert tokens_of(tmp_path / "out" / "train") == [token for text in texts for token in (*text.encode(), EOT)]
    write(b"good", b"latin \xe9 ")
    with pytest.raises(UserError, match=r"a.parquet can't be read as parquet .*0xe9"):
        prepare.prepare_text(text_config(tmp_path / "a.parquet", tmp_path / "out2"))


def test_a_wrong_column_of_many_files_is_told_of_a_few(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(9):
        pq.write_table(pa.table({"body": ["x"]}), tmp_path / "in" / f"{i}.parquet")
    with pytest.raises(UserError) as caught:
        prepare.prepare_text(text_config(tmp_path / "in", tmp_path / "out"))
    assert len(caught.value.mistakes) == 6
    assert "its columns: body" in caught.value.mistakes[0]
    assert "4 more files" in caught.value.mistakes[-1]


def test_the_command_to_train_names_a_vocabulary_that_the_default_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shard = ShardEntry("train_00000.npy", 3000, 1)
    for vocabulary, said in ((100_277, True), (50_257, False)):
        (tmp_path / "train").mkdir(exist_ok=True)
        manifests.write(tmp_path / "train", Manifest("train", "uint32", 3000, (shard,), vocab_size=vocabulary))
        prepare_report.report(tmp_path)
        assert ("--vocab-size 100277" in capsys.readouterr().out) == said
