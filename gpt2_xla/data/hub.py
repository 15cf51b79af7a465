"""Files of a Hugging Face dataset: listed by `datasets`, downloaded or streamed by `huggingface_hub`."""

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

from gpt2_xla.data.inputs import (
    SUFFIXES,
    InputFile,
    clear_remote_errors,
    file_system,
    host_of,
    inputs_of,
    network_errors,
    remote_input,
)
from gpt2_xla.data.units import Columns
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import FinewebConfig

ANSWER_SECONDS = 10  # for the hub to answer at all


def dataset_name(config: FinewebConfig) -> str:
    """The dataset that the options mean."""
    if config.fineweb_edu and config.dataset != FinewebConfig.dataset:
        raise UserError(f"--fineweb-edu and --dataset {config.dataset} name two datasets; give one of them")
    return "HuggingFaceFW/fineweb-edu" if config.fineweb_edu else config.dataset


def dataset_inputs(config: FinewebConfig) -> list[InputFile]:
    """The files of a dataset on the hub, or of a local or remote file or folder.

    Raises UserError for what does not exist, for datasets of other formats, and without a network.
    """
    dataset = dataset_name(config)
    if "://" in dataset or Path(dataset).exists():
        return inputs_of(dataset, "--dataset")
    if Path(dataset).is_absolute() or dataset.startswith(("./", "../", "~")) or dataset.count("/") > 1:
        raise UserError(f"--dataset {dataset}: no such file or folder")
    urls = _urls(config, dataset)
    with clear_remote_errors("hf://datasets/" + dataset):
        fs = file_system(urls[0])[0]
        return [remote_input(fs, url.removeprefix("hf://"), url.split("@", 1)[-1].split("/", 1)[-1]) for url in urls]


def _urls(config: FinewebConfig, dataset: str) -> list[str]:
    """hf:// addresses, with the revision, of the files of a dataset's configuration and split."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Asked once, because without a network `datasets` asks for half a minute. What the hub answers is no matter here.
        with contextlib.suppress(HfHubHTTPError):
            HfApi().dataset_info(dataset, timeout=ANSWER_SECONDS)
        builder = datasets.load_dataset_builder(dataset, name=config.name, cache_dir=config.cache_dir)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"--dataset {dataset} is not on {host_of('hf://')}, or private; give its name there or a local path"
        ) from error
    except ValueError as error:  # unknown configuration: the message lists those there are
        raise UserError(f"--dataset {dataset} --name {config.name}: {error}") from error
    except network_errors() as error:
        what = f"{error}".splitlines()[0][:160]
        raise UserError(
            f"--dataset {dataset} can't be read from {host_of('hf://')} ({what}); check the network and the disk, "
            "or give local parquet files with --dataset PATH"
        ) from error
    files = {str(split): list(map(str, urls)) for split, urls in (builder.config.data_files or {}).items()}
    if config.split not in files:
        raise UserError(f"--dataset {dataset} has no --split {config.split}; it has {', '.join(files) or 'no files'}")
    urls = files[config.split]
    if other := [url for url in urls if not url.endswith(SUFFIXES)]:
        raise UserError(
            f"--dataset {dataset} holds {other[0].rsplit('/', 1)[-1]}; expected {', '.join(SUFFIXES)} files"
        )
    return urls


def bytes_to_download(files: list[InputFile], columns: Columns) -> int:
    """What the cache still lacks of the hub's files; 0 where they are streamed."""
    kept = [] if columns.streaming else [file for file in files if file.url.startswith("hf://")]
    missing = 0
    for file in kept:
        from huggingface_hub import HfFileSystem, try_to_load_from_cache  # slow to import, and local files need it not

        with clear_remote_errors(file.url):
            place: Any = HfFileSystem().resolve_path(file.url)  # asks the hub once for all files of a dataset
        names = {"repo_type": place.repo_type, "revision": place.revision, "cache_dir": columns.cache_dir}
        if not isinstance(try_to_load_from_cache(place.repo_id, place.path_in_repo, **names), str):
            missing += file.size
    return missing


def cache_folder(cache_dir: str | None) -> Path:
    """Where downloads are kept."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE)


@cache
def downloaded(url: str, cache_dir: str | None) -> str:
    """The local path of an hf:// file; the first caller downloads it, later ones and later runs find it there."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    with clear_remote_errors(url):
        place: Any = HfFileSystem().resolve_path(url)
        return str(
            hf_hub_download(
                place.repo_id,
                place.path_in_repo,
                repo_type=place.repo_type,
                revision=place.revision,
                cache_dir=cache_dir,
            )
        )
