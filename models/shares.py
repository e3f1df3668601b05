"""Splits the work on a batch between the processes of a run.

Every rank holds the whole batch; only the work on its rows is split. Inside ``sharing``, a method marked ``by_rows``
computes the rows of its rank and returns the rows of all ranks, so the surrounding code computes the same as in one
process. A loss of ``mi_kernels.distributed`` uses the rows from ``own_rows`` instead. In both cases the mean of a loss
over the ranks is the loss of the batch, and the mean of its gradients is the gradient of that loss.

Random numbers for rows (dropout in encoders) differ between the ranks; all others agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mi_kernels.distributed import gather
from models.batch import Batch, Inputs


@dataclass
class Share:
    """This process among ``size`` processes. ``calls`` counts the shared calls, each of which has its own seed."""

    rank: int = 0
    size: int = 1
    calls: int = 0

    def sizes(self, rows: int) -> tuple[int, ...]:
        """The number of rows of every rank: contiguous parts of the batch whose sizes differ by at most one."""
        return tuple(rows * (r + 1) // self.size - rows * r // self.size for r in range(self.size))

    def part(self, rows: int) -> slice:
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)


_ALONE = Share()
_current: ContextVar[Share] = ContextVar("share", default=_ALONE)
Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def sharing(rank: int, size: int) -> Iterator[Share]:
    """Context in which work on rows is split between ``size`` ranks. All ranks must enter it with the same batch."""
    share = Share(rank, size)
    token = _current.set(share)
    try:
        yield share
    finally:
        _current.reset(token)


def by_rows(method: Method) -> Method:
    """Marks a method for which row i of the result depends only on row i of the arguments.

    Tensors, Inputs and batches, also in lists and mappings, are cut to this rank's rows; numbers and names are passed
    unchanged. Returned tensors, in any nesting, are gathered from all ranks, and gradients return to the ranks that
    computed the rows. If there are fewer rows than ranks, every rank computes all of them.
    """

    @wraps(method)
    def shared(self: Any, *args: Any, **kwargs: Any) -> Any:
        share = _current.get()
        rows = _rows((args, kwargs)) if share.size > 1 else 0
        if rows < share.size or share.size == 1:
            return method(self, *args, **kwargs)
        args, kwargs = _cut((args, kwargs), share.part(rows))
        with _apart(share):
            found = method(self, *args, **kwargs)
        return _together(found, share.sizes(rows))

    return cast(Method, shared)


@contextmanager
def own_rows(batch: Batch) -> Iterator[Batch]:
    """This rank's rows of a batch, for a loss that communicates with the other ranks itself; inside, no work is split.

    Raises ValueError if there are fewer rows than ranks.
    """
    share = _current.get()
    if share.size == 1:
        yield batch
        return
    if batch.size < share.size:
        raise ValueError(f"a batch must have a row for each of {share.size} processes, got {batch.size}")
    with _apart(share):
        yield _cut(batch, share.part(batch.size))


@contextmanager
def _apart(share: Share) -> Iterator[None]:
    """Context in which work is not split further and every rank draws its own random numbers. Afterwards all ranks draw
    the same numbers again."""
    share.calls += 1
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    token = _current.set(_ALONE)
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed((torch.initial_seed() + share.calls * 1_000_003 + share.rank * 7_919) % 2**63)
            yield
    finally:
        _current.reset(token)


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over the ranks, with one collective per dtype; the tensors themselves for one process."""
    size = _current.get().size
    found = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors) if size > 1 else ():
        chosen = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen])
        dist.all_reduce(flat)
        parts = flat.div_(size).split([tensors[i].numel() for i in chosen])
        for i, part in zip(chosen, parts, strict=True):
            found[i] = part.view_as(tensors[i])
    return found


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their mean over the ranks. A parameter without a gradient on all ranks stays without
    one."""
    if _current.get().size == 1:
        return
    learning = [p for p in parameters if p.requires_grad]
    if not learning:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    used = torch.tensor([p.grad is not None for p in learning], dtype=learning[0].dtype, device=learning[0].device)
    *means, used = average([*gradients, used])
    for parameter, mean, any_rank in zip(learning, means, used.tolist(), strict=True):
        parameter.grad = mean if any_rank else None


def _rows(value: Any) -> int:
    """The number of rows of the tensors in ``value``. Raises ValueError if they differ."""
    found = {len(t) for t in _tensors(value)}
    if len(found) != 1:
        raise ValueError(f"arguments that are shared by rows must have the same number of rows, got {sorted(found)}")
    return found.pop()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _cut(value: Any, part: slice) -> Any:
    return _mapped(value, lambda t: t[part])


def _together(value: Any, sizes: tuple[int, ...]) -> Any:
    return _mapped(value, lambda t: gather(t, sizes=sizes))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``change`` to every tensor in ``value``; everything else is unchanged."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() else value
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, Inputs | Batch):
        return type(value)(*(_mapped(part, change) for part in value))
    if isinstance(value, tuple | list):
        return type(value)([_mapped(part, change) for part in value])
    return value
