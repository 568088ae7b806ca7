"""Internal coordinates of many frames, and the terms of a topology that structure checks need."""

from __future__ import annotations

import numpy as np
from MDAnalysis.lib.distances import calc_angles, calc_bonds, calc_dihedrals, minimize_vectors

from ccg_ase.topology import Topology

from .contacts import passes

_MEASURES = {2: calc_bonds, 3: calc_angles, 4: calc_dihedrals}
_MOST_ROUNDS = 32


def measured(positions: np.ndarray, terms: np.ndarray, box: np.ndarray | None = None) -> np.ndarray:
    """Return bond lengths (Å), angles or dihedrals (rad, IUPAC sign), (n_frames, n_terms).

    Parameters
    ----------
    positions
        (n_frames, n_atoms, 3), Å.
    terms
        Atoms of each term, (n_terms, 2, 3 or 4).
    box
        Lengths in Å and angles in degrees, (6,) or (n_frames, 6); None without periodicity.
    """
    values = np.empty((len(positions), len(terms)))
    if len(terms):
        measure = _MEASURES[terms.shape[1]]
        for part, x, cell in passes(positions, box, len(terms)):
            sites = (x[:, column].reshape(-1, 3) for column in terms.T)
            values[part] = measure(*sites, box=cell).reshape(len(x), -1)
    return values


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Return angles in [-π, π)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def signed_volumes(
    positions: np.ndarray, centres: np.ndarray, box: np.ndarray | None = None
) -> np.ndarray:
    """Return the triple product of the four neighbours of each centre, (n_frames, n), in Å³.

    (a - d) · ((b - d) x (c - d)), six times the signed volume of their tetrahedron.

    Parameters
    ----------
    positions, box
        As in `measured`.
    centres
        From `stereo_centres`.
    """
    volumes = np.empty((len(positions), len(centres)))
    for part, x, cell in passes(positions, box, 4 * len(centres)):
        corners = x[:, centres[:, 1:]]
        edges = corners[:, :, :3] - corners[:, :, 3:]
        if cell is not None:
            flat = np.ascontiguousarray(edges.reshape(-1, 3))
            edges = minimize_vectors(flat, np.asarray(cell)).reshape(edges.shape)
        a, b, c = np.moveaxis(edges, 2, 0)
        volumes[part] = (a * np.cross(b, c)).sum(-1)
    return volumes


def site_classes(topology: Topology) -> np.ndarray:
    """Return the same number for atoms that their bonds don't tell apart, (n,).

    Colours of elements, refined by those of the neighbours until nothing changes (Weisfeiler and
    Leman 1968). Blind to geometry: the two hydrogens of a CH2 group have one class.
    """
    i, j = topology.bonds.T
    colour = _mixed(
        np.unique(np.array(topology.elements), return_inverse=True)[1].astype(np.uint64)
    )
    n_classes = 0
    for _ in range(_MOST_ROUNDS):
        # Sums don't depend on the order of the neighbours; mixed 64-bit numbers don't collide.
        total = np.zeros_like(colour)
        np.add.at(total, i, colour[j])
        np.add.at(total, j, colour[i])
        colour = _mixed(3 * colour + total)
        number = np.unique(colour, return_inverse=True)[1]
        if number.max() + 1 == n_classes:
            break
        n_classes = number.max() + 1
    return number


def _mixed(number: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers one to one (splitmix64; Steele, Lea, Flood, OOPSLA 2014)."""
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def stereo_centres(topology: Topology, kind: np.ndarray) -> np.ndarray:
    """Return atoms whose handedness matters, each with its four neighbours, (n_centres, 5).

    Atoms with four neighbours that are all of different classes, or three of which are heavy and
    one is hydrogen. The latter takes in centres such as CB of valine, of which only the labels
    have a handedness. ``kind`` is from `site_classes`.
    """
    heavy = np.array(topology.elements) != "H"
    rows = [
        [centre, *sites]
        for centre, sites in enumerate(topology.neighbours())
        if len(sites) == 4 and (len(set(kind[sites])) == 4 or heavy[sites].sum() == 3)
    ]
    return np.array(rows, dtype=int).reshape(-1, 5)


def proper_torsions(
    topology: Topology, rings: np.ndarray, kind: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return one torsion per bond that has neighbours at both ends.

    The end atoms are the heaviest-branched neighbours: heavy before hydrogen, many bonds before
    few, low index before high. For a peptide bond this is ω, CA-C-N-CA.

    Parameters
    ----------
    topology
        Of the atoms.
    rings, kind
        From `small_rings` and `site_classes`.

    Returns
    -------
    torsions, isomers, in_ring, fold
        Atoms i-j-k-l, (n, 4). Whether the bond may have cis and trans isomers: neither j nor k is
        tetrahedral (four neighbours or more), and neither has like neighbours only. Whether the
        bond lies in a ring. Number of turns of 2π/fold that only swap like neighbours (three for a
        methyl group, two for phenyl). (n,) each.
    """
    around, heavy = topology.neighbours(), np.array(topology.elements) != "H"
    edges = np.sort(np.stack([rings, np.roll(rings, -1, axis=1)], -1).reshape(-1, 2), axis=1)
    in_rings = set(map(tuple, edges.tolist()))

    def arm(j: int, k: int) -> tuple[int, int]:
        """Return the end atom on the side of j, and how many like ones there are."""
        others = [i for i in around[j] if i != k]
        best = min(others, key=lambda i: (not heavy[i], -len(around[i]), i))
        alike = all(kind[i] == kind[best] for i in others)
        return best, len(others) if alike else 1

    torsions, isomers, in_ring, fold = [], [], [], []
    for j, k in topology.bonds.tolist():
        if len(around[j]) > 1 and len(around[k]) > 1:
            (i, n_first), (m, n_last) = arm(j, k), arm(k, j)
            if i == m:  # a ring of three
                continue
            torsions.append((i, j, k, m))
            isomers.append(len(around[j]) < 4 and len(around[k]) < 4 and n_first == n_last == 1)
            in_ring.append((j, k) in in_rings)
            fold.append(max(n_first, n_last))
    return (
        np.array(torsions, dtype=int).reshape(-1, 4),
        np.array(isomers, dtype=bool),
        np.array(in_ring, dtype=bool),
        np.array(fold, dtype=int),
    )


def term_name(topology: Topology, sites: np.ndarray) -> str:
    """Name a term by its atoms and the residue of the first of them, e.g. ``N-CA (ALA 2)``."""
    atoms = "-".join(topology.names[i] for i in sites)
    first = sites[0]
    return f"{atoms} ({topology.resnames[first]} {topology.resids[first]})"
