"""Hydrogen bonds of a bead run: beads have no hydrogens, the atoms put on them do."""

import numpy as np
from backmapped import atoms, weights
from MDAnalysis.analysis.hydrogenbonds import HydrogenBondAnalysis

from ccg_mda import reweight

u = atoms()
log_w = weights(u)
for name, given in (("without weights", np.zeros_like(log_w)), ("with weights", log_w)):
    bonds = HydrogenBondAnalysis(
        u,
        donors_sel="element N",
        hydrogens_sel="name H",
        acceptors_sel="element O",
        d_a_cutoff=3.5,
        d_h_a_angle_cutoff=120,
    )
    found = reweight(bonds, given, n_blocks=16).results
    print(f"{name}: {found.mean:.3f} ± {found.error:.3f} bonds per frame")
    rows = zip(found.hbonds, found.occupancy, found.occupancy_error, strict=True)
    for (donor, _, acceptor), occupancy, error in rows:
        ends = (f"{a.name}({a.resname}{a.resid})" for a in u.atoms[[donor, acceptor]])
        print(f"  {'-H ... '.join(ends)}: {occupancy:.3f} ± {error:.3f}")
