"""Many processes on one job, as `torchrun` starts them: who am I, sums over all, and what one has told to the rest.

With one process everything here is a no-op. Results do not depend on which process asks: a sum is the same on all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=12)  # the others wait while process 0 runs k-means


@dataclass(frozen=True)
class World:
    """The processes of a job.

    Attributes:
        rank: this process, 0 to size - 1.
        size: how many there are.
        device: where tensors must be to be sent.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                sent = tensor.to(self.device)
                dist.all_reduce(sent)
                tensor.copy_(sent)

    def spread(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Replace every tensor by that of process `source`."""
        if self.size > 1:
            for tensor in tensors:
                sent = tensor.to(self.device)
                dist.broadcast(sent, source)
                tensor.copy_(sent)

    def spread_json(self, value: Any) -> Any:
        """The JSON-able `value` of process 0."""
        if self.size == 1:
            return value
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self.spread([length])
        if self.rank:
            data = torch.zeros(int(length), dtype=torch.uint8)
        self.spread([data])
        return json.loads(bytes(data.tolist()))


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world of this process, whose model is on `device`: nccl on CUDA, gloo elsewhere.

    A process group that is there already is used and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        yield _world(device)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        try:
            yield _world(device)
        finally:
            dist.destroy_process_group()
    else:
        yield World()


def rank() -> int:
    """Number of this process among those that torchrun started, 0 if it did not."""
    return int(os.environ.get("RANK", "0"))


def local_device(name: str) -> str:
    """`cuda` is one GPU a process under torchrun; other names stay what they are."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


def _world(device: torch.device) -> World:
    place = device if dist.get_backend() == "nccl" else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), place)
