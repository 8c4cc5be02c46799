"""The processes that torchrun started: how they meet, share out work, and put together what they found.

Alone, each function gives back what it gets. Who holds which latents in training is `objective.World`'s affair.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from saelib import UserError

MEETING = "SAELIB_MEETING"
"""Environment variable of a chapter's kernel that has siblings: the name under which they find each other."""

T = TypeVar("T")


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes that torchrun started; alone, do nothing."""
    if "RANK" not in os.environ:
        yield
        return
    _join("training", gpu())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _join(meeting: str, gpu: int | None) -> None:
    """Meet the others by torchrun's variables; each meeting has a name, for they all use one store."""
    backend = "gloo"
    if gpu is not None:
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(gpu)
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(meeting, store), rank=rank, world_size=size)


def gpu() -> int | None:
    """Number of this process's GPU among those it sees; None where there are none. UserError: others have them all."""
    there = torch.cuda.device_count()
    number = 0 if MEETING in os.environ else int(os.environ["LOCAL_RANK"])  # a kernel sees only its own
    if 0 < there <= number:
        cure = f"torchrun --nproc-per-node={there}, or CUDA_VISIBLE_DEVICES= to do without"
        raise UserError(f"more processes than GPUs here ({there}): {cure}")
    return number if there else None


def agreed(value: T) -> T:
    """What the first of the processes that torchrun started says; alone, what oneself says."""
    if "RANK" not in os.environ:
        return value
    _join("agreement", None)
    said = [value]
    with _others():
        dist.broadcast_object_list(said)
    dist.destroy_process_group()
    return said[0]


def here() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are. A chapter's kernel joins the others here."""
    if MEETING in os.environ and not dist.is_initialized():
        _join(os.environ[MEETING], gpu())
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shared(parts: Iterable[T], skip: Callable[[T], object] = lambda part: None) -> Iterator[T]:
    """The parts that are this process's: they go round. For every other one `skip` is called, in order."""
    rank, size = here()
    for number, part in enumerate(parts):
        if number % size == rank:
            yield part
        else:
            skip(part)


def together(found: list[T]) -> list[T]:
    """What all processes found in their `shared` parts (anything but None, on the CPU), in the order of the parts.

    Raises:
        UserError: another process has stopped.
    """
    _, size = here()
    if size == 1:
        return found
    everyone: list = [None] * size
    with _others():
        dist.all_gather_object(everyone, found)
    return [one for round_ in itertools.zip_longest(*everyone) for one in round_ if one is not None]


def everyone(x: Tensor) -> list[Tensor]:
    """A tensor of each process, all of one shape. Raises UserError: another process has stopped."""
    _, size = here()
    if size == 1:
        return [x]
    found = [torch.empty_like(x) for _ in range(size)]
    with _others():
        dist.all_gather(found, x.contiguous())
    return found


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError("another process of this run has stopped: its own error says why") from error
