"""What all OpenMM dynamics of the training package share: seeds, contexts, frames, fingerprints.

The border of units for dynamics: OpenMM's nm and kJ/mol become Å and eV in `read_frame`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from ase import units

if TYPE_CHECKING:
    import openmm

KJ_PER_MOL = units.kJ / units.mol  # eV
NM = units.nm  # Å
_ALL_GROUPS = -1


def fingerprint(*parts: object) -> str:
    """Return a short name of a plan, for its files: another plan or OpenMM gives another name."""
    import openmm

    return hashlib.sha256(repr((openmm.__version__, *parts)).encode()).hexdigest()[:12]


def positive_seed(*words: int) -> int:
    """Return a seed that depends on all the words; positive, since 0 means "random" to OpenMM."""
    return int(np.random.SeedSequence(words).generate_state(1)[0] % (2**31 - 1)) + 1


def new_context(
    system: openmm.System,
    *,
    platform: str,
    temperature_K: float,
    friction_per_ps: float,
    timestep_fs: float,
    seed: int,
) -> openmm.Context:
    """Make a Context with a LangevinMiddleIntegrator, on one thread and with the same bits again.

    LangevinMiddleIntegrator: Zhang, Liu, Yan, Tuckerman and Liu, J. Phys. Chem. A 123, 6056 (2019).
    """
    import openmm

    integrator = openmm.LangevinMiddleIntegrator(temperature_K, friction_per_ps, timestep_fs * 1e-3)
    integrator.setRandomNumberSeed(seed)
    properties = {"Threads": "1", "DeterministicForces": "true"} if platform == "CPU" else {}
    return openmm.Context(
        system, integrator, openmm.Platform.getPlatformByName(platform), properties
    )


def read_frame(
    context: openmm.Context, groups: int | set[int] = _ALL_GROUPS
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return positions (n, 3) in Å, forces (n, 3) in eV/Å and energy in eV of some force groups."""
    from openmm import unit

    state = context.getState(positions=True, forces=True, energy=True, groups=groups)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return positions * NM, forces * (KJ_PER_MOL / NM), energy * KJ_PER_MOL
