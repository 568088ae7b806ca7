"""Reading an OpenMM System: its forces as modules of torch, in Å and eV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.polynomial import chebyshev
from torch import nn

from .openmm_system import EV_PER_KJ_MOL, NM_PER_A, check_system
from .torch_bonded import FourierTorsions, HarmonicAngles, HarmonicBonds
from .torch_cmap import CorrectionMaps
from .torch_gbsa import GeneralisedBorn
from .torch_nonbonded import PairEnergies

if TYPE_CHECKING:
    import openmm

_PER_A2 = EV_PER_KJ_MOL * NM_PER_A**2
# As OpenMM has it; newer values of the vacuum's permittivity differ in the tenth digit.
_COULOMB = 138.93545764438198 * EV_PER_KJ_MOL / NM_PER_A
# They change velocities, not energies.
_IGNORED = ("AndersenThermostat", "CMMotionRemover")
_INSTEAD = "use OpenMMPotential for this System"


def read_terms(system: openmm.System) -> Iterator[tuple[str, nn.Module]]:
    """Translate the forces of a System, one by one.

    Yields
    ------
    name, module
        Name of OpenMM's class, and the module: `PairEnergies` and `GeneralisedBorn` take
        `Distances`, the others positions, (3, n_atoms, B).

    Raises
    ------
    ValueError
        If the System holds constraints or virtual sites.
    NotImplementedError
        If it is periodic, or a force is of a kind or has an option that isn't translated.
    """
    check_system(system)
    for force in system.getForces():
        name = type(force).__name__
        if name in _IGNORED:
            continue
        if name not in _READERS:
            raise NotImplementedError(f"{_named(force)} isn't available in torch; {_INSTEAD}")
        yield name, _READERS[name](force)


def _named(force: openmm.Force) -> str:
    """Name a force by its class, and by its own name where it has one."""
    kind, own = type(force).__name__, force.getName()
    return kind if own == kind else f"{kind} ({own!r})"


def _rows(count: int, row: Callable[[int], list], atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices, (terms, atoms), and parameters, (parameters, terms), of a force's terms.

    Parameters
    ----------
    count
        Number of terms.
    row
        Returns the atoms of a term, then its parameters, as OpenMM's getters do.
    atoms
        Number of atoms of a term.
    """
    if not count:
        return np.zeros((0, atoms), int), np.zeros((8, 0))
    rows = [[getattr(x, "_value", x) for x in row(k)] for k in range(count)]
    table = np.array(rows, dtype=float)
    return table[:, :atoms].astype(int), table[:, atoms:].T


def _bonds(force: openmm.HarmonicBondForce) -> HarmonicBonds:
    atoms, values = _rows(force.getNumBonds(), force.getBondParameters, 2)
    return HarmonicBonds(atoms, values[0] / NM_PER_A, values[1] * _PER_A2)


def _angles(force: openmm.HarmonicAngleForce) -> HarmonicAngles:
    atoms, values = _rows(force.getNumAngles(), force.getAngleParameters, 3)
    return HarmonicAngles(atoms, values[0].copy(), values[1] * EV_PER_KJ_MOL)


def _torsions(force: openmm.PeriodicTorsionForce) -> FourierTorsions:
    """Read k (1 + cos(nφ - φ0)); the terms of the same four atoms become one."""
    rows, values = _rows(force.getNumTorsions(), force.getTorsionParameters, 4)
    atoms, term = np.unique(rows, axis=0, return_inverse=True)
    fold, phase, height = values[0].astype(int), values[1], values[2] * EV_PER_KJ_MOL
    cosine, sine = np.zeros((2, len(atoms), fold.max(initial=0) + 1))
    np.add.at(cosine[:, 0], term, height)
    np.add.at(cosine, (term, fold), height * np.cos(phase))
    np.add.at(sine, (term, fold), height * np.sin(phase))
    return FourierTorsions(atoms, cosine, sine)


def _ryckaert_bellemans(force: openmm.RBTorsionForce) -> FourierTorsions:
    """Read Σ Cₙ cosⁿ(φ - π)."""
    atoms, values = _rows(force.getNumTorsions(), force.getTorsionParameters, 4)
    alternating = values[:6].T * (-1.0) ** np.arange(6) * EV_PER_KJ_MOL
    basis = [np.pad(chebyshev.poly2cheb(row), (0, 5 - n)) for n, row in enumerate(np.eye(6))]
    cosine = alternating @ np.array(basis)
    return FourierTorsions(atoms, cosine, np.zeros_like(cosine))


def _maps(force: openmm.CMAPTorsionForce) -> CorrectionMaps:
    grids = []
    for k in range(force.getNumMaps()):
        size, values = force.getMapParameters(k)
        # OpenMM counts φ fastest.
        grid = np.array([getattr(x, "_value", x) for x in values]).reshape(size, size).T
        grids.append(grid * EV_PER_KJ_MOL)
    rows = np.array([force.getTorsionParameters(k) for k in range(force.getNumTorsions())], int)
    rows = rows.reshape(-1, 9)
    return CorrectionMaps(rows[:, 1:], rows[:, 0], grids)


def _pairs(force: openmm.NonbondedForce) -> PairEnergies:
    if force.getNonbondedMethod() != force.NoCutoff:
        raise NotImplementedError(f"{_named(force)} has a cutoff; {_INSTEAD}")
    if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
        raise NotImplementedError(f"{_named(force)} has parameter offsets; {_INSTEAD}")
    n = force.getNumParticles()
    _, (charge, sigma, epsilon) = _rows(n, force.getParticleParameters, 0)
    size, depth = 0.5 * np.add.outer(sigma, sigma), np.sqrt(np.multiply.outer(epsilon, epsilon))
    product = np.multiply.outer(charge, charge)
    atoms, special = _rows(force.getNumExceptions(), force.getExceptionParameters, 2)
    first, second = np.sort(atoms, axis=1).T
    for table, own in zip((product, size, depth), special, strict=False):
        table[first, second] = own
    pair = np.triu_indices(n, 1)
    return PairEnergies(
        size[pair] / NM_PER_A, depth[pair] * EV_PER_KJ_MOL, product[pair] * _COULOMB
    )


def _implicit_water(force: openmm.GBSAOBCForce) -> GeneralisedBorn:
    if force.getNonbondedMethod() != force.NoCutoff:
        raise NotImplementedError(f"{_named(force)} has a cutoff; {_INSTEAD}")
    _, (charge, radius, scale) = _rows(force.getNumParticles(), force.getParticleParameters, 0)
    return GeneralisedBorn(
        charge,
        radius / NM_PER_A,
        scale,
        coulomb=_COULOMB * (1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric()),
        tension=force.getSurfaceAreaEnergy()._value * _PER_A2,
    )


_READERS: dict[str, Callable[..., nn.Module]] = {
    "CMAPTorsionForce": _maps,
    "GBSAOBCForce": _implicit_water,
    "HarmonicAngleForce": _angles,
    "HarmonicBondForce": _bonds,
    "NonbondedForce": _pairs,
    "PeriodicTorsionForce": _torsions,
    "RBTorsionForce": _ryckaert_bellemans,
}
