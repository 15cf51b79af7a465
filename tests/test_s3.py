"""--remote-dir s3://… against an S3 server on loopback: a machine that is lost, folder and all, costs nothing."""

import logging
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from commands import PATIENCE, PYTHON, TINY, data_flags, finish, losses, records, run, start, torchrun
from small_runs import said_here
from stopping import PAUSING

import run_pretrain
from gpt2_xla.checkpoint_files import sha256
from gpt2_xla.remote_checkpoints import RemoteRun, remote_mistakes

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

FLAGS = [*TINY, "--dropout", "0.1", "--train-steps", "60", "--save-interval", "10", "--warmup-steps", "10"]
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "verysecretverysecret"}


@pytest.fixture(scope="module")
def server():
    """The environment of a process that finds the server; here it holds too. There is a bucket `bucket`."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        **KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield environment
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def steps(url: str) -> list[int]:
    return [entry.step for entry in RemoteRun(url).published()]


def wait_for(url: str, step: int, process) -> None:
    """Return once a checkpoint of that step or a later one is published."""
    deadline = time.monotonic() + PATIENCE
    while max(steps(url), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing published"
        time.sleep(0.05)


def test_a_run_killed_with_its_disk_goes_on_as_if_nothing_had_been(server, tmp_path, text_data):
    url, here = "s3://bucket/some/run", tmp_path / "here"
    flags = [*FLAGS, *data_flags(text_data), "--device", "cpu"]
    said_here(run_pretrain.main, *flags, "--checkpoints-dir", tmp_path / "whole")
    flags += ["--checkpoints-dir", here, "--remote-dir", url]
    process = start(*PYTHON, PAUSING, *flags, **server, PAUSE_AT="45")  # for ever
    wait_for(url, 20, process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    shutil.rmtree(here)
    output = said_here(run_pretrain.main, *flags)
    assert f"downloading checkpoint {url}/step-000000" in output
    for name in ("model.safetensors", "trainer_state/optimizer.safetensors"):
        assert (here / "step-00000060" / name).read_bytes() == (
            tmp_path / "whole" / "step-00000060" / name
        ).read_bytes()
    by_step = {record["step"]: record["loss"] for record in records(here)}
    assert [by_step[step] for step in sorted(by_step)] == losses(tmp_path / "whole")
    assert steps(url)[0] == 60  # and two at most of those before: a copy in flight lets all but the newest save pass by
    assert 1 <= len(steps(url)) <= 3

    shutil.rmtree(here)
    output = run(*torchrun(2), "--remote-dir", url, "--checkpoints-dir", here, "--train-steps", "62", **server)
    assert output.count("downloading checkpoint") <= 1  # whoever is first
    assert steps(url)[:2] == [62, 60]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written for key in KEYS.values() if key.encode() in path.read_bytes()]
    assert not [path.name for path in here.iterdir() if path.name.startswith(".")]


def test_a_bucket_that_is_not_there_and_missing_credentials_are_told_at_the_start(server, monkeypatch):
    (mistake,) = remote_mistakes("s3://nowhere/run", "start anew")
    assert mistake.startswith("--remote-dir s3://nowhere/run: could not write .write-test-")
    assert "bucket does not exist" in mistake
    for name in KEYS:
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr("gpt2_xla.remote_store.PAUSES", ())
    (mistake,) = remote_mistakes("s3://bucket/run", "start anew")
    assert mistake == "--remote-dir s3://bucket/run: could not read latest.json: Unable to locate credentials"
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_that_is_sent_in_parts_arrives(server, tmp_path: Path):
    store, large = RemoteRun("s3://bucket/files").store, tmp_path / "large"
    large.write_bytes(os.urandom(2**20) * 110)
    store.upload(large, "large", sha256(large))
    assert store.names() == ["large"]
    store.delete("large")
    assert store.names() == []
