"""generate.py as a user starts it, and its parts in this process."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ascii_run import MODEL, make_run
from commands import PATIENCE, is_asleep, wait_until

from generate import main as generate_main
from gpt2_xla import checkpoint, generation
from gpt2_xla.checkpoint import TrainerState
from gpt2_xla.config import ModelConfig, PretrainConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.script_config import GenerateConfig
from gpt2_xla.shares import whole_shares
from gpt2_xla.tokenizer import ByteTokenizer

torch.set_num_threads(1)  # see test_sampling.py
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def generate(*arguments: object, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "generate.py", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, input=typed, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_a_prompt_is_continued_and_the_seed_decides_how(run_dir):
    options = ("--model", run_dir, "--prompt", "né ", "--max-new-tokens", 40, "--top-k", 50, "--top-p", 0.9)
    first, again = generate(*options), generate(*options)
    assert (first.returncode, first.stderr) == (0, "")
    assert re.fullmatch(r"né [ -~]{40}\n", first.stdout)
    assert again.stdout == first.stdout


def test_interactive_lines_are_each_continued_until_the_input_ends(run_dir):
    result = generate("--model", run_dir, "--max-new-tokens", 5, "--temperature", 0, typed="one\n\ntwo\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r">> one[ -~]{5}\n>> >> two[ -~]{5}\n>> \n", result.stdout)


@pytest.mark.parametrize("interactive", [True, False])
def test_ctrl_c_ends_without_a_traceback(run_dir, interactive):
    prompt = [] if interactive else ["--prompt", "x", "--max-new-tokens", "10000000"]
    command = [sys.executable, "generate.py", "--device", "cpu", "--model", str(run_dir), *prompt]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes) as process:
        try:
            assert process.stdout.read(1)  # it has started to write: it is at the prompt, or generating
            if interactive:  # what comes just before the read of a line, Python sees after it
                wait_until(process, lambda: is_asleep(process.pid))
            process.send_signal(signal.SIGINT)
            if interactive:
                process.wait(PATIENCE)  # before its input is closed, which would end it too
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert b"Traceback" not in errors
    assert process.returncode == (0 if interactive else 130)


def test_a_reader_that_goes_away_ends_it_quietly(run_dir):
    command = (
        f"{sys.executable} generate.py --device cpu --model {run_dir} --prompt x --max-new-tokens 100000 | head -c 20"
    )
    result = subprocess.run(
        command, shell=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert len(result.stdout) == 20
    assert result.stderr == ""


def test_a_connection_that_closes_stays_an_error_that_can_be_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--no-such-flag"])
    with pytest.raises(UserError):
        generate_main()
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN  # by default it would end the process, without a word


def test_all_mistakes_are_listed_at_once(tmp_path):
    options = {
        "--tokenizer": "byte",
        "--max-new-tokens": 0,
        "--num-samples": -1,
        "--batch-size": 0,
        "--temperature": "nan",
        "--top-p": 1.5,
        "--top-k": -1,
        "--min-p": -0.5,
        "--repetition-penalty": 0,
        "--seed": -1,
    }
    words = [word for option in options.items() for word in option]
    result = generate("--model", tmp_path, *words, "--prompt", "x", "--prompt-file", "y")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("12 errors:")
    for flag, value in {**options, "--model": tmp_path, "--prompt and": "--prompt-file"}.items():
        assert f"{flag} {value}" in result.stderr


def test_a_file_of_prompts_is_continued_in_its_order_as_json(run_dir, tmp_path):
    prompts = ["first", "the second, which is longer than the context", "third né", "4"]
    (tmp_path / "prompts").write_text("\n".join([*prompts[:2], "", *prompts[2:]]) + "\n")
    options = ("--model", run_dir, "--max-new-tokens", 20, "--num-samples", 2, "--batch-size", 3, "--seed", 7, "--json")
    result = generate(*options, "--prompt-file", tmp_path / "prompts")
    assert result.returncode == 0, result.stderr
    assert "1 blank line skipped" in result.stderr
    assert "note: prompt 2 has 44 tokens; the model sees the last 16" in result.stderr
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(sample["prompt"], sample["seed"]) for sample in samples] == [(p, s) for p in prompts for s in (7, 8)]
    for sample in samples:
        assert sample["prompt_tokens"] == len(sample["prompt"].encode())
        assert (sample["tokens"], sample["finish_reason"]) == (20, "length")
        assert re.fullmatch("[ -~]{20}", sample["text"])
    typed = generate(*options, "--prompt-file", "-", typed="\n".join(prompts))
    assert typed.stdout == result.stdout
    alone = generate("--model", run_dir, "--max-new-tokens", 20, "--seed", 8, "--prompt", prompts[2])
    assert alone.stdout == prompts[2] + samples[5]["text"] + "\n"


# The rest runs in this process: starting Python takes longer than all of it.


def run(run_dir: Path, prompt: str, **options) -> None:
    generation.run(GenerateConfig(model=str(run_dir), prompt=prompt, device="cpu", **options))


def test_greedy_text_does_not_depend_on_the_seed(run_dir, capsys):
    texts = []
    for seed in (1, 2):
        run(run_dir, "abc", temperature=0.0, max_new_tokens=30, seed=seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    run(run_dir, "abc", temperature=1.0, max_new_tokens=30, seed=1)
    assert capsys.readouterr().out != texts[0]


def test_several_texts_are_told_apart_by_headers(run_dir, capsys):
    run(run_dir, "abc", max_new_tokens=4, num_samples=2, seed=5)
    shown = capsys.readouterr()
    blocks = r"--- sample 1: seed 5, 4 tokens\nabc([ -~]{4})\n\n--- sample 2: seed 6, 4 tokens\nabc([ -~]{4})\n\n"
    texts = re.fullmatch(blocks, shown.out)
    assert texts
    for seed, text in zip((5, 6), texts.groups(), strict=True):
        run(run_dir, "abc", max_new_tokens=4, seed=seed)
        assert capsys.readouterr().out == f"abc{text}\n"


@pytest.mark.parametrize(
    "options", [dict(top_k=0, top_p=1.0, min_p=0.0), dict(top_k=10**6), dict(top_p=1.0), dict(repetition_penalty=1.0)]
)
def test_options_that_change_nothing_are_accepted(run_dir, capsys, options):
    run(run_dir, "abc", max_new_tokens=20)
    plain = capsys.readouterr().out
    run(run_dir, "abc", max_new_tokens=20, **options)
    assert capsys.readouterr().out == plain


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0)])
def test_filters_at_their_narrowest_are_greedy(run_dir, capsys, options):
    run(run_dir, "abc", max_new_tokens=20, temperature=0.0)
    greedy = capsys.readouterr().out
    run(run_dir, "abc", max_new_tokens=20, **options)
    assert capsys.readouterr().out == greedy


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no prompt; write one a line"),
        (b"\n \n", "holds no prompt; write one a line"),
        (b"good\nbad \xff\n", "is not UTF-8 text, line 2; save it as UTF-8"),
    ],
)
def test_a_prompt_file_that_is_of_no_use_is_explained(run_dir, tmp_path, content, says):
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(UserError, match=f"--prompt-file {tmp_path / 'prompts'} {says}"):
        generation.run(GenerateConfig(model=str(run_dir), prompt_file=str(tmp_path / "prompts"), device="cpu"))


def test_json_without_a_prompt_is_refused(run_dir):
    with pytest.raises(UserError, match="--json needs --prompt or --prompt-file"):
        generation.run(GenerateConfig(model=str(run_dir), json=True, device="cpu"))


def test_a_prompt_with_tokens_that_the_model_does_not_know_is_refused(run_dir):
    class Generous(ByteTokenizer):
        def encode(self, text):
            return [256, 257]

    writer = generation.prepare(GenerateConfig(model=str(run_dir), device="cpu"), [])
    with pytest.raises(UserError, match="the prompt has token 257, but the model's vocabulary ends at 256"):
        dataclasses.replace(writer, tokenizer=Generous()).write(["x"], 0)


def test_samples_come_in_order_though_some_end_early(run_dir, capsys):
    options = dict(device="cpu", max_new_tokens=60, num_samples=6, batch_size=4, json=True, temperature=2.0)
    writer = generation.prepare(GenerateConfig(model=str(run_dir), **options), [])

    def texts(tokenizer):
        dataclasses.replace(writer, tokenizer=tokenizer).write(["x"], 0)
        return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]

    free = texts(ByteTokenizer())
    cuts = {letter: [text.split(letter)[0] for text in free] for letter in map(chr, range(32, 127))}
    # Ends in another order than the seeds', and of some alone.
    letter, ended = next((one, cut) for one, cut in cuts.items() if len(cut[0]) > len(cut[1]) != len(cut[2]) < 60)

    class EndsEarly(ByteTokenizer):
        end_of_text = ord(letter)

    assert texts(EndsEarly()) == ended


def test_bf16_weights_write_too(run_dir, capsys):
    run(run_dir, "abc", max_new_tokens=20, precision="bf16")
    assert re.fullmatch(r"abc[ -~]{20}\n", capsys.readouterr().out)


def test_a_long_prompt_is_cut_on_the_left_with_a_note(run_dir, capsys):
    run(run_dir, "x" * 100 + "the last sixteen", temperature=0.0, max_new_tokens=10)
    long = capsys.readouterr()
    assert long.err == "note: the prompt has 116 tokens; the model sees the last 16\n"
    run(run_dir, "the last sixteen", temperature=0.0, max_new_tokens=10)
    short = capsys.readouterr()
    assert short.err == ""
    assert long.out == "x" * 100 + short.out


def test_an_empty_prompt_starts_from_end_of_text_and_says_so(run_dir, capsys):
    run(run_dir, "", temperature=0.0, max_new_tokens=10)
    shown = capsys.readouterr()
    assert shown.err == "note: the prompt is empty; starting from end-of-text\n"
    assert re.fullmatch(r"[ -~]{10}\n", shown.out)


def test_generation_ends_at_end_of_text(tmp_path, capsys):
    folder = make_run(tmp_path)
    path = checkpoint.resolve(str(folder))
    weights = {name: value.clone() for name, value in checkpoint.read_weights(path).items()}
    weights["lm_head.weight"][256, 0] = 2.0  # end-of-text wins everywhere
    checkpoint.save(folder, checkpoint.read_state(path), whole_shares(weights), [], 256)
    run(folder, "the end")
    assert capsys.readouterr().out == "the end\n"


def test_the_tokenizer_saved_in_the_checkpoint_is_the_default(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {letter: i for i, letter in enumerate("abcdefgh")} | {"<|endoftext|>": 8}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    files = tmp_path / "tokenizer"
    files.mkdir()
    tokenizer.save(str(files / "tokenizer.json"))
    model = GPT(MODEL)
    model.initialize(0)
    # Recorded under a path that is gone by now.
    state = TrainerState(1, 1, to_dict(PretrainConfig(model=MODEL)), tokenizer="/gone/tokenizer.json")
    checkpoint.save(tmp_path / "run", state, whole_shares(model.state_dict()), [], 8, files)
    run(tmp_path / "run", "abba", max_new_tokens=20, temperature=5.0)
    # Ids from 9 on have no text in this vocabulary: they are never drawn.
    assert re.fullmatch(r"abba[a-h]{0,20}\n", capsys.readouterr().out)


def test_a_tokenizer_that_the_model_was_not_trained_with_is_warned_about(tmp_path, capsys):
    run(make_run(tmp_path, tokenizer="gpt2", tokenizer_hash="another"), "x", tokenizer="bytes", max_new_tokens=1)
    error = capsys.readouterr().err
    assert error.startswith("warning: tokenizer bytes is not the one that the model was trained with (gpt2)")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    small = ModelConfig(vocab_size=256, seq_length=16, d_model=32, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match=r"--tokenizer bytes has 257 tokens, but the model of .* knows 256"):
        run(make_run(tmp_path, small), "x")


def test_a_checkpoint_that_records_no_tokenizer_asks_for_one(tmp_path):
    with pytest.raises(UserError, match="records no tokenizer; name one with --tokenizer"):
        run(make_run(tmp_path, tokenizer=None, tokenizer_hash=None), "x")


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys):
    make_run(tmp_path)
    newest = tmp_path / "step-00000020"
    newest.mkdir()
    run(tmp_path, "x", max_new_tokens=3)
    error = capsys.readouterr().err
    assert f"warning: checkpoint {newest} is damaged" in error
    assert "\nfalling back to checkpoint" in error


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda p: p.write_text("{"), "not valid JSON"),
        (lambda p: p.write_text(json.dumps({"model_type": "bert"})), "model_type is 'bert'"),
        (
            lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"n_embd": 64})),
            r"tells of a wte.weight of \(257, 64\); that in",
        ),
    ],
)
def test_a_hugging_face_folder_that_we_cannot_run_is_explained(run_dir, tmp_path, harm, says):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(run_dir / "step-00000010" / name, tmp_path / name)
    run(tmp_path, "x", tokenizer="bytes", max_new_tokens=1)
    harm(tmp_path / "config.json")
    with pytest.raises(UserError, match=says):
        run(tmp_path, "x", tokenizer="bytes", max_new_tokens=1)
