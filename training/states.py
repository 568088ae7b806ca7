"""Coarse states: what they look like, and which of them are worth labelling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree

from ccg_ase.evaluator import Evaluator
from ccg_ase.forcefield import ForceField
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import dihedral_angles

_MAX_CANDIDATES = 20_000
_MAX_DISTANCES = 2000
_AT_ONCE = 1000  # states that a committee sees at a time
_TINY = 1e-300
_USUAL_PERCENTILE = 99
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


def committee_spread(force_field: ForceField, beads: np.ndarray) -> np.ndarray | None:
    """Return how much a committee disagrees about F and the mean force at states, (N,).

    The standard deviation over members of F, its mean over the states taken off each, and the rms
    of that of a force component, each over its mean over the states; the mean of both. None for a
    force field of one member, which can't say how sure it is.

    Parameters
    ----------
    force_field
        The force field.
    beads
        (N, n_beads, 3), Å.
    """
    if force_field.n_members == 1:
        return None
    energies, forces = [], []
    for part in np.array_split(beads, -(-len(beads) // _AT_ONCE)):
        evaluate = Evaluator(force_field, len(part), compiled=False)
        energy, force = evaluate.members(torch.from_numpy(part).double())
        energies.append(energy.numpy())
        forces.append(force.std(0, correction=0).square().mean((-1, -2)).sqrt().numpy())
    energy, force = np.concatenate(energies, axis=1), np.concatenate(forces)
    energy = (energy - energy.mean(1, keepdims=True)).std(0)
    return sum(spread / max(spread.mean(), _TINY) for spread in (energy, force)) / 2


def beyond(
    beads: np.ndarray, usual: np.ndarray, known: np.ndarray, topology: Topology
) -> np.ndarray:
    """Return which states lie farther from all known ones than usual states do, bool (N,).

    That is, than 99 % of the usual ones. A model that was taught at the known states is on its own
    there, and the members of a committee, taught alike, may well agree on the wrong energy.

    Parameters
    ----------
    beads, usual, known
        States (N, n_beads, 3), in Å: those in question, those of the ensemble, and those that the
        model was taught at.
    topology
        Of the beads.
    """
    features = state_features(np.concatenate([beads, usual, known]), topology)
    asked, ordinary, taught = np.split(features, np.cumsum([len(beads), len(usual)]))
    if not features.shape[1]:
        return np.zeros(len(beads), bool)
    tree = cKDTree(taught)
    return tree.query(asked)[0] > np.percentile(tree.query(ordinary)[0], _USUAL_PERCENTILE)


def choose_states(
    beads: np.ndarray,
    n_states: int,
    topology: Topology | None,
    *,
    diverse: float = 0.5,
    uncertain: float = 0.0,
    spread: np.ndarray | None = None,
    labelled: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Choose bead states to label: as they were visited, where models disagree, far from others.

    Three shares. The first, 1 - `uncertain` - `diverse`, is drawn at random from the frames, hence
    follows the visited density. `uncertain` is drawn in proportion to `spread`, hence follows
    spread x visited density. The rest are farthest points: one after another, the frame whose
    distance to everything chosen or already labelled is largest, in the space of `state_features`.
    This gives thin regions (rare basins, barriers) a share that doesn't depend on how rarely they
    were visited. Without `spread` (a force field of one member) the uncertain share is diverse.

    Parameters
    ----------
    beads
        Visited states, (N, n_beads, 3) in Å, or (N, n_torsions) in rad. Farthest points are sought
        among at most 20000 of them.
    n_states
        How many to choose.
    topology
        Of the beads; None where states are torsions.
    diverse, uncertain
        Share of farthest points, and of states drawn by spread, 0 to 1 together.
    spread
        Score of every visited state, (N,), not negative: `committee_spread`.
    labelled
        States that have labels already, like `beads`.
    seed
        Of the random parts; the choice is a pure function of the arguments.

    Returns
    -------
    ndarray
        Indices into `beads`, ascending, (n_states,).

    Raises
    ------
    ValueError
        If more states are asked for than there are, or shares or scores are out of range.
    """
    if not 0 < n_states <= len(beads):
        raise ValueError(f"n_states must be in 1..{len(beads)} (frames), got {n_states}")
    if not (0 <= diverse <= 1 and 0 <= uncertain <= 1 and diverse + uncertain <= 1 + 1e-9):
        raise ValueError(
            f"diverse and uncertain must be shares, at most 1 together; got {diverse} and "
            f"{uncertain}"
        )
    if spread is not None and (spread.shape != (len(beads),) or not (spread >= 0).all()):
        raise ValueError(f"spread must be ({len(beads)},) numbers that aren't negative")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(beads))
    n_visited = n_states - round((diverse + uncertain) * n_states)
    n_uncertain = 0 if spread is None else min(round(uncertain * n_states), n_states - n_visited)
    drawn, rest = shuffled[:n_visited], shuffled[n_visited:]
    if n_uncertain:
        # Smallest keys: a weighted draw without replacement (Efraimidis, Spirakis, Inf. Process.
        # Lett. 97, 181 (2006)).
        key = rng.exponential(size=len(rest)) / np.maximum(spread[rest], _TINY)
        order = np.argsort(key, kind="stable")
        drawn = np.concatenate([drawn, rest[order[:n_uncertain]]])
        rest = rest[np.sort(order[n_uncertain:])]
    candidates = rest[: max(_MAX_CANDIDATES, n_states)]
    known = beads[:0] if labelled is None else labelled
    features = state_features(np.concatenate([beads[candidates], beads[drawn], known]), topology)
    here, anchors = features[: len(candidates)], features[len(candidates) :]
    picked = _farthest(here, anchors, n_states - len(drawn))
    return np.sort(np.concatenate([drawn, candidates[picked]])).astype(int)


def _farthest(here: np.ndarray, anchors: np.ndarray, n: int) -> list[int]:
    """Pick n points (N, d), one after another, each farthest from anchors and those picked."""
    if not n:
        return []
    if not here.shape[1]:  # one bead has no shape: all are alike
        return list(range(n))
    nearest = cKDTree(anchors if len(anchors) else here.mean(0, keepdims=True)).query(here)[0] ** 2
    picked = []
    for _ in range(n):
        best = int(np.argmax(nearest))
        picked.append(best)
        np.minimum(nearest, ((here - here[best]) ** 2).sum(1), out=nearest)
        nearest[best] = -1.0  # never again, even among duplicates
    return picked
