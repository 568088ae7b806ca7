"""Atoms on the beads of ase_langevin.py with MDAnalysis, and averages over them.

Reads beads.extxyz in the current folder and writes atoms.h5md there.
Usage: python mdanalysis_backmap.py [MODEL]
"""

import sys
from pathlib import Path

import MDAnalysis as mda
import numpy as np
from MDAnalysis.analysis.rms import RMSD
from MDAnalysis.lib.distances import calc_bonds

from ccg_ase import ForceField, load_model
from ccg_mda import (
    OpenMMPotential,
    WeightedAverage,
    backmap,
    bead_universe,
    log_weights,
    reweight,
)

folder = Path(__file__).parent
model = sys.argv[1] if len(sys.argv) > 1 else folder / "alanine_dipeptide.ccg"

pdb = folder / "alanine_dipeptide.pdb"
potential = OpenMMPotential.from_pdb(pdb, ["amber96.xml", "amber96_obc.xml"])
beads = bead_universe("beads.extxyz", model)
u = backmap(beads, model, n_samples=4, potential=potential)  # atoms are placed as frames are read
log_w = log_weights(u, free_energy=ForceField.from_model(load_model(model)))
rmsd = RMSD(u, mda.Universe(pdb), select="not element H")
results = reweight(rmsd, log_w, n_blocks=16).results  # one block per copy of the beads
print(f"effective sample size {results.effective_sample_size:.2f} of {len(log_w)} frames")
print(f"RMSD of heavy atoms {results.mean[0]:.3f} ± {results.error[0]:.3f} Å")


def distance(ends: mda.AtomGroup) -> float:
    return calc_bonds(*ends.positions)


ends = u.select_atoms("resname ACE and name O", "resname NME and name H")
for name, weights in (("with", log_w), ("without", np.zeros_like(log_w))):
    results = WeightedAverage(distance, ends, log_w=weights, n_blocks=16).run().results
    print(f"O(ACE)-H(NME) {results.mean:.3f} ± {results.error:.3f} Å {name} weights")

u.atoms.write("atoms.h5md", frames="all")  # keeps energies and weights; XTC would lose them
