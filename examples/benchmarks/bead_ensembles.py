"""Bead dynamics of a force field, and its (φ, ψ) against reference frames, with the floors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccg_ase.forcefield import ForceField
from ccg_ase.langevin import BatchedLangevin
from ccg_mda.coverage import jensen_shannon
from ccg_training.evaluation import torsions
from ccg_training.metrics import independent_samples, torsion_histogram

FILL = 1e-6  # probability of an empty bin, as in Plainer et al., arXiv 2506.17139


@dataclass(frozen=True)
class Dynamics:
    """How bead dynamics is run: Langevin (BAOAB), replicas in one batch."""

    replicas: int = 256
    steps: int = 20_000
    every: int = 25
    timestep_fs: float = 4.0
    friction_per_ps: float = 1.0
    discard: float = 0.25  # share of every replica's frames in which it forgets its start

    def run(self, force_field: ForceField, starts: np.ndarray, seed: int) -> np.ndarray:
        """Return frames after the discarded ones, Å, shape (S, replicas, n, 3)."""
        rng = np.random.default_rng(seed)
        sampler = BatchedLangevin(
            force_field,
            timestep_fs=self.timestep_fs,
            friction_per_ps=self.friction_per_ps,
            seed=seed,
        )
        chosen = starts[rng.choice(len(starts), self.replicas)]
        frames = sampler.run(chosen, self.steps, self.every).beads
        return frames[round(self.discard * len(frames)) :]


def pmf_error(p: np.ndarray, q: np.ndarray) -> float:
    """Return Σ_b w_b (ln p_b - ln q_b)² over bins that either occupies, in (kT)².

    w is the mean of the two histograms; an empty bin counts as `FILL` (theory 3.1, Plainer).
    """
    occupied = (p > 0) | (q > 0)
    p, q = p[occupied], q[occupied]
    log_p, log_q = (np.log(np.where(h > 0, h, FILL)) for h in (p, q))
    return float((0.5 * (p + q) * (log_p - log_q) ** 2).sum())


def compare(
    visited: np.ndarray, reference: np.ndarray, size: int, rng: np.random.Generator
) -> dict[str, float]:
    """Compare (φ, ψ) of two ensembles: 64 bins an axis, `size` frames each, mean of 20 draws.

    The floor is the same figure of two disjoint draws of the reference, and the excess what the
    figure of `size` frames lies above it. Frames of either are correlated: `independent` is how
    many the visited ones count for, by the slower of cos φ and cos ψ along every replica.

    Parameters
    ----------
    visited
        Torsions in rad, shape (S, R, 2): R replicas.
    reference
        Torsions in rad, shape (N, 2), N at least twice `size`.
    size
        Frames of either in a comparison.
    rng
        Of the draws.
    """
    flat, found = visited.reshape(-1, 2), {name: [] for name in ("js", "pmf", "js_f", "pmf_f")}
    for _ in range(20):
        mine = torsion_histogram(flat[rng.choice(len(flat), size, replace=False)])
        pieces = rng.permutation(len(reference))[: 2 * size].reshape(2, size)
        one, other = (torsion_histogram(reference[piece]) for piece in pieces)
        found["js"].append(jensen_shannon(mine, one))
        found["pmf"].append(pmf_error(mine, one))
        found["js_f"].append(jensen_shannon(one, other))
        found["pmf_f"].append(pmf_error(one, other))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    independent = min(
        sum(independent_samples(np.cos(visited[:, r, k])) for r in range(visited.shape[1]))
        for k in (0, 1)
    )
    return {
        "frames": len(flat),
        "independent": float(independent),
        "js": mean["js"],
        "js_floor": mean["js_f"],
        "js_excess": mean["js"] - mean["js_f"],
        "js_sd_of_draws": float(np.std(found["js"])),
        "pmf": mean["pmf"],
        "pmf_floor": mean["pmf_f"],
        "pmf_excess": mean["pmf"] - mean["pmf_f"],
        "phi_above_0": float(np.mean(flat[:, 0] > 0)),
        "phi_above_0_reference": float(np.mean(reference[:, 0] > 0)),
    }


def measure(
    force_field: ForceField,
    reference: np.ndarray,
    starts: np.ndarray,
    dynamics: Dynamics,
    *,
    size: int,
    seed: int,
) -> dict[str, float]:
    """Run bead dynamics and compare it with reference beads (N, n, 3); see `compare`."""
    frames = dynamics.run(force_field, starts, seed)
    flat = frames.reshape(-1, *frames.shape[2:]).astype(float)
    visited = torsions(flat, force_field.cg_map).reshape(*frames.shape[:2], 2)
    known = torsions(reference, force_field.cg_map)
    return compare(visited, known, size, np.random.default_rng(seed))
