"""BatchedLangevin: many replicas in one batch of BAOAB Langevin dynamics."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccg_ase.baoab import BAOAB, Restraint
from ccg_ase.bead_frames import BeadFrames
from ccg_ase.bead_writers import FrameWriter
from ccg_ase.evaluator import Evaluator
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.replica_batch import ReplicaBatch
from ccg_ase.replica_exchange import ExchangeReport, geometric_ladder, rung_temperatures
from ccg_ase.restart import force_field_digest, read_restart, restraint_digest, write_restart
from ccg_ase.run_checks import check_start


class BatchedLangevin:
    """Sample beads, R replicas at a time: free, at several temperatures, restrained, or exchanged.

    BAOAB splitting in float64, see `BAOAB`. Replica k has a random stream of its own: run alone
    with ``seed=[sampler.seeds[k]]``, it follows the same path; with replica exchange the same holds
    for a ladder. Between blocks of up to 128 steps nothing is read back from the device.

    With `temperatures_K` replica r has the temperature of rung r % K. A force field is a free
    energy at its own temperatures (``force_field.temperatures_K``): only rungs within that range
    are physical ensembles. Rungs outside of it use the energy of the nearest trained temperature
    and are of use for crossing barriers alone. A force field trained over a range is evaluated at
    each rung's own temperature.

    Parameters
    ----------
    force_field
        The force field, of which the sampler makes an `Evaluator`; or a ready evaluator, anything
        with its call, `check_apart`, ``force_field``, ``replicas`` and ``device``.
    timestep_fs, friction_per_ps
        Time step in fs and friction coefficient in 1/ps, both positive.
    seed
        One integer, from which every replica's seed follows, or a sequence of them.
    temperature_K
        Temperature of all replicas in K; by default the force field's.
    temperatures_K
        Instead: K temperatures in K, for a number of replicas that is a multiple of K.
    exchange_every
        Steps between attempts to exchange neighbouring temperatures, which then must ascend;
        None: no exchange. Several ladders of K replicas may run side by side.
    restraints
        Callables from positions in Å, float64 (R, n, 3), to energies in eV, shape (R,), e.g. those
        of `ccg_ase.restraints`.
    box
        Cell rows in Å, shape (3, 3) or (R, 3, 3), at constant volume; positions are never wrapped.
    device, dtype, compiled
        Passed to `Evaluator`; frames are returned in `dtype`.
    largest_move_A
        A bead that moves further along an axis within one step has exploded. Thermal moves stay
        below 0.1 Å, and a start with overlaps makes moves of an Å or two, from which a run
        recovers; one that diverges passes any bound within a few steps.

    Raises
    ------
    ValueError
        If parameters contradict one another, or the force field doesn't hold at a temperature.
    """

    def __init__(
        self,
        force_field: ForceField | Evaluator,
        *,
        timestep_fs: float,
        friction_per_ps: float,
        seed: int | Sequence[int],
        temperature_K: float | None = None,
        temperatures_K: Sequence[float] | None = None,
        exchange_every: int | None = None,
        restraints: Sequence[Restraint] = (),
        box: np.ndarray | Tensor | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
        largest_move_A: float = 5.0,
    ):
        if not (timestep_fs > 0 and friction_per_ps > 0):
            raise ValueError("timestep_fs and friction_per_ps must be positive")
        own = isinstance(force_field, ForceField)
        self._ready = None if own else force_field
        self.force_field = force_field if own else force_field.force_field
        self.device = torch.device(device if own else force_field.device)
        self.dtype, self._compiled = dtype, compiled
        self._rungs = rung_temperatures(
            self.force_field, temperature_K, temperatures_K, exchange_every
        )
        self.exchange_every = exchange_every
        self.timestep_fs, self.friction_per_ps = float(timestep_fs), float(friction_per_ps)
        self.largest_move_A = float(largest_move_A)
        self.restraints = tuple(
            restraint.to(self.device) if isinstance(restraint, torch.nn.Module) else restraint
            for restraint in restraints
        )
        self._box = None if box is None else torch.as_tensor(box).to(self.device, torch.float64)
        self.seeds = None if np.isscalar(seed) else [int(s) for s in seed]
        self._root = np.random.SeedSequence(seed) if self.seeds is None else None
        self._batch: ReplicaBatch | None = None

    ladder = staticmethod(geometric_ladder)

    @property
    def cg_map(self) -> CGMap:
        """The map from atoms to these beads."""
        return self.force_field.cg_map

    @property
    def n_steps(self) -> int:
        """Steps done since the last start."""
        return 0 if self._batch is None else self._batch.n_steps

    # ------------------------------------------------------------------ running

    def run(self, beads: np.ndarray | Tensor | None, n_steps: int, every: int = 1) -> BeadFrames:
        """Advance all replicas and return every `every`-th frame. Parameters as in `iterate`."""
        return BeadFrames.join(list(self.iterate(beads, n_steps, every)))

    def write(
        self,
        writers: Sequence[FrameWriter],
        beads: np.ndarray | Tensor | None,
        n_steps: int,
        every: int = 1,
        *,
        restart: str | os.PathLike[str] | None = None,
        restart_every: int = 100_000,
    ) -> None:
        """Advance all replicas and hand every `every`-th frame to writers, keeping none.

        Parameters
        ----------
        writers
            `AseBeadWriter`, `ccg_mda.bead_writer.BeadWriter`, or anything with
            ``write(frames: BeadFrames)``.
        beads, n_steps, every, restart, restart_every
            As in `iterate`.
        """
        for frames in self.iterate(
            beads, n_steps, every, restart=restart, restart_every=restart_every
        ):
            for writer in writers:
                writer.write(frames)

    def iterate(
        self,
        beads: np.ndarray | Tensor | None,
        n_steps: int,
        every: int = 1,
        *,
        restart: str | os.PathLike[str] | None = None,
        restart_every: int = 100_000,
    ) -> Iterator[BeadFrames]:
        """Advance all replicas and yield saved frames block by block: memory stays constant.

        Parameters
        ----------
        beads
            Starting positions in Å, shape (R, n_beads, 3), with fresh Maxwell velocities; None to
            continue from where the last run or a loaded state stopped.
        n_steps
            Number of steps, a multiple of `every`.
        every
            Steps between saved frames.
        restart
            File to write the state to, at the end and about every `restart_every` steps, after the
            frames up to there were taken; `load_restart` continues from it to the same path.
        restart_every
            Steps.

        Raises
        ------
        ExplodedError
            Within a block of an explosion, after the frames before it were yielded; the last of
            these is the last good one, whatever `every`. The sampler stands there, too. The
            restart file stays that of an earlier step.
        ValueError
            If the start or the numbers of steps can't be right.
        """
        if every < 1 or n_steps < 0 or n_steps % every:
            raise ValueError(f"n_steps ({n_steps}) must be a multiple of every ({every})")
        if beads is not None:
            self._start(torch.as_tensor(beads).detach())
        self._started()
        return self._blocks(n_steps, every, restart, restart_every)

    def _blocks(
        self, n_steps: int, every: int, restart: str | os.PathLike[str] | None, restart_every: int
    ) -> Iterator[BeadFrames]:
        first = written = self.n_steps
        for frames in self._batch.blocks(n_steps, every):
            yield frames
            done = self.n_steps - first
            due = self.n_steps - written >= restart_every and done % every == 0
            if restart is not None and (due or done == n_steps):
                self.save_restart(restart)
                written = self.n_steps

    def _start(self, beads: Tensor) -> None:
        check_start(beads, self.cg_map.beads)
        if self.seeds is None:
            self.seeds = self._root.generate_state(len(beads), np.uint64).tolist()
        if len(self.seeds) != len(beads):
            raise ValueError(f"{len(beads)} replicas given, but there are {len(self.seeds)} seeds")
        self._batch = self._batch or self._make_batch()
        self._batch.start(beads)

    def _make_batch(self) -> ReplicaBatch:
        n_replicas, n_rungs = len(self.seeds), len(self._rungs)
        if n_replicas % n_rungs:
            raise ValueError(
                f"{n_replicas} replicas are no multiple of the {n_rungs} temperatures of a ladder"
            )
        if self._box is not None and self._box.shape not in ((3, 3), (n_replicas, 3, 3)):
            raise ValueError(
                f"box must have shape (3, 3) or ({n_replicas}, 3, 3), got {tuple(self._box.shape)}"
            )
        temperatures = torch.from_numpy(np.tile(self._rungs, n_replicas // n_rungs))
        evaluate = self._ready or Evaluator(
            self.force_field,
            n_replicas,
            temperature_K=temperatures.clip(*self.force_field.temperatures_K),
            device=self.device,
            dtype=self.dtype,
            compiled=self._compiled,
        )
        if evaluate.replicas != n_replicas:
            raise ValueError(f"{n_replicas} replicas given to an evaluator of {evaluate.replicas}")
        temperatures = temperatures.to(self.device)
        dynamics = BAOAB(
            evaluate,
            self.restraints,
            masses=self.cg_map.beads.masses,
            temperatures_K=temperatures,
            timestep_fs=self.timestep_fs,
            friction_per_ps=self.friction_per_ps,
            box=self._box,
        )
        return ReplicaBatch(
            dynamics,
            self.cg_map.beads,
            self.seeds,
            temperatures,
            n_rungs=n_rungs,
            exchange_every=self.exchange_every,
            frame_dtype=self.dtype,
            largest_move_A=self.largest_move_A,
        )

    # --------------------------------------------------------------- continuing

    def exchange_report(self) -> ExchangeReport:
        """Return acceptance rates per pair of rungs, and round trips of walkers, since the start.

        Raises
        ------
        ValueError
            Before the first run.
        """
        return self._started().exchange.report()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run continues from: plain numbers and tensors on the CPU."""
        return self._started().state_dict()

    def _started(self) -> ReplicaBatch:
        if self._batch is None or self._batch.point is None:
            raise ValueError("there is no state yet: give starting beads, or load a state")
        return self._batch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with the same force field and settings to the same path."""
        self.seeds = list(state["seeds"])
        self._batch = self._make_batch()
        self._batch.load_state_dict(state)

    @property
    def settings(self) -> dict[str, Any]:
        """What a restart file must agree in: force field, restraints, and all that moves beads."""
        return {
            "force field": force_field_digest(self.force_field),
            "restraints": [restraint_digest(restraint) for restraint in self.restraints],
            "timestep_fs": self.timestep_fs,
            "friction_per_ps": self.friction_per_ps,
            "temperatures_K": self._rungs.tolist(),
            "exchange_every": self.exchange_every,
            "box": None if self._box is None else self._box.tolist(),
            "dtype": str(self.dtype),
        }

    def save_restart(self, path: str | os.PathLike[str]) -> None:
        """Write state and settings to a file in one step."""
        write_restart(path, self.settings, self.state_dict())

    def load_restart(self, path: str | os.PathLike[str]) -> None:
        """Continue from a restart file: the next `run` from None follows the same path.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it isn't a restart file, or was written under other settings; these are named.
        """
        self.load_state_dict(read_restart(path, self.settings))
