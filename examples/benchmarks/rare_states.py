"""Frames of states that a run hardly visited, from short restrained dynamics, and a fit to them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openmm
import torch
from measures import PHI_PSI, unit
from scipy.spatial.transform import Rotation
from systems import System

from ccg_ase.torsion_map import TorsionMap
from ccg_mda.flow import Backmapper
from ccg_training import evaluation
from ccg_training.fit_flow import FlowFrames, FlowLoss, fit_flow, without_free_energy
from ccg_training.reference import ReferenceData


def improve(
    system: System,
    flow: Backmapper,
    data: ReferenceData,
    calls: int,
    seed: int,
    progress: Callable[[int, int, dict[str, float]], None],
) -> None:
    """Fit the flow to short restrained dynamics in each (φ, ψ) bin that has hardly any frames."""
    rng = np.random.default_rng(seed)
    known = FlowFrames(data.positions, np.ones(len(data)), data.forces)
    found = restrained_frames(system, flow, data, calls, rng)
    few = known[rng.choice(len(known), min(len(known), 30_000), replace=False)]
    # The bead force field knows nothing of these states: no term that needs it.
    for loss, steps, rate in (("coordinate_force", 600, 1.5e-3), ("forces", 100, 5e-4)):
        fit_flow(
            flow,
            few.joined(found),
            terms=without_free_energy(FlowLoss.named(loss)),
            steps=steps,
            batch_size=256,
            learning_rate=rate,
            seed=seed + 1,
            progress=progress,
        )


def restrained_frames(
    system: System,
    flow: Backmapper,
    data: ReferenceData,
    calls: int,
    rng: np.random.Generator,
    n_start: int = 32,
    n_frames: int = 40,
) -> FlowFrames:
    """Run dynamics with (φ, ψ) held near one state of every thin bin; stored forces are unbiased.

    A bias in s leaves p(x|s) as it is, which is all that the flow learns.
    """
    states, angles = thin_states(system, data, rng)
    n_steps = calls // len(states) - n_start - n_frames
    run = n_steps * 2 // 3 // n_frames
    biased = system.potential.system
    force = openmm.CustomTorsionForce("0.5*k*min(d, 2*pi-d)^2; d=abs(theta-t0); pi=3.14159265")
    force.addGlobalParameter("k", 100.0)
    force.addPerTorsionParameter("t0")
    for row in PHI_PSI:
        force.addTorsion(*row, [0.0])
    biased.addForce(force)
    integrator = openmm.LangevinMiddleIntegrator(system.temperature_K, 5.0, 0.001)
    integrator.setRandomNumberSeed(int(rng.integers(2**31)))
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(biased, integrator, platform)
    kept = []
    for beads, target in zip(states, angles, strict=True):
        with torch.no_grad():
            start = flow(torch.from_numpy(beads[None])).rsample((n_start,), rng)[:, 0].numpy()
        lowest = np.nanargmin(system.potential(start)[0])
        for k, row in enumerate(PHI_PSI):
            force.setTorsionParameters(k, *row, [float(target[k])])
        force.updateParametersInContext(context)
        context.setPositions(start[lowest] / 10.0)
        context.setVelocitiesToTemperature(system.temperature_K, int(rng.integers(2**31)))
        integrator.step(n_steps - n_frames * run)
        for _ in range(n_frames):
            integrator.step(run)
            state = context.getState(positions=True).getPositions(asNumpy=True)
            kept.append(state._value * 10.0)
    positions = np.array(kept)
    energy, forces = system.potential(positions)
    sound = np.abs(energy - np.median(energy)) < 3.0  # eV: a start that dynamics couldn't relax
    spent = len(states) * (n_start + n_steps + n_frames)
    print(f"    {len(states)} thin bins, {sound.sum()} frames, {spent} calls", flush=True)
    return FlowFrames(positions[sound], np.ones(sound.sum()), forces[sound])


def thin_states(
    system: System, data: ReferenceData, rng: np.random.Generator, width: float = 20.0
) -> tuple[np.ndarray, np.ndarray]:
    """Turn stored beads to a random (φ, ψ) in every bin with fewer than ten frames."""
    phi_psi = TorsionMap(system.cg_map.atoms, PHI_PSI)
    place = np.floor(np.degrees(phi_psi.apply(data.positions)) / width).astype(int)
    half = round(180.0 / width)
    count = np.zeros((2 * half, 2 * half), dtype=int)
    np.add.at(count, tuple(place.T + half), 1)
    beads = system.cg_map.apply(data.positions)
    beads = beads[rng.integers(len(beads), size=100 * count.size)]
    for axis, moved in (((1, 2), 0), ((2, 3), 4)):
        a, b = (beads[:, k] for k in axis)
        turn = Rotation.from_rotvec(rng.uniform(-np.pi, np.pi, (len(beads), 1)) * unit(b - a))
        beads[:, moved] = a + turn.apply(beads[:, moved] - a)
    angles = evaluation.torsions(beads, system.cg_map)[:, :2]
    bin_of = np.floor(np.degrees(angles) / width).astype(int) + half
    thin = np.flatnonzero(count[tuple(bin_of.T)] < 10)
    _, first = np.unique(bin_of[thin], axis=0, return_index=True)
    return beads[thin[first]], angles[thin[first]]
