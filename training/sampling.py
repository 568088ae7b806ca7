"""Bead ensembles: replicas of the bead system under ASE's drivers, in resumable chunks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.md import MolecularDynamics
from MDAnalysis.lib.formats.libdcd import DCDFile

from ccg_ase.calculator import CGCalculator
from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy

from .reference import write_npz
from .stages import write_text

Driver = Literal["LangevinBAOAB", "Langevin"]
_AKMA_TIME_FS = 48.88821  # the unit of time in a DCD header


def ase_bead_dynamics(
    force_field: ForceField,
    beads: np.ndarray,
    directory: str | os.PathLike[str],
    *,
    n_steps: int,
    save_every: int,
    driver: Driver = "LangevinBAOAB",
    timestep_fs: float = 4.0,
    friction_per_ps: float = 1.0,
    temperature_K: float | None = None,
    seed: int = 0,
    saves_per_chunk: int = 50,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> np.ndarray:
    """Run replicas of the bead system side by side under an ASE driver.

    The run goes in chunks. A chunk is a pure function of the state it starts from, the seed and
    its number, and its end is stored, so calling again with the same arguments resumes an
    interrupted run to the same frames, and returns at once after a finished one. Every replica is
    centred at the start of a chunk and in every stored frame: the origin carries no information
    and a drifting one costs digits.

    Parameters
    ----------
    force_field
        The bead potential.
    beads
        One start per replica, (R, n_beads, 3), Å. Momenta are drawn afresh.
    directory
        Where chunks, settings and at the end ``beads.dcd`` go. The DCD has one replica after the
        other; MDAnalysis reads it with any topology of n_beads sites.
    n_steps, save_every
        Steps per replica and steps between stored frames; the latter divides the former.
    driver, timestep_fs, friction_per_ps
        ASE's `LangevinBAOAB` or `Langevin`, and their parameters.
    temperature_K
        Default: the force field's; no other is allowed.
    seed
        Of momenta and noise.
    saves_per_chunk
        Frames per chunk, the loss at most when interrupted.
    progress
        Called after every chunk with steps done, steps in all, and `temperature_K` (kinetic) and
        `energy_eV` (mean per replica).

    Returns
    -------
    ndarray
        Frames after every `save_every` steps, (S, R, n_beads, 3), Å, float32.

    Raises
    ------
    ValueError
        If the arguments don't fit, or the directory holds a run with other arguments.
    """
    beads = np.array(beads, dtype=np.float64)
    if beads.ndim != 3 or beads.shape[1:] != (force_field.cg_map.n_beads, 3):
        raise ValueError(
            f"beads must be (replicas, {force_field.cg_map.n_beads}, 3), got {beads.shape}"
        )
    if driver not in _DRIVERS:
        raise ValueError(f"driver must be one of {sorted(_DRIVERS)}, got {driver!r}")
    if save_every < 1 or n_steps < save_every or n_steps % save_every:
        raise ValueError(f"save_every={save_every} must divide n_steps={n_steps}")
    temperature_K = force_field.temperature_K if temperature_K is None else temperature_K
    calculator = CGCalculator(force_field, replicas=len(beads), device=force_field.device)
    calculator.check_temperature(temperature_K)
    settings = {
        "driver": driver,
        "timestep_fs": timestep_fs,
        "friction_per_ps": friction_per_ps,
        "temperature_K": temperature_K,
        "n_steps": n_steps,
        "save_every": save_every,
        "saves_per_chunk": saves_per_chunk,
        "seed": seed,
        "beads": start_digest(beads),
        "force_field": calculator.todict()["sha256"],
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    check_settings(directory / "settings.json", settings)

    positions, momenta = beads, None
    frames, n_saves = [], n_steps // save_every
    for chunk, first in enumerate(range(0, n_saves, saves_per_chunk)):
        path = directory / f"chunk_{chunk:05d}.npz"
        if not path.exists():
            rng = np.random.default_rng([seed, chunk])
            atoms = _replicas(calculator, positions)
            atoms.set_momenta(_thermal(atoms, temperature_K, rng) if momenta is None else momenta)
            friction = friction_per_ps / (1e3 * units.fs)
            dynamics = _DRIVERS[driver](atoms, timestep_fs * units.fs, temperature_K, friction, rng)
            n_here = min(saves_per_chunk, n_saves - first)
            write_npz(path, _run(dynamics, n_here, save_every, len(beads)))
        with np.load(path) as stored:
            positions, momenta = stored["positions"], stored["momenta"]
            frames.append(stored["frames"])
            metrics = {key: float(stored[key]) for key in ("temperature_K", "energy_eV")}
        if progress is not None:
            progress((first + len(frames[-1])) * save_every, n_steps, metrics)
    trajectory = np.concatenate(frames)
    if not (directory / "beads.dcd").exists():
        write_dcd(directory / "beads.dcd", trajectory, timestep_fs * save_every)
    return trajectory


def _run(dynamics: MolecularDynamics, n_saves: int, save_every: int, n_replicas: int) -> dict:
    """Advance by one chunk: its frames, the state at its end, and two figures to watch."""
    atoms, frames = dynamics.atoms, []
    for _ in range(n_saves):
        dynamics.run(save_every)
        frames.append(_centred(atoms.positions.reshape(n_replicas, -1, 3)))
    return {
        "frames": np.array(frames, dtype=np.float32),
        "positions": frames[-1],
        "momenta": atoms.get_momenta(),
        "temperature_K": atoms.get_temperature(),
        "energy_eV": atoms.get_potential_energy() / n_replicas,
    }


def _baoab(atoms, timestep, temperature_K, friction, rng) -> MolecularDynamics:
    return LangevinBAOAB(atoms, timestep, temperature_K=temperature_K, T_tau=1 / friction, rng=rng)


def _langevin(atoms, timestep, temperature_K, friction, rng) -> MolecularDynamics:
    return Langevin(
        atoms, timestep, temperature_K=temperature_K, friction=friction, fixcm=False, rng=rng
    )


_DRIVERS = {"LangevinBAOAB": _baoab, "Langevin": _langevin}


def _replicas(calculator: CGCalculator, positions: np.ndarray) -> Atoms:
    """All replicas (R, n_beads, 3) as the sites of one Atoms object."""
    n_replicas, n_beads = positions.shape[:2]
    return Atoms(
        numbers=np.zeros(n_replicas * n_beads, int),
        positions=_centred(positions).reshape(-1, 3),
        masses=np.tile(calculator.cg_map.beads.masses, n_replicas),
        calculator=calculator,
    )


def _thermal(atoms: Atoms, temperature_K: float, rng: np.random.Generator) -> np.ndarray:
    widths = np.sqrt(thermal_energy(temperature_K) * atoms.get_masses())
    return widths[:, None] * rng.normal(size=(len(atoms), 3))


def _centred(positions: np.ndarray) -> np.ndarray:
    return positions - positions.mean(-2, keepdims=True)


def start_digest(beads: np.ndarray) -> str:
    """Return a hash of the starts of a run, for its settings."""
    return hashlib.sha256(np.ascontiguousarray(beads, dtype=np.float64).tobytes()).hexdigest()


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run, or compare them with those that are there.

    Raises
    ------
    ValueError
        If the directory holds a run with other arguments; they are named.
    """
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1))
        return
    before = json.loads(path.read_text())
    other = [
        f"{key}: {before.get(key)} -> {value}"
        for key, value in settings.items()
        if before.get(key) != value
    ]
    if other:
        raise ValueError(
            f"{path.parent} holds a run with other arguments ({'; '.join(other)}); choose an "
            "empty directory, or delete this one"
        )


def write_dcd(path: str | os.PathLike[str], frames: np.ndarray, interval_fs: float) -> None:
    """Write frames (S, R, n_beads, 3) in Å as one DCD trajectory, replica after replica."""
    partial = Path(path).with_suffix(".partial")
    with DCDFile(str(partial), "w") as file:
        file.write_header(
            remarks="ccg beads, one replica after the other",
            natoms=frames.shape[2],
            istart=0,
            nsavc=1,
            delta=interval_fs / _AKMA_TIME_FS,
            is_periodic=False,
        )
        for replica in np.moveaxis(frames, 1, 0):
            for frame in replica:
                file.write(np.ascontiguousarray(frame, dtype=np.float32))
    os.replace(partial, path)
