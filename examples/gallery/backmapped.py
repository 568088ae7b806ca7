"""What the scripts of the gallery share: the bead run as atoms, and the weights of its frames."""

from __future__ import annotations

from pathlib import Path

import MDAnalysis as mda
import numpy as np

from ccg_ase import ForceField, load_model
from ccg_mda import OpenMMPotential, backmap, bead_universe, log_weights

FOLDER = Path(__file__).parents[1] / "alanine_dipeptide"
MODEL, PDB = FOLDER / "alanine_dipeptide.ccg", FOLDER / "alanine_dipeptide.pdb"


def atoms(n_samples: int = 2) -> mda.Universe:
    """Read beads.extxyz in the current folder as atoms, with energies."""
    potential = OpenMMPotential.from_pdb(PDB, ["amber96.xml", "amber96_obc.xml"])
    beads = bead_universe("beads.extxyz", MODEL)
    return backmap(beads, MODEL, n_samples=n_samples, potential=potential, prefetch=64)


def weights(u: mda.Universe) -> np.ndarray:
    """Return log weights of the frames in the whole ensemble, not only given their beads."""
    return log_weights(u, free_energy=ForceField.from_model(load_model(MODEL)))
