"""Molecular dynamics and metadynamics of alanine dipeptide: F(φ, ψ) against energy calls.

Steps of 1 fs, friction 2/ps, flexible molecules with their own masses, OpenMM's Reference platform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

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
from ccg_training.reference import ReferenceData

TEMPERATURE_K = 300.0
KT_KJ_MOL = thermal_energy(TEMPERATURE_K) / simulate.KJ_PER_MOL
BINS = 24
EQUILIBRATION = 10_000  # steps from the start structure: counted, not used
FRAME = 50  # steps
DEPOSIT = 500  # steps
BIAS_FACTOR, HEIGHT_KJ_MOL = 10.0, 1.0
GRID = 73  # points of the bias from -π to π, both included


def checkpoints(calls: float) -> np.ndarray:
    """Return 2·10⁴, 5·10⁴, 10⁵ ... up to so many calls."""
    steps = np.array([m * 10**k for k in range(4, 9) for m in (1, 2, 5)])
    return steps[(steps > EQUILIBRATION) & (steps <= calls)]


def run(
    method: Callable[[np.ndarray, int], Iterator[tuple[np.ndarray, ...]]],
    files: tuple[Path, ...],
    calls: float,
    seeds: list[int],
) -> None:
    """Run seeds side by side, and write a curve of each surface that a method yields.

    The files are written after every checkpoint: a run that was stopped leaves what it found.
    """
    stops = checkpoints(calls)
    found = zip(*(method(stops, seed) for seed in seeds), strict=True)
    kept: list[tuple] = []
    for surfaces in found:
        kept.append(surfaces)
        for k, file in enumerate(files):
            each = [[of_seed[k] for of_seed in stop] for stop in kept]
            Curve(stops[: len(kept)], np.swapaxes(each, 0, 1)).save(file)
        print(f"{files[0].stem}: {stops[len(kept) - 1]} calls", flush=True)


def molecular_dynamics(stops: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield F at each number of calls, from all frames after equilibration."""
    simulation = _simulation(simulate.alanine_potential().system, seed)
    simulation.step(EQUILIBRATION)
    angles: list[np.ndarray] = []
    for before, after in pairwise([EQUILIBRATION, *stops]):
        angles.append(_frames(simulation, (after - before) // FRAME, simulation.step))
        yield (surface.of_angles(np.concatenate(angles), BINS),)


def stored(file: Path, target: Path) -> None:
    """Write the curve of dynamics that `simulate.py alanine` stored, steps of 1 fs."""
    frames = ReferenceData.load(file)
    step = round(1000 * (frames.time_ps[1] - frames.time_ps[0]))
    walkers = [frames.positions[frames.walker == w] for w in np.unique(frames.walker)]
    angles = [dihedral_angles(own, np.array(PHI_PSI)) for own in walkers]
    stops = checkpoints(step * len(angles[0]))
    stops = np.append(stops[stops >= 10**6], step * len(angles[0]))
    each = [[surface.of_angles(own[: n // step], BINS) for n in stops] for own in angles]
    Curve(stops, np.array(each)).save(target)


def metadynamics(
    stops: np.ndarray, seed: int, *, width_rad: float
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield F from the bias and F from reweighted frames, at each number of calls.

    Well-tempered metadynamics on φ and ψ by OpenMM. Frames have weights exp(V(s, t)/kT - c(t)):
    Tiwary and Parrinello, J. Phys. Chem. B 119, 736 (2015).
    """
    system = simulate.alanine_potential().system
    variables = []
    for row in PHI_PSI:
        torsion = openmm.CustomTorsionForce("theta")
        torsion.addTorsion(*row)
        variables.append(BiasVariable(torsion, -np.pi, np.pi, width_rad, True, GRID))
    meta = Metadynamics(
        system, variables, TEMPERATURE_K, BIAS_FACTOR, HEIGHT_KJ_MOL, frequency=DEPOSIT
    )
    simulation = _simulation(system, seed)
    simulation.step(EQUILIBRATION)
    angles, log_weights = [], []
    for before, after in pairwise([EQUILIBRATION, *stops]):
        for _ in range((after - before) // DEPOSIT):
            bias = _bias_kT(meta)
            own = _frames(simulation, DEPOSIT // FRAME, lambda steps: meta.step(simulation, steps))
            angles.append(own)
            log_weights.append(_on_grid(bias)(own) - _offset(bias))
        fine = (np.arange(3 * BINS) + 0.5) * (2 * np.pi / (3 * BINS)) - np.pi
        log_density = _on_grid(_bias_kT(meta))(np.stack(np.meshgrid(fine, fine, indexing="ij"), -1))
        yield (
            surface.of_density(log_density * BIAS_FACTOR / (BIAS_FACTOR - 1), BINS),
            surface.of_angles(np.concatenate(angles), BINS, np.concatenate(log_weights)),
        )


def _bias_kT(meta: Metadynamics) -> np.ndarray:
    """Return the bias, axes φ and ψ; OpenMM's axes are in reverse order."""
    free_energy = meta.getFreeEnergy().value_in_unit(unit.kilojoules_per_mole)
    return -free_energy.T * (BIAS_FACTOR - 1) / BIAS_FACTOR / KT_KJ_MOL


def _on_grid(bias: np.ndarray) -> RegularGridInterpolator:
    axis = np.linspace(-np.pi, np.pi, GRID)
    return RegularGridInterpolator((axis, axis), bias)


def _offset(bias: np.ndarray) -> float:
    """Return c(t) in kT."""
    inner = bias[:-1, :-1]  # both ends of an axis are one point
    return float(
        logsumexp(inner * BIAS_FACTOR / (BIAS_FACTOR - 1)) - logsumexp(inner / (BIAS_FACTOR - 1))
    )


def _simulation(system: openmm.System, seed: int) -> app.Simulation:
    pdb = app.PDBFile(str(simulate.ALANINE))
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE_K, 2.0, 0.001)
    integrator.setRandomNumberSeed(seed)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(pdb.topology, system, integrator, platform)
    simulation.context.setPositions(pdb.positions)
    simulation.context.setVelocitiesToTemperature(TEMPERATURE_K, seed)
    return simulation


def _frames(simulation: app.Simulation, count: int, step: Callable[[int], None]) -> np.ndarray:
    """Run, and return φ, ψ of so many frames, (count, 2)."""
    frames = []
    for _ in range(count):
        step(FRAME)
        state = simulation.context.getState(positions=True)
        frames.append(state.getPositions(asNumpy=True)._value)
    return dihedral_angles(np.array(frames), np.array(PHI_PSI))
