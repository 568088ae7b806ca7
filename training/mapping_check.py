"""Whether training can use a map; needs no data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .findings import Finding, listed


def check_mapping(cg_map: CGMap | TorsionMap) -> Iterator[Finding]:
    """Check that training can use a map.

    The backmapper takes any number of molecules and beads; what is asked for beyond that is what
    the bead force field needs.
    """
    if isinstance(cg_map, TorsionMap):
        detail = (
            f"{cg_map.n_atoms} atoms, torsions: {', '.join(cg_map.names)}. Training fits the "
            "backmapper and labels F(s); there is no bead force field over torsions"
        )
        yield Finding("ok", "mapping", detail)
        return
    atoms = cg_map.atoms
    (lost,) = np.nonzero(cg_map.owner < 0)
    molecules = int(atoms.molecules.max()) + 1
    if len(lost):
        names = listed([f"{atoms.resnames[i]}:{atoms.names[i]}" for i in lost])
        yield Finding(
            "error",
            "atoms without a bead",
            f"bonds connect {len(lost)} atoms to no bead: {names}",
            "keep one molecule in the topology (no water, no ions), or add missing bonds",
        )
    elif molecules > 1:
        yield Finding(
            "error",
            "number of molecules",
            f"the bonds connect the atoms to {molecules} molecules; the bead force field holds one",
            "keep one molecule in the topology (no water, no ions), or add missing bonds; a "
            "backmapper alone takes several: Backmapper.from_data",
        )
    elif cg_map.n_beads < 2:
        yield Finding(
            "error",
            "number of beads",
            "a single bead has no internal coordinate, hence no force field",
            "add beads to the mapping; a backmapper alone takes one: Backmapper.from_data",
        )
    else:
        kind = {"slice": "atoms", "mass": "centres of mass", "geometry": "centres of geometry"}
        yield Finding(
            "ok",
            "mapping",
            f"{cg_map.n_atoms} atoms, {cg_map.n_beads} beads "
            f"({kind.get(cg_map.kind, 'weighted means of atoms')}): "
            f"{', '.join(cg_map.beads.names[:20])}",
        )
