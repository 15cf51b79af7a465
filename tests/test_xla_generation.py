"""Generation on XLA: a program for each bucket of prompts, one to decode, and the texts of the CPU."""

import json
import os
import subprocess

import pytest
from ascii_run import make_run
from commands import PATIENCE, PYTHON, ROOT, printed_json, run

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def found():
    output = run(*PYTHON, str(ROOT / "tests" / "xla_generation_counters.py"))
    return printed_json(output)


def test_each_bucket_and_decoding_compile_once(found):
    first, same_bucket, next_bucket, past_the_context = (
        [compiles for compiles, _, _ in counted] for counted in found["counted"]
    )
    assert first == [1, 1] + [0] * 34  # the bucket of 16, with the first token; decoding, with the second
    assert same_bucket == [0] * 36
    assert next_bucket == [1] + [0] * 19
    assert past_the_context == [1] + [0] * 39  # of 64, the whole context: where the window slides too


def test_a_token_is_one_execution_and_one_copy_to_the_host(found):
    assert all(rest == [1, 1] for counted in found["counted"] for _, *rest in counted)


def test_xla_writes_what_the_cpu_writes(found):
    assert found["as_on_cpu"] == [True] * 4


def test_generate_runs_on_xla(tmp_path):
    make_run(tmp_path)
    command = (*PYTHON, "generate.py", "--model", str(tmp_path), "--max-new-tokens", "20", "--num-samples", "2")
    texts = [run(*command, "--prompt", "né ", "--json", "--device", device) for device in ("xla", "cpu")]
    samples = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in texts]
    assert len(samples[0]) == 2
    assert samples[0] == samples[1]


def test_a_missing_device_is_told(tmp_path):
    make_run(tmp_path)
    command = [*PYTHON, "generate.py", "--model", str(tmp_path), "--prompt", "x", "--device", "xla"]
    environment = {key: value for key, value in os.environ.items() if key != "PJRT_DEVICE"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --device xla: PJRT_DEVICE is not set")
