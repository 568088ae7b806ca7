"""Coarse states: what they look like, and which of them are worth labelling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ccg_ase.topology import Topology
from ccg_ase.torsion_map import dihedral_angles

_MAX_CANDIDATES = 20_000
_MAX_DISTANCES = 2000
_DISTANCE_SHARE = 0.25  # weight of all distances together, against all dihedrals together


class InternalCoordinates(NamedTuple):
    """Bond lengths in Å, angles and dihedrals in radians, of the terms of a topology."""

    bonds: np.ndarray
    angles: np.ndarray
    dihedrals: np.ndarray


def internal_coordinates(positions: np.ndarray, topology: Topology) -> InternalCoordinates:
    """Return what `topology.bonds`, `.angles()` and `.dihedrals()` measure.

    Parameters
    ----------
    positions
        (..., n, 3), Å.
    topology
        Of the n sites: beads, or atoms.

    Returns
    -------
    InternalCoordinates
        (..., n_terms) each; dihedrals in (-π, π] with the IUPAC sign.
    """
    x = np.asarray(positions, dtype=np.float64)
    i, j = topology.bonds.T
    bonds = np.linalg.norm(x[..., j, :] - x[..., i, :], axis=-1)
    i, j, k = topology.angles().T
    first, second = x[..., i, :] - x[..., j, :], x[..., k, :] - x[..., j, :]
    # atan2 keeps its digits near 0 and π, where arccos loses them.
    sine = np.linalg.norm(np.cross(first, second), axis=-1)
    angles = np.arctan2(sine, (first * second).sum(-1))
    return InternalCoordinates(bonds, angles, dihedral_angles(x, topology.dihedrals()))


def state_features(beads: np.ndarray, topology: Topology | None) -> np.ndarray:
    """Return coordinates in which coarse states are compared, (N, n_features).

    cos and sin of every dihedral of the bead topology, and the distances between beads more than
    three bonds apart (all distances, if there is no dihedral; at most 2000, evenly chosen), each
    over its standard deviation and scaled so that all distances together weigh a quarter of all
    dihedrals together. Without a topology the states are torsions (N, n_torsions): their cos and
    sin.
    """
    if topology is None:
        return np.concatenate([np.cos(beads), np.sin(beads)], axis=1)
    angle = dihedral_angles(np.asarray(beads, dtype=np.float64), topology.dihedrals())
    n_dihedrals = angle.shape[-1]
    i, j = np.nonzero(np.triu(topology.hops() > (3 if n_dihedrals else 0), 1))
    some = slice(None, None, -(-len(i) // _MAX_DISTANCES) or None)
    i, j = i[some], j[some]
    distance = np.linalg.norm(beads[:, i] - beads[:, j], axis=-1)
    spread = np.maximum(distance.std(0), 1e-6)
    scale = _DISTANCE_SHARE * np.sqrt(max(n_dihedrals, 1) / max(len(i), 1))
    return np.concatenate([np.cos(angle), np.sin(angle), scale * distance / spread], axis=1)


def choose_states(
    beads: np.ndarray,
    n_states: int,
    topology: Topology | None,
    *,
    diverse: float = 0.5,
    labelled: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Choose bead states to label: some as they were visited, the others as diverse as possible.

    A share 1 - `diverse` is drawn at random from the frames, hence follows the visited density.
    The rest are farthest points: one after another, the frame whose distance to everything chosen
    or already labelled is largest, in the space of `state_features`. This gives thin regions (rare
    basins, barriers) a share that doesn't depend on how rarely they were visited.

    Parameters
    ----------
    beads
        Visited states, (N, n_beads, 3) in Å, or (N, n_torsions) in rad. Farthest points are sought
        among at most 20000 of them.
    n_states
        How many to choose.
    topology
        Of the beads; None where states are torsions.
    diverse
        Share of farthest points, 0 to 1.
    labelled
        States that have labels already, like `beads`.
    seed
        Of the random part; the choice is a pure function of the arguments.

    Returns
    -------
    ndarray
        Indices into `beads`, ascending, (n_states,).
    """
    if not 0 < n_states <= len(beads):
        raise ValueError(f"n_states must be in 1..{len(beads)} (frames), got {n_states}")
    if not 0 <= diverse <= 1:
        raise ValueError(f"diverse must be in 0..1, got {diverse}")
    shuffled = np.random.default_rng(seed).permutation(len(beads))
    n_visited = n_states - round(diverse * n_states)
    chosen, candidates = (
        shuffled[:n_visited],
        shuffled[n_visited:][: max(_MAX_CANDIDATES, n_states)],
    )
    known = beads[:0] if labelled is None else labelled
    features = state_features(np.concatenate([beads[candidates], beads[chosen], known]), topology)
    here, anchors = features[: len(candidates)], features[len(candidates) :]
    if len(anchors) == 0:
        anchors = here.mean(0, keepdims=True)
    nearest = np.full(len(candidates), np.inf)
    for anchor in anchors:
        np.minimum(nearest, ((here - anchor) ** 2).sum(1), out=nearest)
    picked = []
    for _ in range(n_states - n_visited):
        best = int(np.argmax(nearest))
        picked.append(best)
        np.minimum(nearest, ((here - here[best]) ** 2).sum(1), out=nearest)
        nearest[best] = -1.0  # never again, even among duplicates
    return np.sort(np.concatenate([chosen, candidates[picked]])).astype(int)
