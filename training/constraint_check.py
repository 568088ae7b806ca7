"""Bonds and angles that never change in the data: what that means for densities and weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap

from .findings import Finding, listed
from .states import internal_coordinates

RIGID = 2e-4  # relative spread of a bond, spread of an angle in rad


def rigid_terms(positions: np.ndarray, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Return the bonds (b, 2) and the angles (a, 3) that don't move in frames (N > 1, n, 3)."""
    values = internal_coordinates(positions, topology)
    bonds, angles = topology.bonds, topology.angles()
    stiff = values.bonds.std(axis=0) < RIGID * values.bonds.mean(axis=0)
    return bonds[stiff], angles[values.angles.std(axis=0) < RIGID]


def check_constraints(positions: np.ndarray, cg_map: CGMap | TorsionMap) -> Iterator[Finding]:
    """Warn of rigid bonds and angles in frames (N, n_atoms, 3), if there are any."""
    atoms = cg_map.atoms
    if len(positions) < 2:
        return
    bonds, angles = rigid_terms(positions, atoms)
    held = [*bonds.tolist(), *angles.tolist()]
    if not held:
        return
    names = listed(["-".join(atoms.names[i] for i in term) for term in held])
    yield Finding(
        "warning",
        "rigid bonds",
        f"{len(bonds)} of {len(atoms.bonds)} bonds and {len(angles)} angles never change: {names}. "
        "The backmapper holds them at these values, so densities and weights hold on the "
        "constrained surface, without the mass-metric factor that rigid dynamics adds. The "
        "potential must be flexible or have the same constraints. Equipartition can't test the "
        "forces of such data",
        "for weights of the flexible potential, simulate without constraints, at 1 fs or less",
    )
    if isinstance(cg_map, TorsionMap):
        return
    alone = np.bincount(cg_map.bead_index, minlength=cg_map.n_beads) == 1
    beads = set(cg_map.atom_index[alone[cg_map.bead_index]].tolist())
    between = [term for term in bonds.tolist() if beads.issuperset(term)]
    if between:
        pairs = listed(["-".join(atoms.names[i] for i in term) for term in between])
        yield Finding(
            "warning",
            "rigid bonds between beads",
            f"{pairs} join two atoms that are beads; bead dynamics replaces them by stiff springs",
            "keep one bead of each such pair, or simulate without these constraints",
        )
