"""xmp.spawn, where torch_xla must first be told of the devices: in this process and in each child."""

from collections.abc import Callable
from typing import Any


def spawn_replicas(replica: Callable[..., None], args: tuple[Any, ...] = (), start_method: str = "spawn") -> None:
    """Run replica(index, *args) on each device of this host, each in a process of its own."""
    import torch_xla.distributed.xla_multiprocessing as xmp

    from gpt2_xla.runtime.pjrt_cuda import register_devices

    register_devices()
    xmp.spawn(_Registering(replica), args=args, start_method=start_method)


class _Registering:
    """The function, which registers the devices when a child receives it: that is before torch_xla looks for them there."""

    def __init__(self, replica: Callable[..., None]) -> None:
        self._replica = replica

    def __call__(self, *arguments: Any) -> None:
        self._replica(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self._replica,)


def _received(replica: Callable[..., None]) -> _Registering:
    from gpt2_xla.runtime.pjrt_cuda import register_devices

    register_devices()
    return _Registering(replica)
