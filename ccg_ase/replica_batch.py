"""ReplicaBatch: R replicas under way, with their random numbers, exchange and state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccg_ase.baoab import BAOAB, PhasePoint
from ccg_ase.bead_frames import BeadFrames
from ccg_ase.random_streams import RandomStreams
from ccg_ase.replica_exchange import ReplicaExchange
from ccg_ase.run_checks import ExplodedError
from ccg_ase.threads import one_thread
from ccg_ase.topology import Topology

_BLOCK_STEPS = 128  # steps between meetings of host and device: noise goes there, frames come back
_BLOCK_NUMBERS = 2**23  # random numbers of a block at most, 64 MiB


class _Record(NamedTuple):
    """What a frame holds, on the device."""

    beads: Tensor
    energies: Tensor
    restraint_energies: Tensor
    walkers: Tensor


class ReplicaBatch:
    """R replicas, advanced a block of steps at a time; within a block the host waits for nothing.

    Parameters
    ----------
    dynamics
        What moves them.
    beads
        Topology of the beads.
    seeds
        Seed of each replica, R of them.
    temperatures_K
        Temperature of each replica in K, float64 (R,), on the device of `dynamics`.
    n_rungs
        Replicas per ladder, a divisor of R.
    exchange_every
        Steps between attempts to exchange, or None.
    frame_dtype
        Precision of the positions of saved frames.
    largest_move_A
        A bead that moves further along an axis within one step has exploded.
    """

    def __init__(
        self,
        dynamics: BAOAB,
        beads: Topology,
        seeds: Sequence[int],
        temperatures_K: Tensor,
        *,
        n_rungs: int,
        exchange_every: int | None,
        frame_dtype: torch.dtype,
        largest_move_A: float,
    ):
        self.dynamics, self.beads, self.seeds = dynamics, beads, list(seeds)
        self._temperatures, self._n_rungs = temperatures_K, n_rungs
        self._period, self._dtype = exchange_every, frame_dtype
        self._largest_move = largest_move_A
        self._streams = RandomStreams(seeds, n_rungs, temperatures_K.device)
        self.exchange = ReplicaExchange(temperatures_K, n_rungs)
        self.point: PhasePoint | None = None
        self.n_steps = 0

    def start(self, beads: Tensor) -> None:
        """Begin at positions (R, n, 3) in Å with Maxwell velocities; random numbers go on."""
        self.n_steps, self.exchange = 0, ReplicaExchange(self._temperatures, self._n_rungs)
        beads = beads.to(self._temperatures.device, torch.float64, copy=True)
        with one_thread(), torch.no_grad():
            self.dynamics.check(beads)
            normals = self._streams.normals(1, beads.shape[1])
            self.point = self.dynamics.at(beads, self.dynamics.maxwell(normals[0]))

    def blocks(self, n_steps: int, every: int) -> Iterator[BeadFrames]:
        """Advance, and yield saved frames block by block.

        Parameters
        ----------
        n_steps
            Number of steps, a multiple of `every`.
        every
            Steps between saved frames; a block ends at one of them where it can.

        Raises
        ------
        ExplodedError
            After the last good frame was yielded; the replicas stand there, too.
        """
        longest = max(1, min(_BLOCK_STEPS, _BLOCK_NUMBERS // self.point.beads.numel()))
        done = 0
        while True:
            to_saved = (done // every + max(longest // every, 1)) * every
            length = min(done + longest, to_saved, n_steps) - done
            saves = [k for k in range(1, length + 1) if (done + k) % every == 0]
            before = self.state_dict()
            frames, moves = self.advance(length, saves)
            unsound = np.argwhere(~(moves <= self._largest_move))  # NaN is unsound, too
            if len(unsound):
                good, replica = unsound[0].tolist()
                self.load_state_dict(before)
                yield self.advance(good, sorted({k for k in saves if k < good} | {good}))[0]
                raise self._explosion(replica)
            yield frames
            done += length
            if done == n_steps:
                return

    def _explosion(self, replica: int) -> ExplodedError:
        """Look one step ahead from the last good one, and stay here."""
        here = self.state_dict()
        _, moves = self.advance(1, ())
        with one_thread(), torch.no_grad():
            there = self.dynamics.at(self.point.beads, self.point.velocities)
        forces = torch.linalg.vector_norm(there.forces[replica], dim=-1)
        bead = int(forces.argmax())  # NaN counts as the largest
        self.load_state_dict(here)
        return ExplodedError(
            replica=replica,
            step=self.n_steps + 1,
            temperature_K=float(self._temperatures[replica]),
            move_A=float(moves[0, replica]),
            force_eV_A=float(forces[bead]),
            bead=bead,
            name=self.beads.names[bead],
            last_good=here["point"]["beads"].numpy(),
        )

    def advance(self, n_steps: int, saves: Collection[int]) -> tuple[BeadFrames, np.ndarray]:
        """Run a block of steps.

        Parameters
        ----------
        n_steps
            Length of the block.
        saves
            After which of its steps to save a frame, ascending; 0: before the first one.

        Returns
        -------
        tuple[BeadFrames, np.ndarray]
            The saved frames, and the furthest that a bead went along an axis in each step, in Å,
            shape (n_steps, R).
        """
        point, dynamics, period, first = self.point, self.dynamics, self._period, self.n_steps
        records = [self._record()] if 0 in saves else []
        with one_thread(), torch.no_grad():
            stirring = dynamics.stirring(self._streams.normals(n_steps, point.beads.shape[1]))
            n_attempts = (first + n_steps) // period - first // period if period else 0
            attempts = iter(self._streams.log_uniforms(n_attempts))
            speeds = stirring.new_empty(n_steps, len(self.seeds))
            for k, push in enumerate(stirring.unbind(0), start=1):
                dynamics.step(point, push)
                number = first + k
                if period and number % period == 0:
                    self.exchange.attempt(number // period, point, dynamics, next(attempts))
                if k in saves:
                    records.append(self._record())
                self._hold_exploded(torch.amax(point.velocities.abs(), (1, 2), out=speeds[k - 1]))
        self.n_steps = first + n_steps
        steps = first + np.array(sorted(saves), dtype=np.int64)
        return self._frames(records, steps), (speeds * dynamics.timestep).cpu().numpy()

    def _hold_exploded(self, speeds: Tensor) -> None:
        """Stop replicas that are too fast, speeds (R,): they wait for the end of the block.

        The host doesn't know of them before. Further off, they could crash a neighbour search.
        """
        point = self.point
        too_fast = (speeds <= self._largest_move / self.dynamics.timestep).logical_not()
        point.velocities.masked_fill_(too_fast[:, None, None], 0.0)
        point.forces = point.forces.masked_fill(too_fast[:, None, None], 0.0)

    def _record(self) -> _Record:
        point = self.point
        return _Record(
            point.beads.to(self._dtype, copy=True),
            point.energies,
            point.restraint_energies,
            self.exchange.walkers,
        )

    def _frames(self, records: Sequence[_Record], steps: np.ndarray) -> BeadFrames:
        """Bring records to the host."""
        if records:
            columns = [torch.stack(column) for column in zip(*records, strict=True)]
        else:
            columns = [value[None][:0] for value in self._record()]
        columns = [column.cpu().numpy() for column in columns]
        return BeadFrames(
            **dict(zip(_Record._fields, columns, strict=True)),
            steps=steps,
            temperatures_K=self._temperatures.cpu().numpy(),
            timestep_fs=self.dynamics.timestep_fs,
            box=self.dynamics.box if self.dynamics.box is None else self.dynamics.box.cpu().numpy(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run continues from: plain numbers and tensors on the CPU."""
        point = {field.name: getattr(self.point, field.name) for field in fields(PhasePoint)}
        return {
            "seeds": list(self.seeds),
            "n_steps": self.n_steps,
            "streams": self._streams.state_dict(),
            "exchange": self.exchange.state_dict(),
            "point": {name: value.to("cpu", copy=True) for name, value in point.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.n_steps = int(state["n_steps"])
        self._streams.load_state_dict(state["streams"])
        self.exchange.load_state_dict(state["exchange"])
        device = self._temperatures.device
        self.point = PhasePoint(
            **{name: value.to(device, copy=True) for name, value in state["point"].items()}
        )
