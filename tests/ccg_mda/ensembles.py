"""Bead frames from a wrong free energy with atoms from a wrong q, where the truth is known."""

import numpy as np
from linear_gaussian import GaussianBackmapper, LinearGaussian

from ccg_mda.transformation import backmap
from ccg_mda.universe import universe_from

HOT = 1.3
"""The beads are sampled from exp(-F/(1.3 kT))."""


class WrongEnsemble:
    """Four atoms, two of them beads: 1.3 times too hot, and reconstructed by a distorted model."""

    def __init__(self, n_bead_frames, n_samples, **distortion):
        self.molecule = molecule = LinearGaussian(n_atoms=4, bead_atoms=(0, 2))
        covariance = HOT * molecule.kT() * np.linalg.inv(molecule.schur)
        beads = np.random.default_rng(5).multivariate_normal(
            molecule.x0[[0, 2]].ravel(), covariance, size=n_bead_frames
        )
        self.model = GaussianBackmapper(molecule, **distortion)
        self.universe = backmap(
            universe_from(molecule.cg_map.beads, beads.reshape(-1, 2, 3)),
            self.model,
            n_samples=n_samples,
            potential=molecule,
        )

    def free_energy(self, beads):
        """What the beads were sampled from, eV."""
        return self.molecule.free_energy(beads) / HOT

    def log_partition_beads(self):
        """ln of the integral of exp(-free_energy/kT) over the beads."""
        molecule = self.molecule
        log_det = np.linalg.slogdet(molecule.schur / (2 * np.pi * HOT * molecule.kT()))[1]
        return molecule.log_partition(molecule.x0[[0, 2]]) / HOT - 0.5 * log_det
