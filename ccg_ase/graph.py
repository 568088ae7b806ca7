"""Edges of bead systems: all pairs, or all within a radius, with periodic images."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from ase.geometry import cellpar_to_cell
from scipy.spatial import cKDTree
from vesin import NeighborList

from ccg_ase.topology import Topology

MAX_BOND_CLASS = 4
"""Bond distances 1 to 4 are classes of their own; class 0 is everything farther."""

Vectors = TypeVar("Vectors", np.ndarray, torch.Tensor)
_FEW_PAIRS = 200_000  # of a frame: tried one by one rather than searched in a tree
_MARGIN_A = 0.01  # by which single precision may misjudge a distance


def all_pairs(n: int) -> torch.Tensor:
    """Return all ordered pairs of n sites as (source, target), shape (2, n(n-1)), by target."""
    target, source = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    apart = source != target
    return torch.stack([source[apart], target[apart]])


class BondClasses:
    """Look-up of the bond-distance class of pairs of sites, sparse and linear in their number.

    Class 1 to 4 is the number of bonds between the two sites, 0 is farther or not connected.

    Parameters
    ----------
    topology
        The n sites and their bonds.
    """

    def __init__(self, topology: Topology):
        self._n = len(topology)
        near = topology.near(np.arange(self._n), MAX_BOND_CLASS)
        keys = near.source * self._n + near.site
        order = np.argsort(keys)
        self._keys, self._classes = keys[order], near.distance[order]

    def __call__(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return the class of every pair of sites, shape (E,)."""
        keys = source * self._n + target
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._classes[place], 0)


def minimum_image(vectors: Vectors, box: Vectors) -> Vectors:
    """Move vectors (..., 3) by cells (..., 3, 3) to within half a cell along every cell vector.

    That is the nearest image of vectors much shorter than the box, as those along bonds are.
    """
    library = torch if isinstance(vectors, torch.Tensor) else np
    fractional = (vectors[..., None, :] @ library.linalg.inv(box))[..., 0, :]
    if library is torch:
        fractional = fractional.detach()
    return vectors - (library.round(fractional)[..., None, :] @ box)[..., 0, :]


def near_origin(beads: torch.Tensor, box: torch.Tensor | None) -> torch.Tensor:
    """Centre frames (B, n, 3), or move every bead into its box (..., 3, 3).

    Energies stay the same, and lower precision then loses no digits of beads that drifted far.
    """
    if box is None:
        return beads - beads.mean(1, keepdim=True)
    return beads - (beads @ torch.linalg.inv(box)).floor() @ box


def cell_of(box: np.ndarray) -> np.ndarray:
    """Return the cell with the box vectors in its rows, shape (3, 3), in Å.

    Parameters
    ----------
    box
        Cell vectors (3, 3), or lengths in Å and angles in degrees (6,), as MDAnalysis and ASE
        write them; the first vector then lies along x, the second in the xy plane.

    Raises
    ------
    ValueError
        If the shape is another one or the box has no volume.
    """
    box = np.asarray(box, dtype=float)
    if box.shape not in ((3, 3), (6,)):
        raise ValueError(f"a box must have shape (3, 3) or (6,), got {box.shape}")
    cell = cellpar_to_cell(box) if box.shape == (6,) and np.all(box > 0) else box
    if cell.shape != (3, 3) or not np.isfinite(cell).all() or not abs(np.linalg.det(cell)) > 0:
        raise ValueError(
            f"the box {box.tolist()} has no volume: pass one that is periodic along all three "
            "vectors, or None for a system in open space"
        )
    return cell


def radius_edges(
    positions: np.ndarray, cutoff_A: float, box: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find all ordered pairs of sites, and of sites and images, within a distance.

    By vesin's cell lists: time and memory grow with the number of edges. In boxes smaller than the
    cut-off, a site sees several images of another, and of itself.

    Parameters
    ----------
    positions
        Å, shape (n, 3); in a box, inside of it or not.
    cutoff_A
        Greatest distance in Å.
    box
        Periodic box, see `cell_of`; None for open space.

    Returns
    -------
    edges
        (source, target) of every edge, shape (2, E), by target.
    images
        Cell of the source when the target is in cell 0, integer, shape (E, 3): the edge is the
        vector ``positions[source] + images @ cell - positions[target]``.
    lengths
        Å, shape (E,).

    Raises
    ------
    ValueError
        If the box is none (see `cell_of`) or a position isn't finite.
    """
    positions = np.asarray(positions, dtype=float)
    if not np.all(np.isfinite(positions)):
        raise ValueError(
            f"site {np.argwhere(~np.isfinite(positions))[0, 0]} isn't at finite x, y, z"
        )
    cell = np.zeros((3, 3)) if box is None else cell_of(box)
    search = NeighborList(cutoff=cutoff_A, full_list=True, sorted=True, n_threads=1)
    target, source, image, length = search.compute(positions, cell, box is not None, "ijSd")
    return np.stack([source, target]).astype(int), image.astype(int), length


def _with_images(
    positions: np.ndarray, cutoff_A: float, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return index, cell shift and place of sites within a cell, then of images around it."""
    inverse = np.linalg.inv(cell)
    # Distances between opposite faces are the inverse lengths of the reciprocal vectors.
    margin = cutoff_A * np.linalg.norm(inverse, axis=0)
    fractional = positions @ inverse
    image = -np.floor(fractional).astype(int)
    fractional, site = fractional + image, np.arange(len(positions))
    for axis, width in enumerate(margin):
        parts = []
        for shift in sorted(range(-int(np.ceil(width)), int(np.ceil(width)) + 1), key=abs):
            moved = fractional[:, axis] + shift
            # Sites of the cell itself come first, and all of them stay.
            near = np.flatnonzero((moved >= -width) & (moved <= 1 + width))
            step = shift * np.eye(3, dtype=int)[axis]
            parts.append((fractional[near] + step, image[near] + step, site[near]))
        fractional, image, site = (np.concatenate(column) for column in zip(*parts, strict=True))
    return site, image, positions[site] + image @ cell


def batch_neighbours(
    queries: np.ndarray, sites: np.ndarray, boxes: np.ndarray | None, cutoff_A: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the sites, and images of sites, around some places in every frame of a batch.

    Some pairs just beyond the distance may be among them.

    Parameters
    ----------
    queries, sites
        Å, shapes (B, m, 3) and (B, n, 3); in a box, inside of it or not.
    boxes
        Periodic box of every frame, shape (B, 3, 3) or (B, 6); None for open space.
    cutoff_A
        Distance in Å.

    Returns
    -------
    frame, query, site, shift
        Of every pair, shapes (E,), and (E, 3) in Å: the pair is the vector
        ``sites[frame, site] + shift - queries[frame, query]``.
    """
    if boxes is None and queries.shape[1] * sites.shape[1] <= _FEW_PAIRS:
        centre = queries.mean(1, keepdims=True)
        q, x = ((a - centre).astype(np.float32) for a in (queries, sites))
        square = (q * q).sum(-1)[:, :, None] + (x * x).sum(-1)[:, None] - 2.0 * (q @ x.mT)
        found = np.flatnonzero(square < (cutoff_A + _MARGIN_A) ** 2)
        return *np.unravel_index(found, square.shape), np.zeros((len(found), 3))
    pairs = [
        _neighbours(*of_frame, None if boxes is None else boxes[b], cutoff_A)
        for b, of_frame in enumerate(zip(queries, sites, strict=True))
    ]
    frame = np.repeat(np.arange(len(pairs)), [len(query) for query, _, _ in pairs])
    return frame, *(np.concatenate(column) for column in zip(*pairs, strict=True))


def _neighbours(
    queries: np.ndarray, sites: np.ndarray, box: np.ndarray | None, cutoff_A: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query, site and shift of all pairs of one frame."""
    site, shift, turned = np.arange(len(sites)), np.zeros_like(sites), np.zeros_like(queries)
    if box is not None:
        cell = cell_of(box)
        site, image, _ = _with_images(sites, cutoff_A, cell)
        shift, turned = image @ cell, np.floor(queries @ np.linalg.inv(cell)) @ cell
    one, other = (
        cKDTree(places, balanced_tree=False) for places in (queries - turned, sites[site] + shift)
    )
    found = one.sparse_distance_matrix(other, cutoff_A, output_type="ndarray")
    query, entry = found["i"], found["j"]
    return query, site[entry], shift[entry] + turned[query]


def batch_radius_edges(
    positions: np.ndarray, cutoff_A: float, boxes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the edges of a batch of frames as one graph of disjoint parts.

    Parameters
    ----------
    positions
        Å, shape (B, n, 3); site i of frame b is site ``b * n + i`` of the union.
    cutoff_A
        Greatest distance in Å.
    boxes
        Periodic box of every frame, shape (B, 3, 3) or (B, 6); None for open space.

    Returns
    -------
    tuple of np.ndarray
        Edges, images and lengths, as `radius_edges` returns them.
    """
    n = positions.shape[1]
    frames = [
        radius_edges(frame, cutoff_A, None if boxes is None else boxes[b])
        for b, frame in enumerate(positions)
    ]
    edges, images, lengths = zip(*frames, strict=True)
    edges = [pairs + b * n for b, pairs in enumerate(edges)]
    return np.concatenate(edges, axis=1), np.concatenate(images), np.concatenate(lengths)
