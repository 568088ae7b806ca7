"""Generalised equipartition: what temperature the forces of a trajectory say.

For any field v(r) of displacements, in equilibrium without constraints, box or external field,

    -<sum_i v_i . f_i> = kT <div v>

v_i = r_i - r_c (centroid) is the virial theorem, div v = 3n - 3. Its noise comes from the bonds,
which are stiff and far from zero length: each adds k r (r - r0), of which only k (r - r0)^2 says
something. So the mean length c of every bond that is in no ring is taken off, by c times the field
that moves one side of the bond rigidly along it, whose divergence is 2/r. On alanine dipeptide that
cuts the standard deviation per frame from 3.3 to 0.31.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import connected_components

from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy

LARGEST = 2e9  # frames x bonds x atoms in one evaluation: seconds


def equipartition_ratio(
    positions: np.ndarray, forces: np.ndarray, topology: Topology, temperature_K: float
) -> tuple[float, float]:
    """Return -<v.f> / kT<div v>, which is 1 for forces in eV/Å at the given temperature.

    Parameters
    ----------
    positions, forces
        (N, n, 3) in Å and eV/Å; the molecule whole.
    topology
        Its bonds.
    temperature_K
        Assumed temperature.

    Returns
    -------
    ratio, error
        The error is that of 20 block means (infinite for a single frame).
    """
    bonds, sides = _bridges(topology)
    stride = int(np.ceil(max(1.0, len(positions) * sides.size / LARGEST)))
    positions, forces = positions[::stride], forces[::stride]
    arms = positions - positions.mean(axis=1, keepdims=True)
    virial = -np.einsum("fik,fik->f", arms, forces)
    along = positions[:, bonds[:, 1]] - positions[:, bonds[:, 0]]
    length = np.linalg.norm(along, axis=-1)
    moved = np.einsum("bi,fik->fbk", sides, forces, optimize=True)
    stretch = -np.einsum("fbk,fbk->fb", along, moved) / length
    virial -= stretch @ length.mean(axis=0)
    divergence = 3 * len(topology) - 3
    divergence -= 2 * (length.mean(axis=0) * (1 / length).mean(axis=0)).sum()
    ratios = virial / (divergence * thermal_energy(temperature_K))
    blocks = [block.mean() for block in np.array_split(ratios, min(20, len(ratios)))]
    if len(blocks) == 1:
        return float(ratios.mean()), np.inf
    return float(ratios.mean()), float(np.std(blocks, ddof=1) / np.sqrt(len(blocks)))


def _bridges(topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Bonds in no ring, (b, 2), and for each the atoms on the side of its second atom, (b, n)."""
    bonds, sides = [], []
    graph = topology.adjacency.tolil()
    for i, j in topology.bonds:
        graph[i, j] = graph[j, i] = 0
        _, part = connected_components(graph.tocsr())
        graph[i, j] = graph[j, i] = 1
        if part[i] != part[j]:
            bonds.append((i, j))
            sides.append(part == part[j])
    n = len(topology)
    return np.array(bonds, int).reshape(-1, 2), np.array(sides, float).reshape(-1, n)
