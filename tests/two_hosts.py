"""Two hosts on one machine: each with its own network, processes and name, joined by a cable, sharing only the disks.

Linux namespaces (ip netns, unshare), so it needs root; `why_not()` says what is missing.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commands import PATIENCE, PYTHON, finish, start

PORT = 29500  # free on any host: nothing else runs there
TOOLS = ("ip", "unshare", "mount", "hostname")


class Host:
    """A network namespace with an address; every command gets namespaces of its own for processes, mounts and the name."""

    def __init__(self, name: str, namespace: str, address: str, names: Path) -> None:
        self.name, self.namespace, self.address = name, namespace, address
        self.names = names  # of both hosts, for /etc/hosts
        self._started: list[subprocess.Popen] = []

    def start(self, *command: object, **environment: str) -> subprocess.Popen:
        """Start a command here. Its processes are those of a host: when the first one is gone the kernel kills the rest."""
        script = f'mount --bind {self.names} /etc/hosts && hostname {self.name} && exec "$@"'
        inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = start(
            *["ip", "netns", "exec", self.namespace, *inside, "sh", "-c", script, "sh", *map(str, command)],
            **environment,
        )
        self._started.append(process)
        return process

    def torchrun(self, program: Path, *flags: object, **environment: str) -> subprocess.Popen:
        """Start this host's torchrun, one process of two, as docs/multi_host.md says."""
        launch = [*PYTHON, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
        launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=host-a:{PORT}", "--rdzv-id=test"]
        return self.start(*launch, program, *flags, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environment)

    def close(self) -> None:
        """Kill what still runs here."""
        for process in self._started:
            if process.stdout is not None and not process.stdout.closed:
                power_off(process)


def power_off(process: subprocess.Popen) -> str:
    """SIGKILL to all the processes that a `Host.start` began, at once; what it had written."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # the kernel kills the whole process namespace with its first process
    return finish(process)


def first_process(process: subprocess.Popen) -> int:
    """The pid, as this machine counts, of the command itself that a `Host.start` began."""
    pid, deadline = process.pid, time.monotonic() + PATIENCE
    while b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4]:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pid = int(children[0]) if children else pid
        assert time.monotonic() < deadline
        assert process.poll() is None
    return pid


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b, and a cable between them. `folder` takes their /etc/hosts. Nothing is left at the end."""
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
    hosts = [Host(f"host-{x}", f"gpt2-xla-{os.getpid()}-{x}", f"10.77.0.{n}", names) for n, x in ((1, "a"), (2, "b"))]
    one, other = (host.namespace for host in hosts)
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "cable")
            ip("-n", host.namespace, "link", "set", "cable", "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.close()
            subprocess.run(
                ["ip", "netns", "delete", host.namespace], timeout=PATIENCE, check=False, capture_output=True
            )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], timeout=PATIENCE, check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """What keeps this machine from making two hosts; None if nothing does."""
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"two hosts need {', '.join(missing)}"
    name = f"gpt2-xla-{os.getpid()}-try"
    inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "hostname", name]
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "cable", "type", "veth", "peer", "name", "other")
        subprocess.run(["ip", "netns", "exec", name, *inside], timeout=PATIENCE, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"two hosts need namespaces, which this machine does not allow: {said!s}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], timeout=PATIENCE, check=False, capture_output=True)
    return None
