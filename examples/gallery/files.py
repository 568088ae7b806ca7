"""Write a backmapped trajectory as XTC and as H5MD, and read the weights back.

Any format keeps atoms. H5MD keeps ts.data too, hence energies and weights; XTC rounds positions to
0.01 Å, which spoils energies that are worked out from them later.
"""

import MDAnalysis as mda
import numpy as np
from backmapped import MODEL, PDB, atoms, weights

from ccg_ase import ForceField, load_model
from ccg_mda import two_level_weights

u = atoms()
u.atoms.write("atoms.xtc", frames="all")
u.atoms.write("weighted.h5md", frames="all")
u.select_atoms("not element H").write("heavy.xtc", frames=u.trajectory[::4])

again = mda.Universe(PDB, "weighted.h5md")
levels = two_level_weights(again, ForceField.from_model(load_model(MODEL)))
read = levels.log_w
print(f"{len(read)} weights read back, off by {np.abs(read - weights(u)).max():.1g} at most")
print(f"effective sample size: of bead frames {levels.ess_beads:.2f}, of their atoms "
      f"{levels.ess_atoms:.2f}, of all frames {levels.ess:.2f}")  # fmt: skip
