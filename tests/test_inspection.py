"""inspect_data.py: counts against brute force in any pieces, damage found, text compared token for token."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.inspection import inspect, most_frequent, statistics
from gpt2_xla.data.manifest import Manifest, ShardEntry
from gpt2_xla.data.shards import TokenStream, write_shard
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import InspectConfig
from gpt2_xla.tokenizer import ByteTokenizer

END = ByteTokenizer.end_of_text
PNG = b"\x89PNG\r\n\x1a\n"


def write_folder(folder: Path, tokens: np.ndarray, shard_size: int = 50, **fields) -> Path:
    """Byte tokens as shards with a manifest."""
    folder.mkdir()
    entries = []
    for i, start in enumerate(range(0, len(tokens), shard_size)):
        part = tokens[start : start + shard_size].astype(np.uint16)
        entries.append(ShardEntry(f"s_{i:02d}.npy", len(part), 0, write_shard(folder / f"s_{i:02d}.npy", part)))
    kind = ByteTokenizer()
    values = {"tokenizer": "bytes", "tokenizer_hash": kind.hash, "vocab_size": 257, "end_of_text": END} | fields
    manifests.write(folder, Manifest("train", "uint16", len(tokens), tuple(entries), **values))
    return folder


def text_tokens(texts: list[str]) -> np.ndarray:
    return np.array([token for text in texts for token in (*text.encode(), END)])


TEXTS = ["first text", "the second, longer text", "", "third $ text_{x}"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four short documents in two shards."""
    return write_folder(tmp_path / "data", text_tokens(TEXTS))


def config(tmp_path: Path, **options) -> InspectConfig:
    return InspectConfig(**{"output": str(tmp_path / "p.png")} | options)


@given(st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=8), st.integers(1, 20), st.integers(1, 9))
@settings(max_examples=80)
def test_statistics_equal_counting_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], piece: int, shard_size: int
) -> None:
    end, tail = 5, len(documents[-1]) if documents else 0
    documents = [[token for token in document if token != end] for document in documents]
    tokens = [token for document in documents for token in (*document, end)] + [0] * tail
    shards = write_folder(tmp_path_factory.mktemp("s") / "d", np.array([*tokens, 1]), shard_size)
    stream = TokenStream(sorted(shards.glob("*.npy")))
    whole = stream.chunks
    stream.chunks = lambda: whole(piece)  # type: ignore[method-assign]
    found = statistics(stream, end, tqdm(disable=True))
    lengths = [len(document) for document in documents]
    assert found.tokens == len(tokens) + 1
    assert found.tail == tail + 1
    assert found.counts[:6].tolist() == [[*tokens, 1].count(token) for token in range(6)]
    assert (found.documents, found.length_sum, found.empty) == (len(lengths), sum(lengths), lengths.count(0))
    assert (found.shortest, found.longest) == (min(lengths, default=None), max(lengths, default=0))
    expected = [sum(length <= 1 for length in lengths)]
    expected += [sum(2 ** (b - 1) < length <= 2**b for length in lengths) for b in range(1, len(found.lengths))]
    assert found.lengths.tolist() == expected


def test_most_frequent_tokens_come_first_and_absent_ones_never() -> None:
    found = statistics(_Memory([3, 3, 1, 2, 2, 2]), None, tqdm(disable=True))
    assert most_frequent(found, 9) == [2, 3, 1]
    assert found.largest == 3


class _Memory(TokenStream):
    """A stream of one piece."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = np.array(tokens)

    def chunks(self, size: int = 0):
        yield 0, self._tokens

    def locate(self, position: int) -> tuple[Path, int]:
        return Path("s.npy"), position


def test_ids_that_no_vocabulary_has_are_named() -> None:
    assert statistics(_Memory([7, 100_000]), None, tqdm(disable=True)).counts[100_000] == 1
    with pytest.raises(UserError, match=r"token 1 of s.npy is 4000000000; no vocabulary has that many ids"):
        statistics(_Memory([7, 4_000_000_000]), None, tqdm(disable=True))


def test_the_report_tells_numbers_samples_and_draws(folder: Path, tmp_path: Path) -> None:
    report, picture = inspect(config(tmp_path, samples=4), folder)
    for part in (
        "checked 2 of 2 by sha256",
        "        53\n",
        "4, 1 of them empty; 0 tokens after the last",
        "0 to 23 tokens",
    ):
        assert part in report
    assert "“t”" in report
    assert report.count("at token") == 4
    assert any(f": {text}" in report for text in TEXTS if text)
    assert picture.read_bytes().startswith(PNG)


def test_bare_shards_are_described_by_their_ids(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    np.save(tmp_path / "bare" / "a.npy", np.array([7, 8, 7], np.uint16))
    report, _ = inspect(config(tmp_path), tmp_path / "bare")
    assert "unknown (no manifest)" in report
    assert "documents     unknown: which token ends one is not recorded" in report
    assert "“7”" in report
    with pytest.raises(UserError, match="--against needs a tokenizer"):
        inspect(config(tmp_path, against=("x",)), tmp_path / "bare")
    report, _ = inspect(config(tmp_path, tokenizer="bytes"), tmp_path / "bare")
    assert r"“\x07”" in report


def test_damage_is_found_in_every_shard(folder: Path, tmp_path: Path) -> None:
    for name in ("s_00.npy", "s_01.npy"):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        inspect(config(tmp_path), folder)
    assert len(caught.value.mistakes) == 2
    assert all("its sha256 differs" in mistake for mistake in caught.value.mistakes)
    assert not (tmp_path / "p.png").exists()


def test_lengths_alone_are_checked_on_demand(folder: Path, tmp_path: Path) -> None:
    assert "checked by their lengths only" in inspect(config(tmp_path, verify=False), folder)[0]


@pytest.mark.parametrize("order", [1, -1])
def test_documents_of_the_source_are_found_token_for_token(tmp_path: Path, order: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i, text in enumerate(TEXTS):
        (source / f"{i}.txt").write_text(text)
    (source / "z.txt").write_text("another")
    folder = write_folder(tmp_path / "data", text_tokens(TEXTS[::order]), shard_size=7)
    report, _ = inspect(config(tmp_path, against=(str(source),)), folder)
    assert "3 of 4 documents" in report
    assert "first begins 'another'" in report


POEM = "one document that a split has cut in two, so that no end of text is in its first part\n"


@pytest.mark.parametrize("cut", [20, 60])
def test_both_parts_of_a_cut_document_are_found_and_no_other_text_is(tmp_path: Path, cut: int) -> None:
    for name, text in (("mine", POEM), ("yours", POEM.replace("one", "two").replace("first part", "last part"))):
        (tmp_path / f"{name}.txt").write_text(text)
    tokens = text_tokens([POEM])
    parts = {
        "first": write_folder(tmp_path / "train", tokens[:cut]),
        "last": write_folder(tmp_path / "v", tokens[cut:]),
    }
    for side, folder in parts.items():
        report, _ = inspect(config(tmp_path, against=(str(tmp_path / "mine.txt"),)), folder)
        assert "1 of 1 documents" in report
        size = cut if side == "first" else len(POEM) - cut
        assert f"of one, which the split cut, only the {side} {size} of its {len(POEM)} tokens" in report
        with pytest.raises(UserError, match="none of 1 documents"):
            inspect(config(tmp_path, against=(str(tmp_path / "yours.txt"),)), folder)


def test_whole_documents_around_a_cut_one_are_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i, text in enumerate((*TEXTS, POEM, "behind the cut")):
        (source / f"{i}.txt").write_text(text)
    tokens = text_tokens([*TEXTS, POEM])
    report, _ = inspect(config(tmp_path, against=(str(source),)), write_folder(tmp_path / "data", tokens[:-30]))
    assert "4 of 5 documents" in report  # an empty file is no document
    assert f"only the first {len(POEM) - 29} of its {len(POEM)} tokens" in report
    assert "(perhaps in the other split): 1; the first begins 'behind" in report


def test_data_without_an_end_of_text_says_why_it_shows_no_documents(tmp_path: Path) -> None:
    report, picture = inspect(config(tmp_path), write_folder(tmp_path / "data", text_tokens([POEM])[:40]))
    assert "documents     none ends here: the 40 tokens are a part of one" in report
    assert picture.read_bytes().startswith(PNG)


def test_shards_of_another_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first texT")
    folder = write_folder(tmp_path / "data", text_tokens(TEXTS))
    with pytest.raises(UserError, match=r"none of 1 documents .* the first begins 'first texT'"):
        inspect(config(tmp_path, against=(str(tmp_path / "a.txt"),)), folder)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", text_tokens(TEXTS), tokenizer_hash="0" * 64)
    with pytest.raises(UserError, match=r"tokenizer bytes .* is not the one that prepared"):
        inspect(config(tmp_path), folder)


def test_mistakes_of_options_come_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        inspect(config(tmp_path, samples=-1, top=0, seed=-1, against_documents=0), folder)
    assert len(caught.value.mistakes) == 4
    with pytest.raises(UserError, match=r"--output .*nowhere.* cannot be written"):
        inspect(InspectConfig(output=str(tmp_path / "nowhere" / "p.png")), folder)


@pytest.mark.parametrize("flag", [(), ("--data",)])
def test_the_command_takes_the_folder_with_or_without_its_flag(
    flag: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _command(monkeypatch, *flag, folder, "--samples", 1) == 0
    assert "picture       data_tokens.png" in capsys.readouterr().out
    assert (tmp_path / "data_tokens.png").read_bytes().startswith(PNG)


def test_the_command_names_its_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for arguments, part in (
        ((), "no folder was named"),
        (("absent",), "data folder absent does not exist"),
        (("a", "b"), "unexpected argument 'b'"),
    ):
        assert _command(monkeypatch, *arguments) == 2
        assert part in capsys.readouterr().err


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    import importlib.util

    path = Path(__file__).resolve().parent.parent / "scripts" / "inspect_data.py"
    spec = importlib.util.spec_from_file_location("inspect_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
    return module.run_main(module.main)
