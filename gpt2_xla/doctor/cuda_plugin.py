"""Whether PJRT_DEVICE=CUDA can work: the plugin, NVIDIA's driver, the GPUs."""

import re
from collections.abc import Iterator, Mapping

from gpt2_xla.doctor.finding import Finding
from gpt2_xla.doctor.installation import installed
from gpt2_xla.runtime.cuda_host import PLUGIN, cuda_mistakes, knows_cuda, read_driver, visible_gpus

NAME = "CUDA plugin"
COMMAND = re.compile(r"pip install .*|unset \w+|export \w+=\w+")  # what a sentence says to do


def cuda_plugin(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A finding for each mistake, or one of what there is; nothing where nobody asks for it and nothing is installed."""
    asked = environ.get("PJRT_DEVICE") == "CUDA"
    if installed("torch_xla") is None or not (asked or installed(PLUGIN)):
        return
    mistakes = cuda_mistakes()
    for mistake in mistakes:
        command = COMMAND.search(mistake)
        yield Finding(NAME, "problem" if asked else "not run", mistake, command[0] if command else "nvidia-smi")
    driver = read_driver()
    if driver and not mistakes:
        drives = f"torch_xla {installed('torch_xla')} itself" if knows_cuda() else f"{PLUGIN} {installed(PLUGIN)}"
        gpus = visible_gpus(driver)
        text = f"{drives}, driver {driver.version} for CUDA {driver.cuda_text}, {len(gpus)} × {gpus[0].name}"
        yield Finding(NAME, "ok", text)
