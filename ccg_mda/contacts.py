"""What touches what in many frames at once: close pairs of atoms, and bonds through rings.

A fourth coordinate keeps the frames apart, so that one k-d tree serves a batch of them and the
cost stays linear in atoms and frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from MDAnalysis.lib.distances import capped_distance, minimize_vectors, self_capped_distance
from scipy.spatial import cKDTree

from ccg_ase.topology import Topology

LARGEST_RING = 8
_POINTS_PER_PASS = 300_000  # bounds the memory of a pass


class Pairs(NamedTuple):
    """Pairs of atoms: their frame, the two indices (first < second), and the distance in Å."""

    frame: np.ndarray
    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray


class Piercings(NamedTuple):
    """Bonds that pass through rings: frame, row of the ring, row of the bond."""

    frame: np.ndarray
    ring: np.ndarray
    bond: np.ndarray


def passes(
    positions: np.ndarray, box: np.ndarray | None, n_points: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    """Cut frames into batches of bounded memory that share one box: slice, positions, box.

    Parameters
    ----------
    positions
        (n_frames, n_atoms, 3), Å.
    box
        None, or lengths in Å and angles in degrees: (6,), or (n_frames, 6), whose batches are
        single frames.
    n_points
        Points or terms that a frame brings along.
    """
    many = box is not None and np.ndim(box) == 2
    size = 1 if many else max(1, _POINTS_PER_PASS // max(n_points, 1))
    for start in range(0, len(positions), size):
        part = slice(start, start + size)
        yield part, positions[part], box[start] if many else box


def close_pairs(positions: np.ndarray, cutoff_A: float, box: np.ndarray | None = None) -> Pairs:
    """Return all pairs of atoms of one frame that are closer than a cutoff.

    Parameters
    ----------
    positions
        (n_frames, n_atoms, 3), Å, finite.
    cutoff_A
        Å.
    box
        As in `passes`.
    """
    n = positions.shape[1]
    found = [(np.empty(0, int), np.empty(0, int), np.empty(0, int), np.empty(0))]
    # Without a box a pass holds many frames, with one a single frame: periodic images need it.
    for part, x, cell in passes(positions, box, n):
        if cell is None:
            points = _kept_apart(x, cutoff_A)
            pair = cKDTree(points).query_pairs(cutoff_A, output_type="ndarray").astype(int)
            distance = np.linalg.norm(points[pair[:, 0]] - points[pair[:, 1]], axis=1)
            frame, pair = pair[:, 0] // n + part.start, np.sort(pair % n, axis=1)
            found.append((frame, pair[:, 0], pair[:, 1], distance))
            continue
        for k, frame_x in enumerate(x):
            pair, distance = self_capped_distance(frame_x.astype(np.float32), cutoff_A, box=cell)
            pair = np.sort(pair.reshape(-1, 2).astype(int), axis=1)
            frame = np.full(len(pair), part.start + k)
            found.append((frame, pair[:, 0], pair[:, 1], distance.astype(float)))
    return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def small_rings(topology: Topology) -> np.ndarray:
    """Find the smallest ring through every bond, up to `LARGEST_RING` atoms.

    Returns
    -------
    ndarray
        Distinct rings, atoms in order, the last one repeated to fill the row:
        (n_rings, LARGEST_RING).
    """
    around = topology.neighbours()
    ends = [i for i, sites in enumerate(around) if len(sites) == 1]
    alive = [set(sites) for sites in around]
    while ends:  # what hangs on a single bond belongs to no ring
        i = ends.pop()
        for j in alive[i]:
            alive[j].discard(i)
            if len(alive[j]) == 1:
                ends.append(j)
        alive[i] = set()
    rings: dict[frozenset[int], list[int]] = {}
    for i, j in topology.bonds.tolist():
        if j in alive[i]:
            ring = _shortest_way_round(alive, i, j)
            if ring:
                rings.setdefault(frozenset(ring), ring)
    rows = [ring + ring[-1:] * (LARGEST_RING - len(ring)) for ring in rings.values()]
    return np.array(rows, dtype=int).reshape(-1, LARGEST_RING)


def ring_piercings(
    positions: np.ndarray, rings: np.ndarray, bonds: np.ndarray, box: np.ndarray | None = None
) -> Piercings:
    """Find the bonds that pass through the face of a ring; one that shares an atom with it can't.

    Parameters
    ----------
    positions, box
        As in `close_pairs`.
    rings
        From `small_rings`.
    bonds
        (n_bonds, 2).
    """
    found = [(np.empty(0, int),) * 3]
    if len(rings) and len(bonds):
        real = np.diff(rings, axis=1, prepend=-1) != 0  # without the repeated last atoms
        for part, x, cell in passes(positions, box, len(rings) * LARGEST_RING + len(bonds)):
            found.append(_pierced(x, rings, real, bonds, cell, part.start))
    return Piercings(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _pierced(x, rings, real, bonds, box, start):
    """Piercings of one pass, as `Piercings` of frames counted from `start`."""
    corners, ends = x[:, rings], x[:, bonds]
    if box is not None:  # molecules may be broken across the box
        corners = corners[:, :, :1] + _shortest(corners - corners[:, :, :1], box)
        ends = ends[:, :, :1] + _shortest(ends - ends[:, :, :1], box)
    centre = (corners * real[:, :, None]).sum(2) / real.sum(1)[:, None]
    middle = ends.mean(2)
    reach = np.linalg.norm(corners - centre[:, :, None], axis=-1).max()
    reach += 0.5 * np.linalg.norm(ends[:, :, 1] - ends[:, :, 0], axis=-1).max()
    frame, ring, bond = _near(centre, middle, reach, box)
    own = (rings[ring][:, :, None] == bonds[bond][:, None, :]).any((1, 2))
    frame, ring, bond = frame[~own], ring[~own], bond[~own]
    c = centre[frame, ring]
    away = middle[frame, bond] - c
    shift = 0.0 if box is None else _shortest(away, box) - away
    through = _crossed(ends[frame, bond] + shift - c[:, None], corners[frame, ring] - c[:, None])
    return frame[through] + start, ring[through], bond[through]


def _crossed(ends: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Tell which segments (m, 2, 3) pass through polygons (m, k, 3) around the origin, (m,).

    They end on both sides of the mean plane, whose normal is the area vector, and the polygon,
    seen along the segment, winds around it. Unlike a test of triangles, this has no seams.
    """
    after = np.roll(corners, -1, axis=1)
    normal = np.cross(corners, after).sum(1)
    side = (ends * normal[:, None]).sum(-1)
    step = ends[:, 1] - ends[:, 0]
    length = np.linalg.norm(step, axis=-1, keepdims=True)
    axis = (step / np.where(length > 0, length, 1.0))[:, None]
    arms = corners - ends[:, :1]
    arms = arms - (arms * axis).sum(-1, keepdims=True) * axis
    following = np.roll(arms, -1, axis=1)
    sine = (np.cross(arms, following) * axis).sum(-1)
    turn = np.arctan2(sine, (arms * following).sum(-1)).sum(1)
    return (side[:, 0] * side[:, 1] < 0) & (np.abs(turn) > np.pi)


def _near(centres, middles, reach, box):
    """Frame, row of centre and row of middle of all pairs within `reach` in one frame."""
    if box is None:
        trees = [cKDTree(_kept_apart(points, reach)) for points in (centres, middles)]
        pairs = trees[0].sparse_distance_matrix(trees[1], reach, output_type="ndarray")
        i, j = pairs["i"].astype(int), pairs["j"].astype(int)
        return i // centres.shape[1], i % centres.shape[1], j % middles.shape[1]
    rows = []
    for k, (c, m) in enumerate(zip(centres, middles, strict=True)):
        pair = capped_distance(
            c.astype(np.float32), m.astype(np.float32), reach, box=box, return_distances=False
        ).reshape(-1, 2)
        rows.append(np.insert(pair.astype(int), 0, k, axis=1))
    return np.concatenate(rows).T


def _kept_apart(x: np.ndarray, reach: float) -> np.ndarray:
    """Points of all frames, (n_frames * n, 4): the fourth coordinate is far more than `reach`."""
    frame = np.repeat(10.0 * reach * np.arange(len(x)), x.shape[1])
    return np.column_stack([x.reshape(-1, 3), frame])


def _shortest(vectors: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Minimum images of vectors (..., 3)."""
    flat = minimize_vectors(np.ascontiguousarray(vectors.reshape(-1, 3)), np.asarray(box))
    return flat.reshape(vectors.shape)


def _shortest_way_round(around: list[set[int]], i: int, j: int) -> list[int]:
    """Return the shortest path from i to j but for their bond, if it closes a small ring."""
    origin, front = {i: i}, [i]
    for _ in range(LARGEST_RING - 1):
        after = []
        for site in front:
            for other in sorted(around[site]):
                if other in origin or (site, other) == (i, j):
                    continue
                origin[other] = site
                if other == j:
                    path = [j]
                    while path[-1] != i:
                        path.append(origin[path[-1]])
                    return path
                after.append(other)
        front = after
    return []
