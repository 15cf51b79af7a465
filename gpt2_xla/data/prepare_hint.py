"""The command that would prepare the data folder that a command asked for and did not find."""

import shlex
from pathlib import Path

BUILT_IN = {
    "pydoc": ("--source", "pydoc"),
    "stdlib": ("--source", "stdlib"),
    "quickstart": ("--source", "pydoc", "--tokenizer", "bytes"),  # as scripts/quickstart.sh does
}


def prepare_hint(folder: Path) -> str:
    """How to come by `folder`, which is not there, holds no shards, or is a file, in words."""
    if folder.suffix in (".npy", ".json"):
        return f"give the folder of the shards, {folder.parent}"
    hint = f"prepare data with: python {prepare_arguments(folder)}"
    output = _output_dir(folder)
    return hint if output / folder.name == folder else f"{hint}, which writes {output / 'train'} and {output / 'valid'}"


def prepare_arguments(folder: Path) -> str:
    """The script and flags that write `folder`, or the train/ and valid/ in it where it has neither name."""
    output = _output_dir(folder)
    name = output.name.lower()
    if folder.is_file():
        words = ["scripts/prepare_text.py", "--source", str(folder)]
    elif "fineweb" in name:
        words = ["scripts/prepare_fineweb.py", *(["--fineweb-edu"] if "edu" in name else [])]
    else:
        words = ["scripts/prepare_text.py", *BUILT_IN.get(name, ("--source", "YOUR_TEXT"))]
    return shlex.join([*words, "--output-dir", str(output)])


def _output_dir(folder: Path) -> Path:
    """The --output-dir that makes `folder`; never the root of the disk."""
    if folder.is_file():
        return Path("data", folder.stem)
    named = folder.name in ("train", "valid") and folder.parent != Path("/")
    return folder.parent if named else folder
