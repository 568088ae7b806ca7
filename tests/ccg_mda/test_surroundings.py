"""What torsions see through space, against sums over all atoms and images written out."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from systems import flow_of, system

from ccg_mda import Backmapper
from ccg_mda.placement import local_frames

TRICLINIC = np.array([[14.0, 0.0, 0.0], [3.0, 13.0, 0.0], [-2.0, 4.0, 15.0]])


def is_seen(flow: Backmapper, atom: int, slot: int) -> bool:
    """Whether an atom is placed before a slot, and isn't a hydrogen on carbon."""
    topology, placement = flow.cg_map.atoms, flow.placement
    bonded = {topology.elements[k] for k in topology.neighbours()[atom]}
    implied = topology.elements[atom] == "H" and "C" in bonded
    return not implied and placement.ready[atom] < placement.generation[slot]


def moments(
    flow: Backmapper, slot: int, x: np.ndarray, origin: np.ndarray, frame: np.ndarray, box
) -> tuple[np.ndarray, ...]:
    """Return the moments 0, 1 and 2 (traceless) of the density around a slot, by channel."""
    around, elements = flow.conditioner.surroundings, flow.cg_map.atoms.elements
    radial, embedding = around.radial.numpy(), around.embedding.numpy()
    width = (around.cutoff_A - 1.0) / len(radial)
    cells = product((-2, -1, 0, 1, 2), repeat=3) if box is not None else [(0, 0, 0)]
    shifts = np.array(list(cells)) @ (np.eye(3) if box is None else box)
    found = [0.0, 0.0, 0.0]
    for j in (j for j in range(len(x)) if is_seen(flow, j, slot)):
        for v in (x[j] + shifts - origin) @ frame.T:
            square = v @ v
            if square < around.cutoff_A**2:
                r = np.sqrt(square + 1e-6)  # smooth also at the atom that the bond ends at
                waves = np.exp(-0.5 * ((r - 1.0) / width - np.arange(len(radial))) ** 2)
                value = waves @ radial * embedding[sorted(set(elements)).index(elements[j])]
                value = value * (1.0 - square / around.cutoff_A**2) ** 3
                u = v / r
                found[0] = found[0] + value
                found[1] = found[1] + u[:, None] * value
                found[2] = found[2] + (np.outer(u, u) - np.eye(3) * (u @ u) / 3)[..., None] * value
    return tuple(found)


@pytest.mark.parametrize("box", [None, TRICLINIC], ids=["open", "triclinic"])
@pytest.mark.parametrize("kind", ["two dipeptides", "torsions"])
def test_density_is_the_sum_over_earlier_atoms(kind, box):
    flow, x = flow_of(kind), system(kind).frames[:2]
    around, conditioner = flow.conditioner.surroundings, flow.conditioner
    x = x + 20.0  # outside of the cell
    points = flow.assembly.points(flow.cg_map.apply(x), x)
    looks = torch.nonzero(around.looks)[:, 0]
    origin, frame = local_frames(points, conditioner.references[looks])
    cells = None if box is None else torch.from_numpy(box).expand(2, 3, 3)
    found = around.features(looks, origin.transpose(0, 1), frame.transpose(0, 1), points, cells)
    assert len(looks) > 3
    n_seen = 0
    for k, block in enumerate(looks):
        slot = int(conditioner.slot[block])
        place = (a[1, k].numpy() for a in (origin, frame))
        zeroth, first, second = moments(flow, slot, x[1].numpy(), *place, box)
        n_seen += np.any(first)
        a = found[k, 1].numpy()
        np.testing.assert_allclose(a[0] * (4 * np.pi) ** 0.5, zeroth, atol=1e-5)
        np.testing.assert_allclose(
            a[1:4] * (4 * np.pi / 3) ** 0.5, first + np.zeros((3, 8)), atol=1e-5
        )
        # Sum rule: Σ_m Y_2m(u) Y_2m(v) = 5/4π P_2(u·v).
        squares = (second * second * np.ones((3, 3, 8))).sum((0, 1)) * 15 / (8 * np.pi)
        np.testing.assert_allclose((a[4:] ** 2).sum(0), squares, atol=1e-5)
    assert n_seen > len(looks) / 2
