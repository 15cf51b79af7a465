"""Preparing data: what goes in comes out, for any number of processes; mistakes get one sentence and leave nothing."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import PATIENCE

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data import prepare, units
from gpt2_xla.data.inputs import inputs_of
from gpt2_xla.data.output import claim
from gpt2_xla.data.parts import hash_of
from gpt2_xla.data.shards import open_shard
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import FinewebConfig, PrepareConfig
from gpt2_xla.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
EOT = 256
TEXTS = ["first é", "", "second\n", "third 日本 " * 30, "a\ud800b", "nul \0 <|endoftext|>"]


def tokens_of(folder: Path) -> list[int]:
    manifest = manifests.read(folder)
    manifests.verify(folder, manifest, full=True)
    return np.concatenate([open_shard(path) for path in manifest.paths(folder)]).tolist()


def stream_of(texts: list[str]) -> list[int]:
    return [token for text in texts if text for token in (*ByteTokenizer().encode(text), EOT)]


def config_for(source: Path | str, output: Path, **options) -> PrepareConfig:
    defaults = PrepareConfig(source=(str(source),), tokenizer="bytes", output_dir=str(output), num_workers=1)
    return replace(defaults, **options)


def write_parquet(path: Path, texts: list[str | None], column: str = "text", **options) -> Path:
    table = pa.table({column: pa.array(texts, pa.string()), "id": list(range(len(texts)))})
    pq.write_table(table, path, **options)
    return path


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_script(name: str, *arguments: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE)


# What comes out


def test_one_file_splits_at_the_byte(tmp_path: Path) -> None:
    text = "To be, or not to be: é.\r\n" * 97
    (tmp_path / "play.txt").write_bytes(text.encode())
    prepare.prepare_text(config_for(tmp_path / "play.txt", tmp_path / "out", shard_size=1000))
    data = list(text.encode())
    cut = int(len(data) * 0.9)
    assert tokens_of(tmp_path / "out" / "train") == data[:cut]
    assert tokens_of(tmp_path / "out" / "valid") == [*data[cut:], EOT]
    train = manifests.read(tmp_path / "out" / "train")
    valid = manifests.read(tmp_path / "out" / "valid")
    assert [shard.tokens for shard in train.shards] == [1000, 1000, cut - 2000]
    assert (train.documents, valid.documents) == (0, 1)
    assert (train.text_bytes, valid.text_bytes) == (cut, len(data) - cut)
    assert (train.tokenizer, train.vocab_size, train.end_of_text, train.split) == ("bytes", 257, EOT, "train")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "valid"]


def test_documents_end_with_end_of_text_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"body": text}) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines + '\n{"body": null}\n \n\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    write_parquet(tmp_path / "c.parquet", ["row", None, "", "last"], "body")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.md").write_text("markdown")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "e.bin").write_text("not text")
    prepare.prepare_text(config_for(tmp_path, tmp_path / "out", text_column="body", valid_fraction=0.0))
    expected = [*TEXTS, *TEXTS, "row", "last", "markdown"]
    assert tokens_of(tmp_path / "out" / "train") == stream_of(expected)
    assert not (tmp_path / "out" / "valid").exists()
    manifest = manifests.read(tmp_path / "out" / "train")
    assert manifest.documents == sum(1 for text in expected if text)
    assert manifest.text_bytes == manifest.tokens - manifest.documents


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_text_bytes_are_right_where_the_split_cuts_a_document(
    tmp_path: Path, tokenizer: str, tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    texts = [f"document {i} says hello " * (i + 1) for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for fraction in (0.03, 0.1, 0.5, 0.9):
        out = tmp_path / f"out{fraction}"
        prepare.prepare_text(config_for(tmp_path / "a.jsonl", out, tokenizer=tokenizer, valid_fraction=fraction))
        train, valid = (manifests.read(out / split) for split in ("train", "valid"))
        decoded = prepare.load_tokenizer(tokenizer).decode_bytes(
            [t for t in tokens_of(out / "train") if t != train.end_of_text]
        )
        assert train.text_bytes == len(decoded)
        assert train.text_bytes + valid.text_bytes == sum(map(len, texts))
        assert train.documents + valid.documents == len(texts)


def test_fineweb_takes_whole_documents_for_valid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = [f"document {i} " * (i % 7 + 1) for i in range(200)]
    write_parquet(tmp_path / "a.parquet", texts[:120], row_group_size=50)
    write_parquet(tmp_path / "b.parquet", texts[120:])
    config = FinewebConfig(dataset=str(tmp_path), tokenizer="bytes", num_workers=1, shard_size=1500, valid_share=0.3)
    config = replace(config, id_column="number")  # there is none: file and row are the ids
    whole = documents_of(stream_of(texts))
    for want in (500, 10**7):
        out = tmp_path / f".out{want}"
        prepare.prepare_fineweb(replace(config, output_dir=str(out), valid_tokens=want))
        train, valid = (documents_of(tokens_of(out / split)) for split in ("train", "valid"))
        # Both keep the source's order.
        assert train == [document for document in whole if document in train]
        assert valid == [document for document in whole if document in valid]
        assert not set(train) & set(valid)
        assert 120 < len(train) < 160  # 0.7 of 200
        held = manifests.read(out / "train")
        assert len(train) + len(valid) + held.unused_documents == 200
        unused = sum(len(document) + 1 for document in whole if document not in train + valid)
        assert held.unused_tokens == unused
        said = capsys.readouterr().out
        if want == 500:
            assert 500 <= sum(map(len, valid)) + len(valid) < 600  # a document has at most 92 tokens
            assert f"unused {held.unused_documents:>20} {unused:>16,}" in said
        else:
            assert held.unused_documents == 0
            assert "unused" not in said
    prepare.prepare_fineweb(replace(config, output_dir=str(tmp_path / ".all"), valid_tokens=0))
    assert documents_of(tokens_of(tmp_path / ".all" / "train")) == whole
    assert not (tmp_path / ".all" / "valid").exists()


def documents_of(tokens: list[int]) -> list[tuple[int, ...]]:
    """The documents of a byte stream that ends with end-of-text, without it."""
    ends = [-1, *(i for i, token in enumerate(tokens) if token == EOT)]
    assert ends[-1] == len(tokens) - 1
    return [tuple(tokens[start + 1 : stop]) for start, stop in pairwise(ends)]


@pytest.mark.parametrize("seed", range(4))
def test_no_document_changes_sides_however_the_source_grows(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    share, wanted = random.uniform(0.05, 0.5), int(random.integers(300, 3000))
    names = random.permutation(400)
    ever: dict[str, set[tuple[int, ...]]] = {"train": set(), "valid": set()}
    for count in (40, 41, 150, 400):
        rows = random.permutation(names[:count])  # the new ones come anywhere among the old
        table = pa.table({"text": [f"text {i} " * 9 for i in rows], "id": [f"<urn:{i}>" for i in rows]})
        pq.write_table(table, tmp_path / f"{count}.parquet")
        out = tmp_path / str(count)
        config = FinewebConfig(dataset=str(tmp_path / f"{count}.parquet"), tokenizer="bytes", output_dir=str(out))
        prepare.prepare_fineweb(replace(config, num_workers=1, valid_tokens=wanted, valid_share=share))
        now = {split: set(documents_of(tokens_of(out / split))) for split in ever}
        ever = {split: ever[split] | now[split] for split in ever}
        assert not ever["train"] & ever["valid"]
        assert ever["train"] == now["train"]  # nothing leaves train/ either
    assert len(ever["valid"]) > 2


def test_a_share_that_leaves_a_split_empty_is_one_sentence_with_a_share_that_works(tmp_path: Path) -> None:
    config = FinewebConfig(dataset=str(tmp_path / "a.parquet"), tokenizer="bytes", num_workers=1)
    for count in (2, 3, 20, 300):
        write_parquet(tmp_path / "a.parquet", [f"text {i} " * 9 for i in range(count)])
        for share, empty in ((1e-9, "valid"), (0.9999999, "train")):
            out = tmp_path / f"out{count}{share}"
            first = replace(config, output_dir=str(out), valid_share=share)
            with pytest.raises(UserError, match=f"--valid-share .* so {empty}/ would be empty; use") as caught:
                prepare.prepare_fineweb(first)
            assert not list(out.iterdir())
            (found,) = re.findall(r"use --valid-share (\S+), or --valid-tokens 0", str(caught.value))
            prepare.prepare_fineweb(replace(first, valid_share=float(found)))
            train, valid = (manifests.read(out / split).documents for split in ("train", "valid"))
            assert train + valid == count
            assert count < 300 or 25 <= valid <= 35
    write_parquet(tmp_path / "a.parquet", ["only one"])
    for share in (1e-9, 0.9999999):
        with pytest.raises(UserError, match="would be empty; use --valid-tokens 0 for no valid/"):
            prepare.prepare_fineweb(replace(config, output_dir=str(tmp_path / "out"), valid_share=share))


def test_builtin_sources_are_there_and_deterministic(tmp_path: Path) -> None:
    prepare.prepare_text(config_for("pydoc", tmp_path / "out"))
    assert manifests.read(tmp_path / "out" / "train").text_bytes > 300_000
    stdlib = inputs_of("stdlib", "--source")
    assert len(stdlib) > 300
    assert not any({"test", "site-packages"} & set(file.name.split("/")) for file in stdlib)


def test_a_very_long_document_is_no_problem(tmp_path: Path) -> None:
    text = "long " * 600_000
    (tmp_path / "a.txt").write_text(text)
    prepare.prepare_text(config_for(tmp_path / "a.txt", tmp_path / "out", valid_fraction=0.5))
    assert manifests.read(tmp_path / "out" / "train").tokens == len(text) // 2


# Any number of processes


def test_number_of_processes_changes_no_byte(
    tmp_path: Path, shared_data: Path, tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 200_000)
    outputs = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        config = config_for(shared_data / "web_sample", out, tokenizer="gpt2", shard_size=100_000, num_workers=workers)
        prepare.prepare_text(config)
        outputs.append(files_under(out))
    assert len(outputs[0]) == 8  # 5 + 1 shards, 2 manifests
    assert outputs[0] == outputs[1] == outputs[2]


def endless_texts(folder: Path) -> Path:
    """A source that takes long: one file in many hard links."""
    folder.mkdir()
    (folder / "0.txt").write_text("some words to tokenize, and more of them\n" * 20_000)
    for i in range(1, 2000):
        os.link(folder / "0.txt", folder / f"{i}.txt")
    return folder


def start_long_run(tmp_path: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A run with two workers, both at work; the command and its worker processes."""
    source = endless_texts(tmp_path / "in")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "prepare_text.py"),
        "--source",
        str(source),
        "--tokenizer",
        "bytes",
    ]
    command += ["--num-workers", "2", "--output-dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    parts = tmp_path / "out" / ".preparing" / "units"
    deadline = time.monotonic() + PATIENCE
    while not any(parts.glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no unit"
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


def workers_among(children: list[psutil.Process]) -> list[psutil.Process]:
    """The tokenizing processes, without multiprocessing's own; there must be some."""
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert workers
    return workers


def test_interrupt_leaves_no_processes_and_keeps_finished_units(tmp_path: Path) -> None:
    process, children = start_long_run(tmp_path)
    for worker in workers_among(children):
        # A worker that saw Ctrl-C while it waits would print a traceback; one at work would not, so ask for the mask.
        blocked = Path(f"/proc/{worker.pid}/status").read_text().split("SigBlk:")[1].split()[0]
        assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".preparing"]


def test_killed_run_leaves_no_processes_and_refuses_another_command(tmp_path: Path) -> None:
    process, children = start_long_run(tmp_path)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
    (tmp_path / "b.txt").write_text("another text")
    other = config_for(tmp_path / "b.txt", tmp_path / "out")
    with pytest.raises(UserError, match=r"unfinished work of another command: --source was .*in'\], is .*b.txt"):
        prepare.prepare_text(other)
    same = config_for(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="--shard-size was 100000000, is 9"):
        prepare.prepare_text(replace(same, shard_size=9))
    (tmp_path / "in" / "7.txt").unlink()
    (tmp_path / "in" / "7.txt").write_text("changed")
    (tmp_path / "in" / "8.txt").unlink()
    with pytest.raises(UserError, match=r"input in/7.txt has changed \(.* bytes, now 7\); input in/8.txt is gone"):
        prepare.prepare_text(same)


def test_unfinished_work_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    ours = {"version": "2", "options": {"tokenizer": "a.json"}, "tokenizer_hash": "1", "source": ["x"], "inputs": []}
    claim(tmp_path, ours)
    for theirs, said in (
        (ours | {"options": {"tokenizer": "bytes"}}, "--tokenizer was a.json, is bytes"),
        (ours | {"tokenizer_hash": "2"}, "its tokenizer hash was 1, is 2"),
    ):
        with pytest.raises(UserError, match=f"unfinished work of another command: {said}"):
            claim(tmp_path, theirs)


def test_a_dying_worker_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    process, children = start_long_run(tmp_path)
    workers_among(children)[0].kill()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "one of the 2 tokenizing processes died" in errors
    assert "Traceback" not in errors


# An output folder that holds something


def test_same_command_again_keeps_the_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("hello world " * 9)
    config = config_for(tmp_path / "a.txt", tmp_path / "out")
    prepare.prepare_text(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepare.prepare_text(replace(config, num_workers=2, seed=5))
    assert "already holds this data" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_missing_split_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world " * 9)
    config = config_for(tmp_path / "a.txt", tmp_path / "out")
    prepare.prepare_text(config)
    before = files_under(tmp_path / "out")
    (tmp_path / "out" / "train").rename(tmp_path / "gone")
    prepare.prepare_text(config)
    assert files_under(tmp_path / "out") == before
    (tmp_path / "a.txt").write_text("hello other " * 9)
    (tmp_path / "out" / "valid").rename(tmp_path / "gone2")
    with pytest.raises(UserError, match=r"holds other data: input a\.txt has changed"):
        prepare.prepare_text(config)


def test_other_data_in_the_way_is_refused_and_kept(tmp_path: Path, tiktoken_cache: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world " * 9)
    config = config_for(tmp_path / "a.txt", tmp_path / "out")
    prepare.prepare_text(config)
    before = files_under(tmp_path / "out")
    for other, said in (
        (replace(config, tokenizer="gpt2"), "--tokenizer was bytes, is gpt2;"),
        (replace(config, valid_fraction=0.2), "--valid-fraction was 0.1, is 0.2;"),
        (replace(config, source=("pydoc",)), "--source was .*, is pydoc;"),
    ):
        with pytest.raises(UserError, match=f"holds other data: {said}"):
            prepare.prepare_text(other)
    assert files_under(tmp_path / "out") == before
    next((tmp_path / "out" / "train").glob("*.npy")).open("r+b").truncate(130)
    with pytest.raises(UserError, match="its header promises") as caught:
        prepare.prepare_text(config)
    assert "to prepare it again" in caught.value.mistakes[-1]


def test_foreign_files_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "thesis.doc").touch()
    with pytest.raises(UserError, match="holds files that no prepare command wrote"):
        prepare.prepare_text(config_for("pydoc", tmp_path / "out"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with prepare.work_folder(tmp_path), pytest.raises(UserError, match="another command is preparing"):
        prepare.prepare_text(config_for("pydoc", tmp_path))
    assert not list(tmp_path.iterdir())


# Mistakes


@pytest.mark.parametrize("make", [prepare.prepare_text, prepare.prepare_fineweb])
def test_wrong_column_lists_the_columns(tmp_path: Path, make) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"], "body")
    config = config_for(tmp_path / "a.parquet", tmp_path / "out")
    if make is prepare.prepare_fineweb:
        config = FinewebConfig(dataset=str(tmp_path), tokenizer="bytes", output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"a.parquet has no --text-column text; its columns: body, id"):
        make(config)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1 this is no parquet PAR1", r"a.parquet can't be read as parquet"),
        ("a.parquet", b"", r"a.parquet can't be read as parquet"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 text \(byte 0xe9 at position 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text', r"a.jsonl:2 is not a line of JSON"),
        ("a.jsonl", b'{"body": "x", "n": 1}', r"a.jsonl:1 has no text in --text-column text; its fields: body, n"),
        ("a.jsonl", b'{"text": 5}', r"a.jsonl:1 has no text in --text-column text"),
        ("a.jsonl", b"[1]", r"a.jsonl:1 has no text"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz is cut short or damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:40], r"a.jsonl.gz is cut short or damaged"),
        ("a.txt", b"", r"there is no text in it"),
        ("a.txt", b"x", r"too little text to split"),
    ],
)
def test_bad_source_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare.prepare_text(config_for(tmp_path / name, tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))


def corrupt_parquet(path: Path) -> Path:
    file = write_parquet(path, [f"text {i}" * 50 for i in range(2000)], compression="zstd")
    data = bytearray(file.read_bytes())
    data[200:260] = bytes(60)
    file.write_bytes(data)
    return file


def test_corrupt_parquet_page_is_named_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = corrupt_parquet(tmp_path / "in" / "b.parquet")
    write_parquet(tmp_path / "in" / "a.parquet", ["good", "text"])
    (tmp_path / "in" / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "d.txt").write_bytes(b"fine")
    (tmp_path / "in" / "e.parquet").write_bytes(b"PAR1 this is no parquet PAR1")
    config = config_for(tmp_path / "in", tmp_path / "out", valid_fraction=0.0)
    with pytest.raises(UserError, match=r"e.parquet can't be read as parquet"):
        prepare.prepare_text(config)
    (tmp_path / "in" / "e.parquet").unlink()
    with pytest.raises(UserError, match=r"b.parquet can't be read as parquet"):
        prepare.prepare_text(config)
    (tmp_path / "in" / "e.parquet").write_bytes(b"PAR1 this is no parquet PAR1")
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare.prepare_text(replace(config, output_dir=str(out), skip_bad_files=True, num_workers=workers))
        assert tokens_of(out / "train") == stream_of(["good", "text", "fine"])
        skipped = manifests.read(out / "train").skipped_files
        assert len(skipped) == 3
        assert all(any(name in text for text in skipped) for name in ("b.parquet", "c.txt is not UTF-8", "e.parquet"))
    with pytest.raises(UserError, match=r"b.parquet can't be read as parquet"):
        prepare.prepare_fineweb(FinewebConfig(dataset=str(file), tokenizer="bytes", output_dir=str(tmp_path / "o3")))


def test_all_mistakes_of_a_command_are_listed(tmp_path: Path) -> None:
    config = config_for(
        tmp_path / "nowhere", tmp_path, tokenizer="gpt-2", valid_fraction=1.0, shard_size=0, num_workers=0
    )
    with pytest.raises(UserError) as caught:
        prepare.prepare_text(config)
    assert len(caught.value.mistakes) == 5
    with pytest.raises(UserError) as caught:
        prepare.prepare_fineweb(FinewebConfig(valid_tokens=-1, valid_share=1.0, tokenizer="nope", shard_size=0))
    assert len(caught.value.mistakes) == 4


def test_folder_without_readable_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"holds no .txt, "):
        prepare.prepare_text(config_for(tmp_path / "in", tmp_path / "out"))


def test_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output-dir .*file/out: can't write .*Not a directory"):
        prepare.prepare_text(config_for("pydoc", tmp_path / "file" / "out"))


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    # The limit on file size fails as a full disk does, in write().
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"--output-dir .*: can't write .*; make room"):
            prepare.prepare_text(config_for("pydoc", tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").iterdir())


# As a user starts them


def test_scripts_prepare_from_any_folder(tmp_path: Path) -> None:
    done = run_script("prepare_text.py", "--tokenizer", "bytes", "--output-dir", "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python run_pretrain.py --train-dir data/train --valid-dir data/valid" in done.stdout
    manifest = manifests.read(tmp_path / "data" / "train")
    assert manifest.command.startswith("python scripts/prepare_text.py --source pydoc --tokenizer bytes")
    assert manifest.source[0].startswith("pydoc of CPython 3.")


def test_fineweb_script_reads_local_parquet(tmp_path: Path, shared_data: Path, tiktoken_cache: Path) -> None:
    out = tmp_path / "web"
    done = run_script(
        "prepare_fineweb.py", "--dataset", shared_data / "web_sample", "--output-dir", out, "--valid-share", 0.1
    )
    assert done.returncode == 0, done.stderr
    train, valid = (manifests.read(out / split) for split in ("train", "valid"))
    assert train.documents + valid.documents == 780
    assert train.tokens + valid.tokens == 488_133
    assert 50 < valid.documents < 110
    rows = [row for name in ("000", "001") for row in rows_of(shared_data / "web_sample" / f"{name}_00000.parquet")]
    tokenizer = prepare.load_tokenizer("gpt2")
    in_valid = [row for row in rows if hash_of(row["id"].encode()) <= int(valid.split_rule.split()[-1])]
    expected = [token for row in in_valid for token in (*tokenizer.encode(row["text"]), 50256)]
    assert tokens_of(out / "valid") == expected
    assert valid.shards[0].first_document == in_valid[0]["id"]
    assert valid.shards[0].last_document == in_valid[-1]["id"]
    assert [entry.file for entry in train.inputs] == ["web_sample/000_00000.parquet", "web_sample/001_00000.parquet"]


def rows_of(file: Path) -> list[dict]:
    return pq.read_table(file).to_pylist()


def test_fineweb_without_network_names_the_host(tmp_path: Path) -> None:
    done = run_script(
        "prepare_fineweb.py",
        "--tokenizer",
        "bytes",
        "--output-dir",
        tmp_path / "out",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 2
    assert "huggingface.co" in done.stderr
    assert "--dataset PATH" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["prepare_text.py", "prepare_fineweb.py"])
def test_mistakes_end_with_status_2_and_no_traceback(tmp_path: Path, script: str) -> None:
    done = run_script(script, "--tokenizer", "byte", "--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert "did you mean bytes" in done.stderr
    assert "Traceback" not in done.stderr


def test_preparing_text_imports_no_torch() -> None:
    code = "import sys; import gpt2_xla.data.prepare; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE).returncode == 0
