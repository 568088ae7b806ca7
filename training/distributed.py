"""Several processes of one run, as ``torchrun`` starts them: one leads, the others help.

The leading process runs the stages; it alone decides, draws, writes files and shows progress. Where
work can be shared it calls `together`: the function and what it needs travel to the helpers, and
all processes run it side by side. Bead dynamics and everything else stay with the leader.

Data go by gloo between CPUs and by nccl between GPUs. A process that ends breaks its connections,
and all others end with an error.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Result = TypeVar("Result")
Portion = TypeVar("Portion")

# Helpers wait for the leader while it runs whole simulations; those that died don't stay silent.
_WAITING, _WORKING = timedelta(days=30), timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """The processes that share a task, and the exchange of data between them.

    Attributes
    ----------
    rank, size
        Number of this process, and of all. With a size of one nothing is exchanged.
    """

    rank: int = 0
    size: int = 1

    def share(self, n: int) -> slice:
        """Return this process's part of n things in a row; parts differ by one at most.

        Raises
        ------
        ValueError
            If there are more processes than things.
        """
        if n < self.size:
            raise ValueError(
                f"{self.size} processes can't share {n} frames or states of a step: raise the "
                "batch size, or start fewer processes"
            )
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of equally shaped tensors over the processes, without gradient."""
        if self.size == 1:
            return values.detach()
        total = values.detach().clone()
        with _lost_connections():
            dist.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Return tensors (n_rank, ...), joined in the order of the processes, without gradient."""
        if self.size == 1:
            return values.detach()
        length = self.sum(nn.functional.one_hot(torch.tensor(self.rank), self.size) * len(values))
        rows = values.new_zeros(self.size, int(length.max()), *values.shape[1:])
        rows[self.rank, : len(values)] = values.detach()
        rows = self.sum(rows)
        return torch.cat([row[:n] for row, n in zip(rows, length.tolist(), strict=True)])

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sum over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = self.sum(torch.cat([g.flatten() for g in gradients]))
        parts = total.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agreed(self, value: Result) -> Result:
        """Return the leader's value, any object."""
        if self.size == 1:
            return value
        values = [value]
        with _lost_connections():
            dist.broadcast_object_list(values, src=0, group=_team.waiting)
        return values[0]


ALONE = Ranks()


@dataclass
class _Team:
    """The place of a process among those of its run."""

    ranks: Ranks = ALONE
    store: dist.Store | None = None
    waiting: dist.ProcessGroup | None = None
    tasks: int = 0
    busy: bool = False


_team = _Team()


def processes_here() -> int:
    """Return how many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(device: torch.device, threads: int = 1) -> bool:
    """Join the processes that ``torchrun`` started; return True if this one leads.

    A helper returns, with False, when the leader has left. Without ``torchrun`` there is one
    process, which leads.

    Parameters
    ----------
    device
        Where the run computes: ``cuda`` gives every process of a machine a GPU of its own.
    threads
        Torch's threads in helpers.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return True
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=_WORKING))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_WORKING)
    _team.ranks, _team.store = Ranks(rank, size), store
    _team.waiting = dist.new_group(backend="gloo", timeout=_WAITING)
    if rank == 0:
        return True
    torch.set_num_threads(threads)
    _help()
    return False


def leave() -> None:
    """End the helpers; of no effect without any."""
    if _team.ranks.size > 1:
        _broadcast(b"")
        _forget()


def together(
    work: Callable[..., Result],
    *shared: Any,
    leading: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Call ``work(ranks, *shared, **options)`` in all processes; return what the leader's returns.

    Within shared work, and without helpers, it is an ordinary call, with `ALONE`.

    Parameters
    ----------
    work
        A function of a module.
    *shared, **options
        Picklable. Helpers get copies, on devices of their own.
    leading
        Further options, for the leader's call alone.

    Raises
    ------
    ConnectionError
        If another process ended or hangs.
    """
    leading = leading or {}
    if _team.ranks.size == 1 or _team.busy:
        return work(ALONE, *shared, **options, **leading)
    buffer = io.BytesIO()
    torch.save((work, shared, options), buffer)
    _broadcast(buffer.getvalue())
    return _run(work, shared, options | leading)


def spread(
    work: Callable[[Portion], Result],
    portions: Sequence[Portion],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Return ``[work(portion) for portion in portions]``, done by all processes.

    Every process takes the next portion as soon as it is free. Results are those of one process,
    bit for bit, if each depends on its portion alone.

    Parameters
    ----------
    work
        A function of a module, or a `functools.partial` of one; picklable, as are portions and
        results.
    portions
        One after the other, in the order of the results.
    progress
        Called with portions begun and their number.
    """
    return together(_each, work, portions, leading={"progress": progress})


def _each(
    ranks: Ranks,
    work: Callable[[Portion], Result],
    portions: Sequence[Portion],
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    done: dict[int, Result] = {}
    while (k := _next(ranks, len(done))) < len(portions):
        done[k] = work(portions[k])
        if progress is not None:
            progress(k + 1, len(portions))
    if ranks.size > 1:
        parts = [None] * ranks.size if ranks.rank == 0 else None
        with _lost_connections():
            dist.gather_object(done, parts, dst=0, group=_team.waiting)
        done = {k: result for part in parts or [] for k, result in part.items()}
    return [done[k] for k in sorted(done)]


def _next(ranks: Ranks, n_done: int) -> int:
    """Return the number of the next portion that nobody has taken."""
    if ranks.size == 1:
        return n_done
    with _lost_connections():
        return _team.store.add(f"ccg portions of task {_team.tasks}", 1) - 1


def _run(work: Callable[..., Result], shared: tuple, options: Mapping[str, Any]) -> Result:
    _team.busy, _team.tasks = True, _team.tasks + 1
    try:
        return work(_team.ranks, *shared, **options)
    finally:
        _team.busy = False


def _help() -> None:
    """Do what the leader says until it leaves, or is gone: it has told why."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the leader
    while True:
        try:
            task = _broadcast(b"")
        except ConnectionError:
            return
        if not task:
            _forget()
            return
        work, shared, options = torch.load(
            io.BytesIO(task), map_location=_own_device, weights_only=False
        )
        try:
            _run(work, shared, options)
        except ConnectionError:
            return
        except Exception as error:
            _fail(error)


def _own_device(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    return storage.cuda() if location.startswith("cuda") else storage


def _fail(error: Exception) -> NoReturn:
    """End a helper: connections break, and the leader ends as well."""
    traceback.print_exc()
    ranks = _team.ranks
    print(f"process {ranks.rank} of {ranks.size} stopped: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _broadcast(task: bytes) -> bytes:
    """Return the leader's bytes."""
    with _lost_connections():
        length = torch.tensor([len(task)])
        dist.broadcast(length, src=0, group=_team.waiting)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if task:
            data = torch.frombuffer(bytearray(task), dtype=torch.uint8)
        if len(data):
            dist.broadcast(data, src=0, group=_team.waiting)
    return data.numpy().tobytes()


def _forget() -> None:
    dist.destroy_process_group()
    _team.__dict__.update(vars(_Team()))


@contextmanager
def _lost_connections() -> Iterator[None]:
    """Turn the errors of torch's backends into one that says what happened."""
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError) as error:
        ranks = _team.ranks
        raise ConnectionError(
            f"process {ranks.rank} of {ranks.size} lost the others: one has ended or hangs, see "
            f"its message; continue with --resume ({str(error).splitlines()[0]})"
        ) from error
