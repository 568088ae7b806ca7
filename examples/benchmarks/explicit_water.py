"""Alanine dipeptide in explicit water, public frames with plain forces, and the noise in them.

Five beads, 10 000 frames 10 ps apart (cgnet, BSD-3-Clause; Wang et al., ACS Cent. Sci. 5, 755
(2019)).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import units
from scipy.spatial import cKDTree

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology

KCAL_PER_MOL = units.kcal / units.mol


def load_water(public: Path) -> tuple[CGMap, np.ndarray, np.ndarray]:
    """Return the map (each atom known is a bead), beads in Å and forces in eV/Å, (10 000, 5, 3)."""
    beads, forces = (
        np.load(public / "cgnet" / f"ala2_{name}.npy").astype(float)
        for name in ("coordinates", "forces")
    )
    atoms = Topology(
        names=("C", "N", "CA", "C", "N"),
        masses=np.array([12.011, 14.007, 12.011, 12.011, 14.007]),
        resnames=("ACE", "ALA", "ALA", "ALA", "NME"),
        resids=np.array([1, 2, 2, 2, 3]),
        bonds=np.array([[0, 1], [1, 2], [2, 3], [3, 4]]),
    )
    return CGMap.from_slices(atoms, range(5)), beads, forces * KCAL_PER_MOL


def noise_by_neighbours(
    beads: np.ndarray, residuals: np.ndarray, rng: np.random.Generator, neighbours: int = 24
) -> tuple[float, float]:
    """Estimate the noise of forces from pairs of like frames, extrapolated to equal ones.

    Half the mean square difference of two residuals (force minus a model's) at the same beads is
    the variance of the noise, whatever the model. At some distance d of the two frames the model's
    error adds a term of order d²: the intercept of a line in d² is free of it.

    Parameters
    ----------
    beads, residuals
        Frames (N, n, 3) in Å, and forces left over, eV/Å; of frames that no fit has seen, so that
        the noise is still in them.
    rng
        Of the bootstrap.
    neighbours
        Nearest frames of each that make pairs.

    Returns
    -------
    float, float
        Variance per component in (eV/Å)², and its standard error by 200 bootstraps over frames.
    """
    i, j = np.triu_indices(beads.shape[1], 1)
    shape = np.linalg.norm(beads[:, i] - beads[:, j], axis=-1)
    _, found = cKDTree(shape).query(shape, neighbours + 1)
    one, other = np.repeat(np.arange(len(beads)), neighbours), found[:, 1:].ravel()
    arms = beads - beads.mean(1, keepdims=True)
    u, _, v = np.linalg.svd(arms[other].mT @ arms[one])  # Kabsch
    u[:, :, 2] *= np.linalg.det(u @ v)[:, None]
    turn = u @ v
    square = ((arms[other] @ turn - arms[one]) ** 2).sum(-1).mean(-1)
    half = 0.5 * ((residuals[other] @ turn - residuals[one]) ** 2).mean((-1, -2))
    # Mirror images have the same distances, but don't come near each other by rotation.
    close = (square < np.median(square)).reshape(-1, neighbours)
    square, half = (np.where(close, x.reshape(close.shape), 0.0) for x in (square, half))
    sums = np.stack([close, square, square**2, half, square * half]).sum(-1)

    def intercept(chosen: np.ndarray) -> float:
        n, x, xx, y, xy = sums[:, chosen].sum(-1)
        return (xx * y - x * xy) / (n * xx - x * x)

    draws = [intercept(rng.integers(len(beads), size=len(beads))) for _ in range(200)]
    return float(intercept(np.arange(len(beads)))), float(np.std(draws))
