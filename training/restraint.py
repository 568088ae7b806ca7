"""A harmonic restraint on the coarse variables as a force of an OpenMM System.

A bias B(s) leaves p(x|s) as it is (theory.md 5): frames of the restrained dynamics are samples of
the unbiased conditional density, each at its own s = M x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy

from .openmm_dynamics import KJ_PER_MOL, NM

if TYPE_CHECKING:
    import openmm

SPREAD_A = 0.1
"""Standard deviation of a bead that nothing but the default restraint holds."""
SPREAD_RAD = np.deg2rad(5.0)
FRACTION = "restraint_fraction"
"""Parameter of the Context: where the centre is, 0 at the first states and 1 at the last ones."""
UNBIASED_GROUP, RESTRAINT_GROUP = 0, 1


def default_stiffness(cg_map: CGMap | TorsionMap, temperature_K: float) -> float:
    """Return the stiffness at which beads spread by 0.1 Å, in eV/Å²; torsions by 5°, in eV/rad²."""
    spread = SPREAD_RAD if isinstance(cg_map, TorsionMap) else SPREAD_A
    return float(thermal_energy(temperature_K) / spread**2)


def add_restraint(
    system: openmm.System,
    cg_map: CGMap | TorsionMap,
    stiffness: float,
    first: np.ndarray,
    last: np.ndarray,
) -> None:
    """Add k/2 |M x - c|² to a System, its centre c between two coarse states.

    The System's own forces go to the force group `UNBIASED_GROUP`, the restraint has
    `RESTRAINT_GROUP` to itself. The Context's parameter `FRACTION` moves the centre in a straight
    line, torsions the short way round.

    Parameters
    ----------
    system
        Changed in place.
    cg_map
        Any linear map, or torsions.
    stiffness
        k in eV/Å², or eV/rad².
    first, last
        (n_beads, 3) in Å, or (n_torsions,) in rad.
    """
    by_torsions = isinstance(cg_map, TorsionMap)
    way = cg_map.difference(last, first)
    force = (
        _on_torsions(cg_map, stiffness / KJ_PER_MOL, first, way)
        if by_torsions
        else _on_beads(cg_map, stiffness / KJ_PER_MOL * NM**2, first / NM, way / NM)
    )
    for other in system.getForces():
        other.setForceGroup(UNBIASED_GROUP)
    force.addGlobalParameter(FRACTION, 0.0)
    force.setForceGroup(RESTRAINT_GROUP)
    system.addForce(force)


def _on_beads(
    cg_map: CGMap, stiffness: float, first: np.ndarray, way: np.ndarray
) -> openmm.CustomCentroidBondForce:
    """Restrain the beads; in kJ/mol and nm."""
    import openmm

    squares = "+".join(f"({a}1-{a}0-{FRACTION}*way_{a})^2" for a in "xyz")
    force = openmm.CustomCentroidBondForce(1, f"{stiffness / 2!r}*({squares})")
    for name in ("x0", "y0", "z0", "way_x", "way_y", "way_z"):
        force.addPerBondParameter(name)
    for bead in range(cg_map.n_beads):
        own = cg_map.bead_index == bead
        # OpenMM divides by the sum of the weights, which is one.
        group = force.addGroup(cg_map.atom_index[own].tolist(), cg_map.weights[own].tolist())
        force.addBond([group], [*first[bead].tolist(), *way[bead].tolist()])
    return force


def _on_torsions(
    torsion_map: TorsionMap, stiffness: float, first: np.ndarray, way: np.ndarray
) -> openmm.CustomTorsionForce:
    """Restrain the torsions; in kJ/mol and rad."""
    import openmm

    force = openmm.CustomTorsionForce(
        f"{stiffness / 2!r}*(apart-turn*floor(apart/turn+0.5))^2; turn={2 * np.pi!r}; "
        f"apart=theta-first-{FRACTION}*way"
    )
    for name in ("first", "way"):
        force.addPerTorsionParameter(name)
    for atoms, *course in zip(torsion_map.torsions.tolist(), first, way, strict=True):
        force.addTorsion(*atoms, list(map(float, course)))
    return force
