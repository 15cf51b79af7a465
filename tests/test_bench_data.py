"""The data benchmark runs, and its input is what it says."""

from itertools import islice
from pathlib import Path

from gpt2_xla.bench_config import DataBenchConfig
from gpt2_xla.data.benchmark import bench_data, distinct_texts, table


def test_the_input_is_distinct_and_always_the_same(shared_data: Path) -> None:
    texts = list(islice(distinct_texts(shared_data / "web_sample"), 3000))
    long = [text for text in texts if len(text) > 500]
    # Of the few pages without lowercase letters, only the number in front differs.
    assert len({text.partition(b"\n")[2] for text in long}) > 0.99 * len(long) > 2000
    assert len(set(texts)) == len(texts)
    assert texts == list(islice(distinct_texts(shared_data / "web_sample"), 3000))


def test_all_rows_agree_on_the_tokens(shared_data: Path, tiktoken_cache: Path) -> None:
    config = DataBenchConfig(sample=str(shared_data / "web_sample"), megabytes=2, workers=(1,))
    rows = bench_data(config, lambda text: None)
    assert [row.what.split(",")[0] for row in rows] == ["baseline", "ours", "bare tiktoken", "bare gigatoken"]
    assert len(table(rows, 2).splitlines()) == 6
