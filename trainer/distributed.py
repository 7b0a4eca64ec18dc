"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from facespec.errors import ConfigError

K = TypeVar("K")
V = TypeVar("V")

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others; a process that fails is noticed at once by torchrun."""


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of the run: where it computes, and its number."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def gather_rows(self, row: Tensor) -> list[list[float]]:
        """Return the rows of all processes, in their order."""
        if self.size == 1:
            return [row.tolist()]
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row)
        return torch.stack(rows).tolist()

    def agree(self, model: nn.Module) -> None:
        """Give every process the weights and statistics that the first one has."""
        if self.size > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, 0)

    def gather(self, value: dict[K, V]) -> dict[K, V]:
        """Return the dictionaries of all processes as one, on each of them."""
        parts: list[dict[K, V]] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, value)
        return {key: inner for part in parts for key, inner in part.items()}


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Take part in the run that torchrun's variables describe, if there are any.

    Args:
        device: "cpu", "cuda", "cuda:N" for the GPU of that index, or "auto" for CUDA where there is some.

    Raises:
        ConfigError: There is no CUDA device for this process.
    """
    try:
        rank, size, local = (
            int(os.environ.get(name, low)) for name, low in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are torchrun's, they must be numbers ({error})") from None
    cuda = torch.cuda.device_count() if device != "cpu" else 0
    index = device.partition(":")[2]
    if device not in ("auto", "cpu") and not cuda:
        raise ConfigError(f"run.device is {device!r}: PyTorch finds none here, use --device cpu")
    if index and size > 1:
        raise ConfigError(f"run.device is {device!r}: {size} processes do not share a GPU, use --device cuda")
    if index and int(index) >= cuda:
        raise ConfigError(f"run.device is {device!r}: there are {cuda} CUDA devices, the first is cuda:0")
    local = int(index) if index else local
    if cuda and local >= cuda:
        raise ConfigError(
            f"there are {cuda} CUDA devices for {local + 1} or more processes: torchrun --nproc-per-node {cuda}"
        )
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1:
        try:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the processes do not find each other ({reason}): start them with torchrun") from None
    yield World(place, rank, size)
    if size > 1:  # not after an error: the others may be waiting for what will never come
        dist.destroy_process_group()


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 itself, which is then about twice as fast as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # there is no public way to ask
    return bool(check and check())
