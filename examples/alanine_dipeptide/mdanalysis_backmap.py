"""Atoms on the beads of ase_langevin.py with MDAnalysis, and averages over them.

Reads beads.extxyz in the current folder and writes atoms.h5md there.
Usage: python mdanalysis_backmap.py [MODEL]
"""

import sys
from pathlib import Path

import MDAnalysis as mda
import numpy as np
import torch
from MDAnalysis.analysis.dihedrals import Ramachandran
from MDAnalysis.analysis.rms import RMSD
from MDAnalysis.lib.distances import calc_bonds

from ccg_ase import ForceField, load_model
from ccg_mda import (
    OpenMMPotential,
    backmap,
    bead_universe,
    effective_sample_size,
    log_weights,
    weighted_average,
)

folder = Path(__file__).parent
model = sys.argv[1] if len(sys.argv) > 1 else folder / "alanine_dipeptide.ccg"

pdb = folder / "alanine_dipeptide.pdb"
potential = OpenMMPotential.from_pdb(pdb, ["amber96.xml", "amber96_obc.xml"])
beads = bead_universe("beads.extxyz", model)
u = backmap(beads, model, n_samples=4, potential=potential)  # atoms are placed as frames are read

phi, psi = Ramachandran(u.select_atoms("resname ALA")).run().results.angles[:, 0].T
rmsd = RMSD(u, mda.Universe(pdb), select="not element H").run().results.rmsd[:, 2]
ends = u.select_atoms("resname ACE and name O", "resname NME and name H")
distance = np.array([calc_bonds(*ends.positions) for _ in u.trajectory])

force_field = ForceField.from_model(load_model(model)).double()


def free_energy(s):
    with torch.no_grad():
        return force_field(torch.from_numpy(s)).numpy()


log_w = log_weights(u, free_energy=free_energy, temperature_K=force_field.temperature_K)
print(f"effective sample size {effective_sample_size(log_w):.2f} of {len(log_w)} frames")
mean, error = weighted_average(rmsd, log_w, n_blocks=16)  # one block per copy of the beads
print(f"RMSD of heavy atoms {mean:.3f} ± {error:.3f} Å; {rmsd.mean():.3f} without weights")
mean, error = weighted_average(distance, log_w, n_blocks=16)
print(f"O(ACE)-H(NME) {mean:.3f} ± {error:.3f} Å; {distance.mean():.3f} without weights")
extended = (phi < 0) & (psi > 60)
mean, error = weighted_average(extended, log_w, n_blocks=16)
print(f"φ < 0, ψ > 60°: {mean:.3f} ± {error:.3f}; {extended.mean():.3f} without weights")

u.atoms.write("atoms.h5md", frames="all")  # keeps energies and weights; XTC would lose them
