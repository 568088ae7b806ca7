"""Short dynamics restrained at given coarse states: p(x|s) where no flow can be trusted.

A harmonic restraint on s = M x depends on s alone and therefore leaves p(x|s) as it is
(theory.md 5.5): every stored frame is a draw from the unbiased conditional density at its own s,
which lies near the target. What fine coordinates slower than the dynamics do is not healed by this:
they keep the populations of the starts.

A state is a pure function of (plan, index of the state), and a few states at a time are written
atomically: a run that is killed continues to the same bits, whatever the number of workers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .reference import ReferenceData, ReferenceDataError, Tick, read_npz, write_npz
from .restrained_state import Plan, run_state
from .restraint import default_stiffness
from .superposition import superposing_rotation
from .workers import Report, run_workers

if TYPE_CHECKING:
    from ccg_mda.potential import Potential


class RestrainedFrames(NamedTuple):
    """What `restrained_frames` returns.

    Attributes
    ----------
    data
        Frames with unbiased energies and forces, state after state: `walker` is the index of the
        state, `time_ps` counts from the end of its equilibration. None if all states failed.
    n_calls
        Energy calls: every step that was asked for, and one for each stored frame.
    failed
        (S,) bool: states that exploded, ended far from their target or changed their handedness;
        they have no frames.
    """

    data: ReferenceData | None
    n_calls: int
    failed: np.ndarray


def restrained_frames(
    potential: Potential,
    cg_map: CGMap | TorsionMap,
    targets: np.ndarray,
    starts: np.ndarray,
    temperature_K: float,
    directory: Path,
    *,
    n_steps: int,
    save_every: int,
    steering_steps: int,
    equilibration_steps: int,
    timestep_fs: float = 1.0,
    friction_per_ps: float = 5.0,
    stiffness: float | None = None,
    workers: int = 1,
    seed: int = 0,
    tick: Tick | None = None,
) -> RestrainedFrames:
    """Run Langevin dynamics at coarse states, each from an atomistic start near it.

    The restraint's centre moves from the start's own s to the target, torsions the short way round;
    then the state is equilibrated, then frames are stored. Starts are first laid rigidly on their
    target, so that no rotation has to be pulled through. They are not minimised.

    Parameters
    ----------
    potential
        An `OpenMMPotential`: its System and platform.
    cg_map
        Any linear map, or torsions.
    targets
        (S, n_beads, 3) in Å, or (S, n_torsions) in rad.
    starts
        (S, n_atoms, 3) in Å, e.g. the stored frame or the reconstruction nearest to each target.
    temperature_K
        Of the frames.
    directory
        Holds the chunks; run again with the same arguments to continue after an interruption.
    n_steps, save_every
        Steps per state during which frames are stored, and steps between frames.
    steering_steps, equilibration_steps
        Steps per state before that.
    stiffness
        In eV/Å² (eV/rad²). Default: beads spread by 0.1 Å, torsions by 5°.
    workers
        Processes with one thread each; 1 works in this one. They don't change the result.
    tick
        Called with (states done, states in all).

    Raises
    ------
    ReferenceDataError
        If the potential holds no OpenMM System, shapes don't fit, a position isn't finite or
        `save_every` doesn't divide `n_steps`.
    """
    import openmm

    from ccg_mda.potential import OpenMMPotential

    if not isinstance(potential, OpenMMPotential):
        raise ReferenceDataError(
            f"restrained dynamics need an OpenMM System, {type(potential).__name__} holds none: "
            "give an OpenMMPotential (OpenMMPotential.from_xml reads a System of your own)"
        )
    targets, starts = np.array(targets, float), np.array(starts, float)
    _check(cg_map, targets, starts, n_steps, save_every)
    if not isinstance(cg_map, TorsionMap):
        starts = _laid_on(cg_map, starts, targets)
    plan = Plan(
        system_xml=openmm.XmlSerializer.serialize(potential.system),
        platform=potential.platform,
        cg_map=cg_map,
        targets=targets,
        starts=starts,
        temperature_K=temperature_K,
        timestep_fs=timestep_fs,
        friction_per_ps=friction_per_ps,
        stiffness=default_stiffness(cg_map, temperature_K) if stiffness is None else stiffness,
        steering_steps=steering_steps,
        equilibration_steps=equilibration_steps,
        n_steps=n_steps,
        save_every=save_every,
        seed=seed,
    )
    directory.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        _run_chunks(plan, directory, 1, 0, lambda done: tick(done, len(targets)) if tick else None)
    else:
        work = partial(_run_chunks, plan, directory, workers)
        run_workers(work, workers, len(targets), tick)
    return _collected(plan, directory)


def _check(
    cg_map: CGMap | TorsionMap,
    targets: np.ndarray,
    starts: np.ndarray,
    n_steps: int,
    save_every: int,
) -> None:
    count = len(targets)
    for name, array, shape in (
        ("targets", targets, cg_map.coarse_shape),
        ("starts", starts, (cg_map.n_atoms, 3)),
    ):
        if not count or array.shape != (count, *shape):
            raise ReferenceDataError(
                f"{name} must have shape (states, {', '.join(map(str, shape))}), one per state; "
                f"got {array.shape}"
            )
        if not np.isfinite(array).all():
            raise ReferenceDataError(f"{name} hold values that are NaN or infinite: leave them out")
    if n_steps < save_every or n_steps % save_every:
        raise ReferenceDataError(
            f"n_steps = {n_steps} must be a multiple of save_every = {save_every}"
        )


def _laid_on(cg_map: CGMap, starts: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Move and turn starts, (S, n_atoms, 3), so that their beads are closest to the targets."""
    beads = cg_map.apply(starts)
    centre, goal = (sites.mean(axis=1, keepdims=True) for sites in (beads, targets))
    turn = superposing_rotation(torch.from_numpy(beads - centre), torch.from_numpy(targets - goal))
    return (starts - centre) @ turn.numpy() + goal


def _run_chunks(plan: Plan, directory: Path, workers: int, worker: int, report: Report) -> None:
    """Run the chunks of a worker that are not there yet."""
    done = 0
    for states, file in plan.chunk_files(directory)[worker::workers]:
        report(done)
        if not file.is_file():
            write_npz(file, _run_chunk(plan, states))
        done += len(states)
    report(done)


def _run_chunk(plan: Plan, states: range) -> dict[str, np.ndarray]:
    """Return the frames of some states, (n_kept, frames, ...), calls and failures, (n_states,)."""
    runs = [run_state(plan, state) for state in states]
    failed = np.array([frames is None for frames, _ in runs])
    arrays = {"calls": np.array([calls for _, calls in runs]), "failed": failed}
    kept = [frames for frames, _ in runs if frames is not None]
    if kept:
        columns = zip(*kept, strict=True)
        names = ("positions", "forces", "energy")
        arrays |= {name: np.array(column) for name, column in zip(names, columns, strict=True)}
    return arrays


def _collected(plan: Plan, directory: Path) -> RestrainedFrames:
    """Put the chunks together."""
    parts = [read_npz(file) for _, file in plan.chunk_files(directory)]
    failed, calls = (np.concatenate([part[name] for part in parts]) for name in ("failed", "calls"))
    kept = np.flatnonzero(~failed)
    data = None
    if len(kept):
        positions, forces, energy = (
            np.concatenate([part[name] for part in parts if name in part])
            for name in ("positions", "forces", "energy")
        )
        per_state = energy.shape[1]
        time_ps = np.arange(1, per_state + 1) * plan.save_every * plan.timestep_fs / 1e3
        data = ReferenceData(
            positions.reshape(-1, *positions.shape[2:]),
            forces.reshape(-1, *forces.shape[2:]),
            energy.ravel(),
            walker=np.repeat(kept, per_state),
            time_ps=np.tile(time_ps, len(kept)),
            biased=True,
        )
    return RestrainedFrames(data, int(calls.sum()), failed)
