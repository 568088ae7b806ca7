"""Molecular dynamics and metadynamics of alanine dipeptide: F(φ, ψ) against energy calls.

Steps of 1 fs, flexible molecules with their own masses, OpenMM's Reference platform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openmm
import simulate
import surface
from measures import PHI_PSI
from openmm import app, unit
from openmm.app.metadynamics import BiasVariable, Metadynamics
from scipy.interpolate import RegularGridInterpolator
from scipy.special import logsumexp
from surface import Curve

from ccg_ase.torsion_map import dihedral_angles
from ccg_ase.units import thermal_energy
from ccg_training.metrics import torsion_centres
from ccg_training.reference import ReferenceData, read_npz, write_npz

TEMPERATURE_K = 300.0
KT_KJ_MOL = thermal_energy(TEMPERATURE_K) / simulate.KJ_PER_MOL
BINS = 24
CHUNK, DEPOSIT, FRAME = 100_000, 500, 50  # steps
BIAS_FACTOR, HEIGHT_KJ_MOL = 10.0, 1.0
GRID = 73  # points of the bias from -π to π, both included
FINE = torsion_centres(3 * BINS)
STORED_EQUILIBRATION = 50_000  # steps before the first frame of `simulate.py alanine`


def checkpoints(calls: float) -> list[int]:
    """Return 2·10⁴, 5·10⁴, 10⁵ ... up to so many calls."""
    return [n for k in range(4, 9) for m in (1, 2, 5) if 10**4 < (n := m * 10**k) <= calls]


def stored_dynamics(files: Sequence[Path], least: int = STORED_EQUILIBRATION) -> Curve:
    """Return the curve of dynamics that `simulate.py alanine` stored, a seed for each walker.

    It begins after more than `least` calls, and ends with the shortest walker.
    """
    angles, steps = [], []
    for frames in map(ReferenceData.load, files):
        for walker in np.unique(frames.walker):
            own = frames.positions[frames.walker == walker]
            angles.append(dihedral_angles(own, np.array(PHI_PSI)))
            steps.append(round(1000 * (frames.time_ps[1] - frames.time_ps[0])))
    shortest = min(len(a) * step for a, step in zip(angles, steps, strict=True))
    calls = [n for n in checkpoints(shortest) if n > least]
    calls.append(shortest + STORED_EQUILIBRATION)
    surfaces = [
        [surface.of_angles(own[: (n - STORED_EQUILIBRATION) // step], BINS) for n in calls]
        for own, step in zip(angles, steps, strict=True)
    ]
    return Curve(np.array(calls), np.array(surfaces))


# -------------------------------------------------------------------------------- metadynamics


def run_metadynamics(
    folder: Path, files: tuple[Path, Path], calls: float, seeds: Sequence[int], width_rad: float
) -> None:
    """Run seeds side by side; write F from the bias, and F from frames, after every checkpoint."""
    stops = checkpoints(calls)
    of_seeds = zip(*(metadynamics(folder, stops, seed, width_rad) for seed in seeds), strict=True)
    found: list[list[np.ndarray]] = [[], []]
    for stop, surfaces in zip(stops, of_seeds, strict=True):
        for kept, own, file in zip(found, zip(*surfaces, strict=True), files, strict=True):
            kept.append(np.array(own))
            Curve(np.array(stops[: len(kept)]), np.stack(kept, axis=1)).save(file)
        print(f"metadynamics: {stop} calls of each seed", flush=True)


def metadynamics(
    folder: Path, stops: Sequence[int], seed: int, width_rad: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield F from the bias and F from reweighted frames, at each number of calls.

    Chunks that `folder` holds aren't run again.
    """
    ends = sorted({*stops, *range(CHUNK, stops[-1] + 1, CHUNK)})
    chunks: list[dict[str, np.ndarray]] = []
    for start, end in pairwise([0, *ends]):
        file = folder / f"seed{seed}_{end:09d}.npz"
        if not file.is_file():
            last = chunks[-1] if chunks else {}
            rng = np.random.default_rng([seed, start])
            write_npz(file, _chunk(last, end - start, width_rad, rng))
        chunks.append(read_npz(file))
        if end in stops:
            on_grid = _interpolator(_in_kT(chunks[-1]["bias_kJ_mol"]))
            log_density = on_grid(np.stack(np.meshgrid(FINE, FINE, indexing="ij"), -1))
            angles, weights = (
                np.concatenate([chunk[key] for chunk in chunks]) for key in ("angles", "log_weight")
            )
            yield (
                surface.of_density(log_density * BIAS_FACTOR / (BIAS_FACTOR - 1), BINS),
                surface.of_angles(angles, BINS, weights),
            )


def _chunk(
    last: dict[str, np.ndarray], steps: int, width_rad: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Continue well-tempered metadynamics on φ and ψ by OpenMM; a pure function.

    Frames have the weights exp(V(s, t)/kT - c(t)) of Tiwary and Parrinello, J. Phys. Chem. B 119,
    736 (2015).
    """
    system = simulate.alanine_potential().system
    variables = []
    for row in PHI_PSI:
        torsion = openmm.CustomTorsionForce("theta")
        torsion.addTorsion(*row)
        variables.append(BiasVariable(torsion, -np.pi, np.pi, width_rad, True, GRID))
    with TemporaryDirectory() as biases:  # OpenMM's way to continue: it adds the files there
        if last:
            np.save(Path(biases) / "bias_0_0.npy", last["bias_kJ_mol"])
        meta = Metadynamics(
            system,
            variables,
            TEMPERATURE_K,
            BIAS_FACTOR,
            HEIGHT_KJ_MOL,
            frequency=DEPOSIT,
            saveFrequency=2 * steps,
            biasDir=biases,
        )
    pdb = app.PDBFile(str(simulate.ALANINE))
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE_K, 2.0, 0.001)
    integrator.setRandomNumberSeed(int(rng.integers(1, 2**31)))
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(pdb.topology, system, integrator, platform)
    context = simulation.context
    context.setPositions(last["positions_nm"] if last else pdb.positions)
    if last:
        context.setVelocities(last["velocities"])
    else:
        context.setVelocitiesToTemperature(TEMPERATURE_K, int(rng.integers(1, 2**31)))
    angles, log_weights = [], []
    for _ in range(steps // DEPOSIT):
        bias = _in_kT(_bias(meta))
        frames = []
        for _ in range(DEPOSIT // FRAME):
            meta.step(simulation, FRAME)
            frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
        angles.append(dihedral_angles(np.array(frames), np.array(PHI_PSI)))
        log_weights.append(_interpolator(bias)(angles[-1]) - _offset(bias))
    state = context.getState(positions=True, velocities=True)
    return {
        "angles": np.concatenate(angles),
        "log_weight": np.concatenate(log_weights),
        "bias_kJ_mol": _bias(meta),
        "positions_nm": np.array(state.getPositions(asNumpy=True)._value),
        "velocities": np.array(state.getVelocities(asNumpy=True)._value),
    }


def _bias(meta: Metadynamics) -> np.ndarray:
    """Return the bias in kJ/mol, axes ψ and φ as OpenMM has them, (GRID, GRID)."""
    free_energy = meta.getFreeEnergy().value_in_unit(unit.kilojoules_per_mole)
    return -free_energy * (BIAS_FACTOR - 1) / BIAS_FACTOR


def _in_kT(bias_kJ_mol: np.ndarray) -> np.ndarray:
    """Return the bias in kT, axes φ and ψ."""
    return bias_kJ_mol.T / KT_KJ_MOL


def _interpolator(bias: np.ndarray) -> RegularGridInterpolator:
    axis = np.linspace(-np.pi, np.pi, GRID)
    return RegularGridInterpolator((axis, axis), bias)


def _offset(bias: np.ndarray) -> float:
    """Return c(t) in kT."""
    inner = bias[:-1, :-1]  # both ends of an axis are one point
    return float(
        logsumexp(inner * BIAS_FACTOR / (BIAS_FACTOR - 1)) - logsumexp(inner / (BIAS_FACTOR - 1))
    )
