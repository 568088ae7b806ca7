"""Bead ensembles by replica exchange, in resumable chunks: barriers of F(s) cost nothing here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ccg_ase.forcefield import ForceField
from ccg_ase.langevin import BatchedLangevin

from .reference import read_npz, write_npz
from .sampling import check_settings, start_digest, write_dcd


def exchange_bead_dynamics(
    force_field: ForceField,
    beads: np.ndarray,
    directory: str | os.PathLike[str],
    *,
    n_steps: int,
    save_every: int,
    hot_temperature_K: float,
    n_rungs: int,
    exchange_every: int = 50,
    timestep_fs: float = 4.0,
    friction_per_ps: float = 1.0,
    seed: int = 0,
    saves_per_chunk: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run ladders of replicas from the force field's temperature up to a hotter one.

    The lowest rung is the ensemble of the force field. The others, which use the same F(s), are no
    ensemble of anything: they carry walkers over barriers, and show where the force field leads to.
    Calling again with the same arguments continues an interrupted run to the same frames.

    Parameters
    ----------
    force_field
        The bead potential.
    beads
        One start per replica, (R, n_beads, 3), Å; R is a multiple of `n_rungs`.
    directory
        Where chunks, settings and at the end ``beads.dcd`` (lowest rung, one ladder after the
        other) and ``hot.dcd`` (the others) go.
    n_steps, save_every
        Steps per replica and steps between stored frames; the latter divides the former.
    hot_temperature_K, n_rungs, exchange_every
        Top of the ladder, its number of temperatures (of equal ratio), steps between exchanges.
    timestep_fs, friction_per_ps, seed
        As for `BatchedLangevin`.
    saves_per_chunk
        Frames per chunk, the loss at most when interrupted.
    progress
        Called after every chunk with steps done and in all.

    Returns
    -------
    frames, acceptance
        Of the lowest rung, (S, R / n_rungs, n_beads, 3), Å, float32; and of exchanges between
        neighbouring rungs in the last chunk, (n_rungs - 1,).

    Raises
    ------
    ValueError
        If the arguments don't fit, or the directory holds a run with other arguments.
    """
    if save_every < 1 or n_steps < save_every or n_steps % save_every:
        raise ValueError(f"save_every={save_every} must divide n_steps={n_steps}")
    lowest = force_field.temperature_K
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dynamics = BatchedLangevin(
        force_field,
        timestep_fs=timestep_fs,
        friction_per_ps=friction_per_ps,
        seed=seed,
        temperatures_K=BatchedLangevin.ladder(lowest, hot_temperature_K, n_rungs),
        exchange_every=exchange_every,
        device=force_field.device,
    )
    settings = dynamics.settings | {
        "n_steps": n_steps,
        "save_every": save_every,
        "saves_per_chunk": saves_per_chunk,
        "seed": seed,
        "beads": start_digest(beads),
    }
    check_settings(directory / "settings.json", settings)
    starts: np.ndarray | None = beads
    n_saves, chunks = n_steps // save_every, []
    for chunk, first in enumerate(range(0, n_saves, saves_per_chunk)):
        path, restart = (directory / f"chunk_{chunk:05d}{end}" for end in (".npz", ".restart"))
        n_here = min(saves_per_chunk, n_saves - first)
        if not path.exists():
            if chunk:
                dynamics.load_restart(directory / f"chunk_{chunk - 1:05d}.restart")
                starts = None
            frames = dynamics.run(starts, n_here * save_every, save_every).beads
            dynamics.save_restart(restart)
            acceptance = dynamics.exchange_report().acceptance
            write_npz(path, {"frames": frames.astype(np.float32), "acceptance": acceptance})
        chunks.append(read_npz(path))
        if progress is not None:
            progress((first + n_here) * save_every, n_steps)
    frames = np.concatenate([chunk["frames"] for chunk in chunks])
    rung = np.arange(frames.shape[1]) % n_rungs
    for name, chosen in (("hot.dcd", rung > 0), ("beads.dcd", rung == 0)):
        if not (directory / name).exists():
            write_dcd(directory / name, frames[:, chosen], timestep_fs * save_every)
    return frames[:, rung == 0], chunks[-1]["acceptance"]
