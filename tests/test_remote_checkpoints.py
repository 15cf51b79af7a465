"""Checkpoints at an address: published whole or not at all, whatever the network does; fetched whole or not at all."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from commands import PATIENCE, data_flags, losses
from flaky_store import FlakyStore
from small_runs import FOUR_STEPS, run_here
from test_saving import same, saved_state, small_run, state_of

import run_pretrain
from gpt2_xla import checkpoint, remote_store
from gpt2_xla import checkpoint_files as files
from gpt2_xla.errors import UserError
from gpt2_xla.remote_checkpoints import Published, RemoteRun, newest_checkpoint
from gpt2_xla.remote_store import RemoteStore, StoreError
from gpt2_xla.uploads import Uploads

URL = "flaky://bucket/run"


@pytest.fixture(autouse=True)
def honest_store(monkeypatch):
    FlakyStore.reset()
    monkeypatch.setattr(remote_store, "PAUSES", (0.0, 0.0, 0.0, 0.0))


def save(folder: Path, step: int, valid_loss: float | None = None) -> Path:
    """A local checkpoint, not published."""
    run = small_run(folder, step=step, keep=100)
    run.saver.save(run, valid_loss)
    run.saver.wait()
    run.saver.close()
    return folder / f"step-{step:08d}"


def folders() -> set[str]:
    return {path.split("/")[3] for path in FlakyStore.store if "/step-" in path}


def steps(remote: RemoteRun) -> list[int]:
    return [entry.step for entry in remote.published()]


def change(name: str, alter) -> None:
    """Alter the one file at the store whose path ends so."""
    (path,) = [path for path in FlakyStore.store if path.endswith(name)]
    content = alter(FlakyStore.store[path].getvalue())
    FlakyStore().open(path, "wb").close()
    FlakyStore.store[path].write(content)


def test_a_published_checkpoint_comes_back_whole_on_an_empty_machine(tmp_path):
    run = small_run(tmp_path / "here", remote_dir=URL)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "metrics.jsonl").write_text("1\n")
    run.saver.save(run, None)
    run.saver.wait()
    (tmp_path / "here" / "metrics.jsonl").write_text("1\n2\n")
    (tmp_path / "here" / "batches.jsonl").write_text("3\n")
    run.saver.finish(run)
    found = newest_checkpoint(tmp_path / "there", URL, lambda _: None)
    assert found == tmp_path / "there" / "step-00000001"
    assert checkpoint.problems(found) == []
    assert same(saved_state(found), state_of(run))
    assert {path.name for path in found.parent.iterdir()} == {found.name, "metrics.jsonl", "batches.jsonl"}
    assert (found.parent / "metrics.jsonl").read_text() == "1\n2\n"


def test_the_pointer_moves_last_and_old_checkpoints_go_after_it(tmp_path):
    remote = RemoteRun(URL)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None)):
        remote.publish(save(tmp_path, step, loss), keep=2)
    assert steps(remote) == [4, 3, 2]  # the last two, and the best
    assert folders() == {entry.name for entry in remote.published()}
    moves = [number for number, entry in enumerate(FlakyStore.log) if entry == ("write", "/bucket/run/latest.json")]
    deletion, first = next((n, path) for n, (what, path) in enumerate(FlakyStore.log) if what == "delete")
    assert all(FlakyStore.log[number - 1][1].endswith("/COMPLETE") for number in moves)
    assert moves[2] < deletion < moves[3]
    assert "/step-00000001." in first


@pytest.mark.parametrize("failures", [4, 5])
def test_an_upload_is_tried_five_times(failures, tmp_path):
    FlakyStore.failures = failures
    folder, remote = save(tmp_path, 1), RemoteRun(URL)
    if failures == 4:
        remote.publish(folder, keep=3)
        assert steps(remote) == [1]
    else:
        with pytest.raises(StoreError, match=f"{URL}: could not write .*config.json: connection reset by peer"):
            remote.publish(folder, keep=3)
        assert steps(remote) == []


def test_permission_denied_is_told_at_once(tmp_path):
    FlakyStore.failures, FlakyStore.error = 5, PermissionError("Access Denied")
    with pytest.raises(StoreError, match="Access Denied"):
        RemoteRun(URL).publish(save(tmp_path, 1), keep=3)
    assert FlakyStore.failures == 4


@pytest.mark.parametrize(
    "fault", [{"cut": 1}, {"flip": True}, {"flip": True, "checksums": True}], ids=["cut", "altered", "with checksums"]
)
def test_what_arrives_altered_is_not_published_and_what_was_stays(fault, tmp_path, monkeypatch):
    remote = RemoteRun(URL)
    remote.publish(save(tmp_path, 1), keep=1)
    for name, value in fault.items():
        monkeypatch.setattr(FlakyStore, name, value)
    with pytest.raises(StoreError, match=r"bytes there instead of|not there what was written"):
        remote.publish(save(tmp_path, 2), keep=1)
    FlakyStore.cut, FlakyStore.flip = 0, False
    assert steps(remote) == [1]
    assert checkpoint.problems(newest_checkpoint(tmp_path / "there", URL, print)) == []
    remote.publish(save(tmp_path, 3), keep=1)
    assert steps(remote) == [3]
    assert folders() == {remote.published()[0].name}  # what was left of step 2 is gone too


@pytest.mark.parametrize(
    ("told", "reads"), [(True, 0), ("0" * 32, 1), (False, 0)], ids=["md5", "a checksum of something else", "none"]
)
def test_a_large_file_is_read_back_where_its_checksum_is_not_that_of_the_content(told, reads, monkeypatch):
    """An encrypted S3 object's ETag looks like an md5, and is none."""
    monkeypatch.setattr(remote_store, "SMALL", 0)
    FlakyStore.checksums = told
    RemoteStore(URL).write("file", b"content")
    assert FlakyStore.reads == reads


def test_a_local_checkpoint_that_was_altered_is_not_published(tmp_path):
    folder = save(tmp_path, 1)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match="was altered since it was saved"):
        RemoteRun(URL).publish(folder, keep=3)


def test_what_is_published_already_is_not_sent_again(tmp_path):
    folder, remote = save(tmp_path, 1), RemoteRun(URL)
    remote.publish(folder, keep=3)
    FlakyStore.log.clear()
    remote.publish(folder, keep=3)
    assert FlakyStore.log == []


def test_the_newer_of_here_and_there_wins(tmp_path):
    remote, here = RemoteRun(URL), tmp_path / "here"
    remote.publish(save(tmp_path / "there", 5), keep=3)
    save(here, 4)
    assert newest_checkpoint(here, URL, print) == here / "step-00000005"
    save(here, 6)
    FlakyStore.log.clear()
    assert newest_checkpoint(here, URL, print) == here / "step-00000006"
    assert FlakyStore.log == []


@pytest.mark.parametrize("name", ["model.safetensors", "COMPLETE"])
def test_a_damaged_remote_checkpoint_is_passed_over_and_never_silently(name, tmp_path):
    remote, said = RemoteRun(URL), []
    remote.publish(save(tmp_path, 1), keep=3)
    remote.publish(save(tmp_path, 2), keep=3)
    (newest,) = (entry.name for entry in remote.published() if entry.step == 2)
    path = "model.safetensors" if name == "model.safetensors" else files.RECORD
    change(f"{newest}/{path}", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    assert newest_checkpoint(tmp_path / "a", URL, said.append) == tmp_path / "a" / "step-00000001"
    assert any(f"{newest} is damaged" in line for line in said)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"step-00000001"}
    (older,) = (entry.name for entry in remote.published() if entry.step == 1)
    FlakyStore().rm(f"/bucket/run/{older}/model.safetensors")
    with pytest.raises(UserError, match="holds no good checkpoint"):
        newest_checkpoint(tmp_path / "b", URL, said.append)
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("fault", ["altered", "cut", "broken off"])
def test_a_download_that_goes_wrong_once_is_made_again(fault, tmp_path, monkeypatch):
    RemoteRun(URL).publish(save(tmp_path / "here", 1), keep=3)
    honest, went_wrong = FlakyStore.get_file, []

    def get_file(self, rpath, lpath, **_):
        honest(self, rpath, lpath)
        if rpath.endswith("model.safetensors") and not went_wrong:
            went_wrong.append(rpath)
            content = Path(lpath).read_bytes()
            if fault == "broken off":
                raise ConnectionError("connection reset by peer")
            Path(lpath).write_bytes(content[:-1] + (b"" if fault == "cut" else bytes([content[-1] ^ 1])))

    monkeypatch.setattr(FlakyStore, "get_file", get_file)
    said = []
    assert newest_checkpoint(tmp_path / "there", URL, said.append) == tmp_path / "there" / "step-00000001"
    assert went_wrong
    assert not [line for line in said if "damaged" in line]


def test_a_damaged_local_checkpoint_is_replaced_by_the_remote_one(tmp_path):
    folder = save(tmp_path, 3)
    RemoteRun(URL).publish(folder, keep=3)
    (folder / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path, URL, print) == folder
    assert checkpoint.problems(folder) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "../../step-00000009.0123456789ab"}, {"name": "/etc"}, {"name": "step-00000009.0123456789ab/.."},
        {"step": -1}, {"step": 2**70}, {"valid_loss": "low"}, {"sha256": 7}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_pointer_is_refused(entry, tmp_path):
    good = {"name": "step-00000009.0123456789ab", "step": 9, "save": 1, "sha256": "0123456789ab" + "0" * 52}
    pointer = {"checkpoints": [{**good, "valid_loss": None, **entry}]}
    FlakyStore().pipe_file("/bucket/run/latest.json", json.dumps(pointer).encode())
    with pytest.raises(UserError, match=r"latest.json is malformed"):
        newest_checkpoint(tmp_path, URL, print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoints": 3}', '{"checkpoints": [null]}', "[" * 100_000])
def test_a_malformed_pointer_is_one_sentence(text, tmp_path):
    FlakyStore().pipe_file("/bucket/run/latest.json", text.encode())
    with pytest.raises(UserError, match=r"--remote-dir flaky://bucket/run/latest.json is malformed"):
        newest_checkpoint(tmp_path, URL, print)


def test_a_record_that_leads_out_of_the_folder_writes_nothing_there(tmp_path):
    folder = save(tmp_path / "here", 1)
    record = json.loads((folder / files.RECORD).read_text())
    record["files"]["../../../evil"] = {"bytes": 4, "sha256": "0" * 64}
    (folder / files.RECORD).write_text(json.dumps(record))
    FlakyStore().pipe_file("/bucket/run/evil", b"evil")
    entry = Published.of(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            FlakyStore().pipe_file(f"/bucket/run/{entry.name}/{file.relative_to(folder)}", file.read_bytes())
    pointer = {"checkpoints": [vars(entry)]}
    FlakyStore().pipe_file("/bucket/run/latest.json", json.dumps(pointer).encode())
    said = []
    with pytest.raises(UserError, match="holds no good checkpoint"):
        newest_checkpoint(tmp_path / "there", URL, said.append)
    assert any("outside of the checkpoint" in line for line in said)
    assert list((tmp_path / "there").iterdir()) == []
    assert not list(tmp_path.rglob("evil"))


def test_of_the_processes_of_a_host_one_downloads(tmp_path):
    RemoteRun(URL).publish(save(tmp_path / "here", 1), keep=3)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(newest_checkpoint(tmp_path / "there", URL, print)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [tmp_path / "there" / "step-00000001"] * 4
    fetched = [path for what, path in FlakyStore.log if what == "fetch"]
    assert len(fetched) == len(set(fetched))
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"step-00000001"}


def test_a_local_folder_is_a_store_too(tmp_path):
    url, folder = f"file://{tmp_path}/disk/run", save(tmp_path / "here", 1)
    RemoteRun(url).publish(folder, keep=3)
    RemoteStore(url).probe()
    assert {path.name.partition(".")[0] for path in (tmp_path / "disk" / "run").iterdir()} == {"latest", folder.name}
    assert checkpoint.problems(newest_checkpoint(tmp_path / "there", url, print)) == []


@pytest.fixture
def each_copied(monkeypatch):
    """Every save is copied: the thread that saves waits for the copy, where it would let all but the newest save pass by."""
    offer = Uploads.offer

    def offered(self, folder):
        offer(self, folder)
        self.wait()

    monkeypatch.setattr(Uploads, "offer", offered)


def train(monkeypatch, text_data, folder, *more: object) -> int:
    flags = [*FOUR_STEPS, *data_flags(text_data), "--save-interval", "1", "--checkpoints-dir", folder]
    return run_here(monkeypatch, run_pretrain.main, *flags, "--remote-dir", URL, *more)


def fail_uploads_of(monkeypatch, step: int) -> None:
    honest = FlakyStore.pipe_file

    def write(self, path, value, **_):
        if f"/step-{step:08d}." in path:
            raise ConnectionError("connection reset by peer")
        honest(self, path, value)

    monkeypatch.setattr(FlakyStore, "pipe_file", write)


@pytest.mark.usefixtures("each_copied")
def test_a_copy_that_fails_is_a_warning_and_the_run_goes_on(tmp_path, text_data, monkeypatch, capfd):
    fail_uploads_of(monkeypatch, 2)
    assert train(monkeypatch, text_data, tmp_path, "--saved-checkpoint-limit", "9") == 0
    assert steps(RemoteRun(URL)) == [4, 3, 1]
    shown = capfd.readouterr().err
    assert f"warning: --remote-dir {URL}: could not write step-00000002." in shown
    assert "connection reset by peer; training goes on, the next save tries again" in shown
    assert FlakyStore.store["/bucket/run/metrics.jsonl"].getvalue() == (tmp_path / "metrics.jsonl").read_bytes()


@pytest.mark.usefixtures("each_copied")
def test_with_strict_saving_a_copy_that_fails_ends_the_run(tmp_path, text_data, monkeypatch, capfd):
    fail_uploads_of(monkeypatch, 1)
    assert train(monkeypatch, text_data, tmp_path, "--strict-saving") == 2
    assert f"error: --remote-dir {URL}: could not write step-00000001." in capfd.readouterr().err
    assert not (tmp_path / "step-00000004").exists()


@pytest.mark.usefixtures("each_copied")
def test_a_last_copy_that_fails_is_no_success_and_the_same_command_makes_it(tmp_path, text_data, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        fail_uploads_of(patch, 4)
        assert train(patch, text_data, tmp_path) == 2
    assert f"all is in {tmp_path}; the same command" in capfd.readouterr().err
    assert steps(RemoteRun(URL)) == [3, 2, 1]
    assert train(monkeypatch, text_data, tmp_path) == 0
    assert steps(RemoteRun(URL)) == [4, 3, 2]


@pytest.mark.usefixtures("each_copied")
def test_a_machine_with_an_empty_folder_continues(tmp_path, text_data, monkeypatch, capfd):
    here, there = tmp_path / "here", tmp_path / "there"
    assert train(monkeypatch, text_data, here) == 0
    shutil.rmtree(here)
    assert train(monkeypatch, text_data, there, "--train-steps", "6") == 0
    assert f"downloading checkpoint {URL}/step-00000004." in capfd.readouterr().err
    assert len(losses(there)) == 6  # the first four came with it
    assert steps(RemoteRun(URL)) == [6, 5, 4]


@pytest.mark.usefixtures("each_copied")
def test_the_records_of_a_checkpoints_steps_are_there_before_it_is(tmp_path, text_data, monkeypatch):
    seen = []
    honest = FlakyStore.pipe_file

    def write(self, path, value, **_):
        honest(self, path, value)
        if path.endswith("/latest.json"):
            lines = FlakyStore.store["/bucket/run/metrics.jsonl"].getvalue().splitlines()
            seen.append((json.loads(value)["checkpoints"][0]["step"], max(json.loads(line)["step"] for line in lines)))

    monkeypatch.setattr(FlakyStore, "pipe_file", write)
    assert train(monkeypatch, text_data, tmp_path) == 0
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(step <= logged for step, logged in seen)


def test_a_run_that_goes_back_leaves_no_later_checkpoint_there(tmp_path):
    remote = RemoteRun(URL)
    for step in (1, 2, 3):
        remote.publish(save(tmp_path / "a", step), keep=9)
    run = small_run(tmp_path / "a", remote_dir=URL)
    run.saver.withdraw_after(run, 2)
    assert steps(remote) == [2, 1]
    assert folders() == {entry.name for entry in remote.published()}
    remote.publish(save(tmp_path / "b", 1), keep=9)  # the same, had the machine been lost before it could withdraw them
    assert max(steps(remote)) == 1


def test_a_branch_does_not_write_where_its_origin_does(tmp_path, text_data, monkeypatch):
    assert train(monkeypatch, text_data, tmp_path / "a") == 0
    before = RemoteRun(URL).published()
    flags = ["--from-checkpoint", tmp_path / "a" / "step-00000003", "--checkpoints-dir", tmp_path / "b"]
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    assert RemoteRun(URL).published() == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--checkpoints-dir", "s3://bucket/run"], "--checkpoints-dir s3://bucket/run is an address; checkpoints are"),
        (["--remote-dir", "bucket/run"], "--remote-dir bucket/run is a path; expected an address such as gs://bucket"),
        (["--remote-dir", "s4://bucket"], "--remote-dir s4://bucket: unknown kind of address s4://; expected gs://"),
        (["--remote-dir", "abfs://b/run"], "--remote-dir abfs://b/run: abfs:// needs a package that is not installed: install it (pip install adlfs)"),
        (["--remote-dir", "s3://me:hunter2@b/run"], "--remote-dir s3://…@b/run holds a password or key"),
        (["--remote-dir", "gs://b/run?token=hunter2"], "--remote-dir gs://b/run?… holds a password or key"),
        (["--remote-dir", "file:///proc/nowhere"], "--remote-dir file:///proc/nowhere: could not write .write-test-"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistaken_address_is_one_sentence_at_the_start(flags, sentence, tmp_path, text_data, monkeypatch, capfd):
    common = [*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", tmp_path / "run"]
    assert run_here(monkeypatch, run_pretrain.main, *common, *flags) == 2
    shown = "".join(capfd.readouterr())
    assert f"error: {sentence}" in shown
    assert "hunter2" not in shown
    assert not (tmp_path / "run").exists()


def test_a_store_that_refuses_is_found_at_the_start(tmp_path, text_data, monkeypatch, capfd):
    FlakyStore.failures, FlakyStore.error = 9, PermissionError("Access Denied")
    assert train(monkeypatch, text_data, tmp_path / "run") == 2
    assert f"error: --remote-dir {URL}: could not write .write-test-" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_refused(tmp_path, text_data, monkeypatch, capfd):
    assert train(monkeypatch, text_data, tmp_path / "a") == 0
    assert train(monkeypatch, text_data, tmp_path / "b", "--resume", "never") == 2
    assert f"--remote-dir {URL} already holds step-00000004." in capfd.readouterr().err
