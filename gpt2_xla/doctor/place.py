"""Where this machine stands: Kaggle, Colab, a TPU VM, or any other computer."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2_xla.doctor.finding import Finding
from gpt2_xla.runtime.tpu_host import tpu_chips, tpu_device_files


@dataclass(frozen=True)
class Place:
    """What decides how to start, and where files last."""

    kind: Literal["kaggle", "colab", "tpu-vm", "other"]
    chips: tuple[str, ...]  # kinds of the TPU chips on the PCI bus


def recognise(environ: Mapping[str, str], root: Path = Path("/")) -> Place:
    """Recognise the place by environment variables and files.

    Kaggle: KAGGLE_KERNEL_RUN_TYPE (Interactive or Batch; Kaggle/docker-python, and what wandb and others test), or the
    folder /kaggle/working. Its images are built on Colab's and may carry COLAB_* too, so it comes first. Colab:
    COLAB_RELEASE_TAG, set in every runtime, or the older COLAB_GPU, set to nothing or 0 without a GPU
    (googlecolab/colabtools). TPU VM: chips on the PCI bus, as torch_xla itself looks for them, or TPU_ACCELERATOR_TYPE
    (GKE and Cloud Run set it where there is no metadata server).
    """
    chips = tuple(tpu_chips(root))
    if "KAGGLE_KERNEL_RUN_TYPE" in environ or (root / "kaggle" / "working").is_dir():
        return Place("kaggle", chips)
    if "COLAB_RELEASE_TAG" in environ or "COLAB_GPU" in environ:
        return Place("colab", chips)
    return Place("tpu-vm" if chips or environ.get("TPU_ACCELERATOR_TYPE") else "other", chips)


def place_findings(
    place: Place, environ: Mapping[str, str], run_folder: Path, root: Path = Path("/")
) -> Iterator[Finding]:
    """The place itself, what it does to the run folder, and whether its TPU can be opened."""
    names = {"kaggle": "Kaggle", "colab": "Colab", "tpu-vm": "TPU VM", "other": "neither Kaggle nor Colab"}
    tpu = ", ".join(f"{count} × {kind}" for kind, count in Counter(place.chips).items())
    kind = environ.get("TPU_ACCELERATOR_TYPE")
    hosts = len(environ.get("TPU_WORKER_HOSTNAMES", "x").split(","))
    parts = [
        names[place.kind],
        f"{tpu} on the PCI bus" if tpu else "no TPU chip on the PCI bus",
        *([f"TPU_ACCELERATOR_TYPE {kind}"] if kind else []),
        *([f"{hosts} hosts, this is number {environ.get('TPU_WORKER_ID', '?')}"] if hosts > 1 else []),
    ]
    yield Finding("place", "ok", ", ".join(parts))
    folder = str(run_folder.absolute())
    if place.kind == "kaggle" and not folder.startswith("/kaggle/working/"):
        text = f"{folder} is lost when the session ends; only /kaggle/working is kept"
        yield Finding("run folder", "warning", text, "add --checkpoints-dir /kaggle/working/runs/gpt2 to the command")
    if place.kind == "colab" and not folder.startswith("/content/drive/"):
        text = f"{folder} is lost when the runtime ends; Google Drive is kept"
        mend = "from google.colab import drive; drive.mount('/content/drive'), and --checkpoints-dir /content/drive/MyDrive/runs/gpt2"
        yield Finding("run folder", "warning", text, mend)
    if place.chips and not tpu_device_files(root):
        text = "the chips are on the PCI bus, but there is no /dev/accel* or /dev/vfio/* (a container without them?)"
        yield Finding("TPU access", "problem", text, "docker run --privileged --net=host …")
