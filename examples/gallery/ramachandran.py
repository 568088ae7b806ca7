"""RMSD and Ramachandran plot of a bead run, with weights and without; writes ramachandran.png."""

import matplotlib
import MDAnalysis as mda
import numpy as np
from backmapped import PDB, atoms, weights
from MDAnalysis.analysis.dihedrals import Ramachandran
from MDAnalysis.analysis.rms import RMSD

from ccg_mda import reweight

matplotlib.use("Agg")
import matplotlib.pyplot as plt

u = atoms()
log_w = weights(u)
same = np.zeros_like(log_w)
blocks = {"n_blocks": 16}  # one per copy of the beads

residue = u.select_atoms("resname ALA")
plots = {
    name: reweight(Ramachandran(residue), given, bins=30, **blocks)
    for name, given in (("without weights", same), ("with weights", log_w))
}
for name, given in (("without weights", same), ("with weights", log_w)):
    rmsd = reweight(RMSD(u, mda.Universe(PDB), select="not element H"), given, **blocks).results
    print(f"RMSD of heavy atoms {name}: {rmsd.mean[0]:.3f} ± {rmsd.error[0]:.3f} Å")

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), sharey=True, layout="constrained")
for axis, (name, plot) in zip(axes, plots.items(), strict=True):
    with np.errstate(divide="ignore"):
        free_energy = -np.log(plot.results.mean.T)  # bins that were never visited stay white
    edges = plot.results.edges
    mesh = axis.pcolormesh(edges, edges, free_energy - free_energy.min(), vmax=6, cmap="viridis")
    axis.set(title=name, xlabel="φ / degrees", aspect="equal")
    axis.set_xticks([-180, -90, 0, 90, 180])
axes[0].set_ylabel("ψ / degrees")
axes[0].set_yticks([-180, -90, 0, 90, 180])
figure.colorbar(mesh, ax=axes, label="F / kT")
figure.savefig("ramachandran.png", dpi=150)
print("wrote ramachandran.png")
