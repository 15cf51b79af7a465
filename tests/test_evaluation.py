"""scripts/evaluate.py and --do-test: the loss is transformers', whatever the batch; questions are answered as by brute force."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PYTHON, ROOT, data_flags, finish, run, start
from conftest import write_split
from small_runs import FOUR_STEPS, run_here
from test_pretrained import random_gpt2
from transformers import GPT2LMHeadModel

import run_pretrain
from gpt2_xla import evaluation
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.errors import UserError
from gpt2_xla.evaluate import bits_per_byte
from gpt2_xla.generation import load_model
from gpt2_xla.multiple_choice import encode_pair, hellaswag_question, log_likelihoods, read_hellaswag
from gpt2_xla.script_config import EvaluateConfig
from gpt2_xla.tokenizer import ByteTokenizer
from gpt2_xla.tokenizer_export import write_tokenizer

LENGTH = 64  # positions of the models here


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two GPT-2s over bytes, the second deeper."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, layers) in enumerate((("small", 1), ("large", 2))):
        random_gpt2(folder / name, seed=seed, n_layer=layers)
        write_tokenizer(ByteTokenizer(), folder / name, LENGTH)
    return [folder / "small", folder / "large"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """1,000 bytes, the manifest of which says that its text had 900."""
    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(0).integers(32, 127, 1000)
    split = write_split(folder, "valid", tokens)
    manifest = manifests.read(split)
    manifests.write(split, Manifest(**{**vars(manifest), "text_bytes": 900}))
    return folder


def measured(capsys, **options) -> dict:
    capsys.readouterr()
    evaluation.run(EvaluateConfig(device="cpu", json=True, **options))
    return json.loads(capsys.readouterr().out)


def window_losses(folder: Path, split: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of targets of each window, by transformers."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    stream = torch.from_numpy(np.load(next(split.glob("*.npy"))).astype(np.int64))
    sums, counts = [], []
    for begin in range(0, len(stream) - 1, length):
        window = stream[begin : begin + length + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        sums.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item())
        counts.append(len(window) - 1)
    return np.array(sums), np.array(counts)


def test_loss_perplexity_bits_and_standard_error_are_those_of_transformers(models, data, capsys):
    found = measured(capsys, model=tuple(map(str, models)), data=str(data))
    assert [row["model"] for row in found["losses"]] == list(map(str, models))
    for row, folder in zip(found["losses"], models, strict=True):
        sums, counts = window_losses(folder, data / "valid", LENGTH)
        loss = sums.sum() / counts.sum()
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert row["tokens"] == 999
        assert row["bits_per_byte"] == pytest.approx(loss / math.log(2) * 1000 / 900, rel=1e-5)
        spread = ((sums - loss * counts) ** 2).sum() * len(sums) / (len(sums) - 1)
        assert row["standard_error"] == pytest.approx(math.sqrt(spread) / counts.sum(), rel=1e-3)
        parameters = sum(p.numel() for p in GPT2LMHeadModel.from_pretrained(folder).parameters())
        assert row["parameters"] == parameters


@pytest.mark.parametrize("batch", [1, 3, 16, 50])
def test_the_batch_size_changes_nothing(models, data, capsys, batch):
    found, reference = (
        measured(capsys, model=(str(models[0]),), data=str(data / "valid"), eval_batch_size=size)["losses"][0]
        for size in (batch, 5)
    )
    for name in ("loss", "perplexity", "bits_per_byte", "tokens"):
        assert found[name] == pytest.approx(reference[name], rel=2e-5)
    # A small difference of large float32 sums; the losses of a random model's sequences hardly differ.
    assert found["standard_error"] == pytest.approx(reference["standard_error"], rel=2e-3)


def test_valid_steps_and_seq_length_measure_the_first_tokens_in_shorter_windows(models, data, capsys):
    options = dict(model=(str(models[0]),), data=str(data), valid_steps=3, eval_batch_size=4, seq_length=16)
    (row,) = measured(capsys, **options)["losses"]
    sums, counts = window_losses(models[0], data / "valid", 16)
    assert row["tokens"] == 3 * 4 * 16
    assert row["loss"] == pytest.approx(sums[:12].sum() / counts[:12].sum(), abs=1e-5)


def test_two_processes_measure_what_one_does(models, data, capsys):
    flags = ["--model", models[0], "--data", data, "--eval-batch-size", 4, "--json", "--device", "cpu"]
    script = ROOT / "scripts" / "evaluate.py"
    command = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    output = run(*command)
    (two,) = json.loads(output[output.index("{\n") : output.rindex("}") + 1])["losses"]
    (one,) = measured(capsys, model=(str(models[0]),), data=str(data), eval_batch_size=4)["losses"]
    assert two["tokens"] == one["tokens"]
    assert two["loss"] == pytest.approx(one["loss"], rel=2e-5)
    assert two["standard_error"] == pytest.approx(one["standard_error"], rel=2e-3)


def test_the_tables_are_markdown_with_a_line_per_model(models, data, capsys):
    evaluation.run(EvaluateConfig(model=tuple(map(str, models)), data=str(data), device="cpu"))
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")][1:-1] == [
        "model", "parameters", "loss", "±", "PPL", "bits per byte", "tokens",
    ]  # fmt: skip
    assert set(rule) <= set("|-:")
    assert len(rows) == 2
    assert len({len(line) for line in (head, rule, *rows)}) == 1


def test_without_byte_counts_there_are_no_bits_per_byte():
    assert bits_per_byte(1.0, Manifest("valid", "uint16", 10, ())) is None
    assert bits_per_byte(math.log(2), Manifest("valid", "uint16", 10, (), text_bytes=5)) == pytest.approx(2.0)


def test_all_mistakes_are_told_before_anything_is_measured(models, data, tmp_path, capsys):
    def mistakes(**options) -> list[str]:
        with pytest.raises(UserError) as caught:
            evaluation.run(EvaluateConfig(device="cpu", **options))
        assert capsys.readouterr().out == ""
        return list(caught.value.mistakes)

    assert "nothing to measure" in mistakes(model=(str(models[0]),))[0]
    found = mistakes(
        model=(str(tmp_path / "absent"), str(models[0])), data=str(tmp_path), seq_length=65, eval_batch_size=0
    )
    assert [sentence.split(" ")[0] for sentence in found] == ["--eval-batch-size", "--data:", "--model", "--seq-length"]
    random_gpt2(tmp_path / "other", vocab_size=200)
    (found,) = mistakes(model=(str(tmp_path / "other"),), data=str(data))
    assert "which has 257 ids, but" in found
    (found,) = mistakes(model=(str(models[0]),), data=str(data), file="x.jsonl")
    assert found == "--file belongs to --task; add --task hellaswag, or leave it out"


def test_data_of_another_tokenizer_is_one_mistake_about_a_run_of_ours(text_data, tmp_path, monkeypatch):
    flags = (*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run")
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    split = write_split(tmp_path / "data", "valid", np.arange(200))
    manifest = manifests.read(split)
    for size in (257, 50257):  # that is not told by the sizes, and that is
        other = {"tokenizer": "gpt2", "tokenizer_hash": "0" * 64, "vocab_size": size}
        manifests.write(split, Manifest(**{**vars(manifest), **other}))
        with pytest.raises(UserError) as caught:
            evaluation.run(EvaluateConfig(device="cpu", model=(str(tmp_path / "run"),), data=str(split)))
        (found,) = caught.value.mistakes
        assert "prepare it with the model's tokenizer" in found


# Multiple choice

WORDS = [
    "the",
    "a",
    "man",
    "woman",
    "dog",
    "cat",
    "runs",
    "jumps",
    "over",
    "under",
    "with",
    "[title]",
    "his",
    "her",
    "ball",
    "tree",
    "",
    "and",
    "[step]",
    "then",
    "é",
    "中",
]


def rows_of(count: int, seed: int = 0) -> list[dict]:
    """Rows in HellaSwag's published form, some with WikiHow's marks."""
    draw = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(low, high)))

    return [
        {
            "activity_label": words(1, 4),
            "ctx_a": words(1, 30),
            "ctx_b": words(0, 3),
            "ctx": "",
            "endings": [words(1, 25) + "." for _ in range(4)],
            "label": str(draw.integers(4)),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "val.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(60)))
    return file


def brute_force(folder: Path, rows: list[dict], context: int) -> list[list[float]]:
    """The log-likelihood of each ending, one at a time, byte by byte, by transformers."""
    model, found = GPT2LMHeadModel.from_pretrained(folder).eval(), []

    def tidy(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    for row in rows:
        prompt = tidy(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
        likelihoods = []
        for ending in row["endings"]:
            before, after = prompt.rstrip(), prompt[len(prompt.rstrip()) :] + " " + tidy(ending)
            tokens, scored = list((before + after).encode()), len(after.encode())
            total = 0.0
            kept = tokens[-(context + 1) :]
            with torch.no_grad():
                logs = model(torch.tensor([kept[:-1]])).logits[0].log_softmax(-1)
            for position in range(max(0, len(kept) - 1 - scored), len(kept) - 1):
                total += logs[position, kept[position + 1]].item()
            likelihoods.append(total)
        found.append(likelihoods)
    return found


def test_the_answers_are_those_of_brute_force(models, questions_file, capsys):
    rows = [json.loads(line) for line in questions_file.read_text().splitlines()]
    options = dict(task="hellaswag", file=str(questions_file), eval_batch_size=3)
    found = measured(capsys, model=tuple(map(str, models)), **options)["answers"]
    for result, folder in zip(found, models, strict=True):
        likelihoods = brute_force(folder, rows, LENGTH)
        labels = [int(row["label"]) for row in rows]
        questions = [hellaswag_question(row) for row in rows]
        by_characters = [
            [ll / len(text) for ll, text in zip(lls, q.endings, strict=True)]
            for lls, q in zip(likelihoods, questions, strict=True)
        ]
        by_bytes = [
            [ll / len(text.encode()) for ll, text in zip(lls, q.endings, strict=True)]
            for lls, q in zip(likelihoods, questions, strict=True)
        ]
        for name, scores in (("acc", likelihoods), ("acc_norm", by_characters), ("acc_bytes", by_bytes)):
            right = [int(np.argmax(one)) == label for one, label in zip(scores, labels, strict=True)]
            assert result[name] == pytest.approx(np.mean(right))
        assert result["questions"] == 60
        p = result["acc_norm"]
        assert result["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 59))


def test_likelihoods_are_exact_for_every_batch_and_little_is_padding(models, questions_file):
    model, tokenizer = load_model(models[0], "cpu"), ByteTokenizer()
    questions = read_hellaswag(questions_file)[:20]
    pairs = [encode_pair(tokenizer, q.context, ending) for q in questions for ending in q.endings]
    assert max(len(first) + len(second) for first, second in pairs) > LENGTH + 1  # some are cut
    shapes = []

    def forward(inputs, targets, by_sequence):
        shapes.append(inputs.shape)
        return model(inputs, targets, by_sequence=by_sequence)

    expected = [
        ll
        for lls in brute_force(models[0], [json.loads(x) for x in questions_file.read_text().splitlines()[:20]], LENGTH)
        for ll in lls
    ]
    for batch_tokens in (1, 200, 10**6):
        shapes.clear()
        assert log_likelihoods(forward, pairs, LENGTH, batch_tokens, lambda t: t) == pytest.approx(expected, rel=1e-4)
        if batch_tokens == 200:
            computed = sum(shape.numel() for shape in shapes)
            needed = sum(min(len(first) + len(second) - 1, LENGTH) for first, second in pairs)
            assert computed < 1.1 * needed
            assert all(shape.numel() <= 200 for shape in shapes)


def test_limit_takes_the_first_questions(questions_file, models, capsys):
    assert read_hellaswag(questions_file, 7) == read_hellaswag(questions_file)[:7]
    options = dict(task="hellaswag", file=str(questions_file), limit=7)
    assert measured(capsys, model=(str(models[0]),), **options)["answers"][0]["questions"] == 7


def test_odd_lines_of_a_question_file_are_named(tmp_path):
    good = rows_of(1)[0]
    lines = [
        json.dumps(good),
        "{",
        json.dumps(good | {"label": "4"}),
        json.dumps({key: value for key, value in good.items() if key != "ctx_b"}),
        json.dumps(good | {"endings": []}),
        "3",
    ]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_hellaswag(file)
    assert len(caught.value.mistakes) == 5
    for number, sentence in zip((2, 3, 4, 5, 6), caught.value.mistakes, strict=True):
        assert sentence.startswith(f"--file {file}, line {number}: ")
    with pytest.raises(UserError, match="can't be read"):
        read_hellaswag(tmp_path / "absent")


def test_the_hubs_questions_without_a_network_are_one_sentence(models, tmp_path):
    command = [ROOT / "scripts" / "evaluate.py", "--model", models[0], "--task", "hellaswag", "--device", "cpu"]
    process = start(*PYTHON, *command, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path))
    output = finish(process)
    assert process.returncode == 2
    assert "Traceback" not in output
    assert "--task hellaswag: Rowan/hellaswag can't be fetched from the hub" in output
    assert "give the questions as --file PATH" in output
