"""The pipeline: input → units → part files → train/ and valid/ shards with their manifests.

Units follow from the input alone, each is tokenized by one worker into files of its own, and the shards follow from the
units. So the number of workers, and how often the run was killed and started again, change no byte.
"""

import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpt2_xla.data import assemble, hub
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.assemble import Division, ShardJob, SplitPlan
from gpt2_xla.data.downloads import DownloadsAhead
from gpt2_xla.data.encoder import DocumentEncoder, reference_name
from gpt2_xla.data.inputs import InputFile, UnreadableInput
from gpt2_xla.data.manifest import InputEntry, Manifest, ShardEntry
from gpt2_xla.data.output import publish, remove
from gpt2_xla.data.parts import UnitRecord, part_path, read_record, write_part, write_record
from gpt2_xla.data.prepare_report import Progress, check_disk, disk_free, disk_needed, plan_table, size
from gpt2_xla.data.shards import dtype_for
from gpt2_xla.data.splits import Duplicates, find_duplicates, hash_threshold
from gpt2_xla.data.units import UNIT_BYTES, Columns, Plan, Unit
from gpt2_xla.data.workers import Pool, default_workers
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import FinewebConfig, PrepareConfig
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer

# Options that say where the data goes, how fast it gets there and what to do about trouble; all others decide its bytes.
NOT_IN_COMMAND = {
    "output_dir", "num_workers", "cache_dir", "streaming", "skip_bad_files", "fast_tokenizer", "dry_run",
    "seed",
}  # fmt: skip
Config = PrepareConfig | FinewebConfig


@dataclass(frozen=True)
class Job:
    """One run of the pipeline."""

    config: Config
    script: str
    source: tuple[str, ...]
    files: list[InputFile]
    tokenizer: Tokenizer
    columns: Columns

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def workers(self) -> int:
        return self.config.num_workers or default_workers()

    @property
    def cache_folder(self) -> Path:
        return hub.cache_folder(self.columns.cache_dir)

    @property
    def dtype(self) -> str:
        return dtype_for(self.tokenizer.vocab_size)

    @property
    def command(self) -> str:
        return command_of(self.config, self.script)

    @property
    def has_valid(self) -> bool:
        if isinstance(self.config, PrepareConfig):
            return self.config.valid_fraction > 0
        return self.config.valid_tokens > 0

    @property
    def inputs(self) -> list[InputEntry]:
        """The files as the manifest lists them. Those of Python itself are known by its version, in `source`."""
        own = [file for file in self.files if file.kind != "pydoc" and not file.name.startswith("stdlib/")]
        return [InputEntry(file.name, file.size, file.version) for file in own]


def command_of(config: Config, script: str) -> str:
    """The command with every option that decides the bytes, so that a later default can't change what it means."""
    words = ["python", f"scripts/{script}"]
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if name in NOT_IN_COMMAND or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def identity(job: Job) -> dict[str, Any]:
    """All that decides the bytes, as plain JSON."""
    options = {name: value for name, value in vars(job.config).items() if name not in NOT_IN_COMMAND}
    return {
        "version": f"2, units of {UNIT_BYTES} bytes",
        "options": {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        "tokenizer_hash": job.tokenizer.hash,
        "source": list(job.source),
        "inputs": [[entry.file, entry.bytes, entry.version] for entry in job.inputs],
    }


def print_plan(job: Job, plan: Plan) -> None:
    """What will be done, and the disk it takes."""
    needed = disk_needed(plan, job.tokenizer, job.dtype, job.config.shard_size, job.workers)
    rows = [
        ("source", ", ".join(job.source)),
        (
            "input",
            f"{len(job.files):,} files, about {plan.text_bytes / 1e6:,.1f} MB of text in {len(plan.units):,} units",
        ),
        ("tokenizer", f"{job.tokenizer.name}, {job.tokenizer.vocab_size:,} ids, {job.dtype}"),
        ("workers", job.workers),
        ("disk", f"about {size(needed)} needed, {size(disk_free(job.output_dir))} free"),
        ("output", job.output_dir),
    ]
    if plan.download:
        cache = job.cache_folder
        rows.append(("download", f"{size(plan.download)}, kept in {cache}, {size(disk_free(cache))} free"))
    print(plan_table(rows))
    for reason in plan.bad.values():
        print(f"left out: {reason}")


class Worker:
    """What a worker process does: tokenize units, write shards."""

    def __init__(self, work: Path, job: "WorkerJob") -> None:
        self._parts = work / "units"
        self._job = job
        self._tokenizer: Tokenizer | None = None
        self._encoder: DocumentEncoder | None = None

    def tokenize(self, unit: Unit) -> UnitRecord:
        """Write a unit's part files, without its bad files if those are to be skipped."""
        job = self._job
        if self._tokenizer is None or self._encoder is None:
            self._tokenizer = load_tokenizer(job.tokenizer)
            self._encoder = DocumentEncoder(self._tokenizer, job.fast)
        bad: dict[str, str] = {}
        record = UnitRecord(unit.index)
        while unit.files:
            try:
                record = write_part(
                    self._parts, unit, job.columns, self._encoder, self._tokenizer, job.seed, job.hash_texts
                )
                break
            except UnreadableInput as error:
                if not job.skip_bad:
                    raise
                bad[error.file] = "; ".join(error.mistakes)
                unit = replace(unit, files=tuple(file for file in unit.files if file.name != error.file))
        record = replace(record, bad=bad)
        write_record(self._parts, record)
        return record

    def assemble(self, job: ShardJob) -> tuple[str, ShardEntry]:
        """Write a shard."""
        return job.path.name, assemble.assemble_shard(job)


@dataclass(frozen=True)
class WorkerJob:
    """What a worker process needs to know of the job."""

    tokenizer: str
    columns: Columns
    fast: bool
    skip_bad: bool
    seed: int
    hash_texts: bool


def make(job: Job, plan: Plan, work: Path) -> None:
    """From whatever is finished already to published splits."""
    if not _is_made(job, work):
        _make_splits(job, plan, work)
    publish(job.output_dir, work)
    remove(work)


def _is_made(job: Job, work: Path) -> bool:
    """Whether a run was killed when all that was left to do was to give the splits their names."""
    names = ("train", "valid") if job.has_valid else ("train",)
    places = [(work / name, job.output_dir / name) for name in names]
    return all(any((folder / manifests.FILE_NAME).exists() for folder in both) for both in places)


def _make_splits(job: Job, plan: Plan, work: Path) -> None:
    """All units, then all shards and manifests, in the work folder."""
    config, parts = job.config, work / "units"
    finished = {unit.index: record for unit in plan.units if (record := read_record(parts, unit.index))}
    needed = disk_needed(plan, job.tokenizer, job.dtype, config.shard_size, job.workers)
    left = 1 - len(finished) / max(1, len(plan.units))
    check_disk(job.output_dir, int(needed * left), job.cache_folder if plan.download else None, plan.download)
    if finished:
        print(f"continuing: {len(finished):,} of {len(plan.units):,} units are finished")
    dedup = config.dedup == "exact"
    worker = WorkerJob(
        job.tokenizer.name, job.columns, config.fast_tokenizer, config.skip_bad_files, config.seed, dedup
    )
    with (
        Pool(min(job.workers, max(1, len(plan.units))), Worker, work, worker) as pool,
        Progress(plan, job.output_dir, list(finished.values())) as progress,
    ):
        _tokenize(job, [unit for unit in plan.units if unit.index not in finished], finished, pool, progress)
        bad = plan.bad | {name: what for record in finished.values() for name, what in record.bad.items()}
        if bad and not config.skip_bad_files:
            raise UserError([*bad.values(), "an earlier run skipped these files; give --skip-bad-files again"])
        records = [finished[unit.index] for unit in plan.units if len(unit.files) > 1 or unit.files[0].name not in bad]
        if not any(record.tokens for record in records):
            remove(work)
            raise UserError(f"{', '.join(job.source)}: there is no text in it")
        duplicates = find_duplicates(parts, records) if dedup else Duplicates({})
        division = _divide(job, work, records, duplicates)
        _write_shards(job, work, records, duplicates, division, pool, progress, tuple(bad.values()))
    if checked := sum(record.checked for record in records):
        print(f"documents tokenized again by {reference_name(job.tokenizer)}: {checked:,}, no difference")


def _tokenize(job: Job, units: list[Unit], finished: dict[int, UnitRecord], pool: Pool, progress: Progress) -> None:
    """Add the records of the units to the finished ones."""
    unit_of = {unit.index: unit for unit in units}
    with DownloadsAhead(units, job.columns, job.workers) as downloads:
        for record in pool.run("tokenize", units):
            finished[record.index] = record
            progress.unit(record)
            downloads.finished(unit_of[record.index])


def _divide(job: Job, work: Path, records: list[UnitRecord], dups: Duplicates) -> Division:
    """Made once: the tokens that it looks at may be gone when a killed run continues."""
    file = work / "splits.json"
    if file.exists():
        return Division.from_json(json.loads(file.read_text(encoding="utf-8")))
    parts = work / "units"
    try:
        division = _decide(job, parts, records, dups)
    except UserError:
        remove(work)  # no continuation could mend it
        raise
    with atomic_write(file) as out:
        out.write(json.dumps(asdict(division)).encode())
    return division


def _decide(job: Job, parts: Path, records: list[UnitRecord], dups: Duplicates) -> Division:
    if not job.has_valid:
        return assemble.without_valid(parts, records, dups)
    if isinstance(job.config, FinewebConfig):
        share = job.config.valid_share
        threshold = hash_threshold(parts, records, dups, job.config.valid_tokens, share)
        return assemble.by_hash(parts, records, dups, threshold, share)
    division = assemble.at_fraction(parts, records, dups, job.config.valid_fraction, job.tokenizer, job.dtype)
    if not division.splits[-1].tokens:
        raise UserError(
            f"{', '.join(job.source)}: too little text to split ({division.splits[0].tokens} tokens); "
            "use a smaller share for valid/"
        )
    return division


def _write_shards(
    job: Job,
    work: Path,
    records: list[UnitRecord],
    dups: Duplicates,
    division: Division,
    pool: Pool,
    progress: Progress,
    skipped: tuple[str, ...],
) -> None:
    """Write the shards of all splits, valid/ first, deleting units whose tokens are all in shards; then the manifests."""
    parts = work / "units"
    jobs = [
        shard
        for split in division.splits
        for shard in assemble.shard_jobs(
            parts, records, dups, split, work / split.name, job.dtype, job.config.shard_size
        )
    ]
    entries = {shard.path.name: entry for shard in jobs if (entry := assemble.finished_shard(shard))}
    users: dict[int, set[str]] = {}  # shards that each unit is still needed for
    units_of = {shard.path.name: [record.index for record, _ in shard.units] for shard in jobs}
    for name, units in units_of.items():
        for unit in units:
            users.setdefault(unit, set()).update({name} - entries.keys())
    for name, entry in pool.run("assemble", [shard for shard in jobs if shard.path.name not in entries]):
        entries[name] = entry
        progress.shards(len(entries), len(jobs))
        for unit in units_of[name]:
            users[unit].discard(name)
            if not users[unit]:
                part_path(parts, unit, "tokens").unlink(missing_ok=True)
    for split in division.splits:
        mine = tuple(entries[shard.path.name] for shard in jobs if shard.split == split)
        manifests.write(work / split.name, _manifest(job, division, split, mine, dups, skipped))


def _manifest(
    job: Job,
    division: Division,
    split: SplitPlan,
    entries: tuple[ShardEntry, ...],
    dups: Duplicates,
    skipped: tuple[str, ...],
) -> Manifest:
    return Manifest(
        split=split.name,
        dtype=job.dtype,
        tokens=split.tokens,
        shards=entries,
        tokenizer=job.tokenizer.name,
        tokenizer_hash=job.tokenizer.hash,
        vocab_size=job.tokenizer.vocab_size,
        end_of_text=job.tokenizer.end_of_text,
        documents=sum(entry.documents or 0 for entry in entries),
        text_bytes=split.text_bytes,
        source=job.source,
        command=job.command,
        inputs=tuple(job.inputs),
        split_rule=split.rule,
        unused_documents=division.unused_documents,
        unused_tokens=division.unused_tokens,
        duplicates=dups.total if job.config.dedup == "exact" else None,
        skipped_files=skipped,
    )
