from itertools import product

import numpy as np
import pytest
from ase.geometry import cell_to_cellpar
from ase.neighborlist import primitive_neighbor_list

from ccg_ase import Topology, graph
from ccg_ase.graph import (
    BondClasses,
    batch_neighbours,
    batch_radius_edges,
    cell_of,
    radius_edges,
)

CELLS = {
    "cubic": np.diag([9.0, 9, 9]),
    "slab": np.diag([20.0, 4, 7]),
    "skewed": np.array([[8.0, 0, 0], [5, 7, 0], [-4, 3, 6]]),
    "turned": np.array([[1.0, 7, 2], [-6, 1, 3], [2, -3, 9]]),
    "left-handed": np.array([[0.0, 6, 0], [6, 0, 0], [2, 1, 7]]),
    "tiny": np.array([[2.5, 0, 0], [1, 2.5, 0], [0, 1, 3]]),
}


def sites(cell, n=25):
    """Sites in several cells around the first, one on a corner and one just outside of a face."""
    fractional = np.random.default_rng(1).uniform(-1.5, 2.5, size=(n, 3))
    fractional[0], fractional[1] = 0, [-1e-17, 0.5, 1]
    return fractional @ cell


def as_set(edges, images):
    return set(zip(*edges.tolist(), *images.T.tolist(), strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_periodic_edges_are_those_of_ase_and_of_brute_force(name):
    cell, cutoff = CELLS[name], 4.9  # no pair is exactly this far apart
    x = sites(cell)
    edges, images, lengths = radius_edges(x, cutoff, cell)
    target, source, shifts = primitive_neighbor_list("ijS", (True,) * 3, cell, x, cutoff)
    assert as_set(edges, images) == as_set(np.stack([source, target]), shifts)
    assert len(as_set(edges, images)) == len(lengths)
    vectors = x[edges[0]] + images @ cell - x[edges[1]]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), lengths, rtol=0, atol=1e-12)
    assert np.all(np.diff(edges[1]) >= 0)
    # Brute force over images of wrapped sites, which are at most 6 cells apart.
    wrapped = x - np.floor(x @ np.linalg.inv(cell)) @ cell
    shifts = np.array(list(product(range(-6, 7), repeat=3))) @ cell
    apart = wrapped[:, None, None] + shifts - wrapped[:, None]
    within = np.linalg.norm(apart, axis=-1) <= cutoff
    assert within.sum() - len(x) == len(lengths)


def test_open_edges_are_those_of_all_distances():
    x = 4 * np.random.default_rng(0).normal(size=(60, 3))
    edges, images, lengths = radius_edges(x, 5.0)
    distances = np.linalg.norm(x[:, None] - x, axis=-1)
    target, source = np.nonzero((distances <= 5) & ~np.eye(60, dtype=bool))
    order = np.lexsort(edges)
    np.testing.assert_array_equal(edges[:, order], [source, target])
    np.testing.assert_allclose(lengths[order], distances[target, source], rtol=1e-14)
    assert np.all(np.diff(edges[1]) >= 0)
    assert not images.any()


@pytest.mark.parametrize("name", CELLS)
def test_edges_dont_depend_on_where_molecules_are_wrapped(name):
    cell = CELLS[name]
    x = np.random.default_rng(1).random((25, 3)) @ cell
    cells = np.random.default_rng(2).integers(-3, 4, size=(25, 3))
    edges, images, lengths = radius_edges(x, 4.0, cell)
    moved, shifted, same = radius_edges(x + cells @ cell, 4.0, cell)
    back = shifted + cells[moved[0]] - cells[moved[1]]
    assert as_set(edges, images) == as_set(moved, back)
    np.testing.assert_allclose(np.sort(lengths), np.sort(same), rtol=0, atol=1e-12)


def test_lengths_and_angles_are_a_cell():
    for name in ("cubic", "skewed", "turned"):
        cell, x = CELLS[name], sites(CELLS[name])
        standard = cell_of(cell_to_cellpar(cell))
        np.testing.assert_allclose(standard @ standard.T, cell @ cell.T, atol=1e-12)
        turned = x @ np.linalg.inv(cell) @ standard
        found = radius_edges(turned, 5.0, cell_to_cellpar(cell))
        assert as_set(*found[:2]) == as_set(*radius_edges(x, 5.0, cell)[:2])


def test_batch_is_the_disjoint_union():
    frames = np.random.default_rng(0).uniform(0, 9, size=(3, 20, 3))
    boxes = np.stack([CELLS[name] for name in ("cubic", "skewed", "turned")])
    for cells in (boxes, None):
        edges, images, lengths = batch_radius_edges(frames, 4.0, cells)
        for b in range(3):
            alone = radius_edges(frames[b], 4.0, None if cells is None else cells[b])
            own = edges[1] // 20 == b
            np.testing.assert_array_equal(edges[:, own] - 20 * b, alone[0])
            np.testing.assert_array_equal(images[own], alone[1])
            np.testing.assert_array_equal(lengths[own], alone[2])


def test_no_edges():
    for n in (0, 1, 2):
        edges, images, lengths = radius_edges(np.arange(3 * n).reshape(n, 3) * 9.0, 3.0)
        assert (edges.shape, images.shape, lengths.shape) == ((2, 0), (0, 3), (0,))


def test_bond_classes_are_the_bond_distances_up_to_four():
    bonds = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (2, 6), (6, 7), (7, 2), (9, 10)]
    topology = Topology(names="A" * 11, masses=[1] * 11, bonds=bonds)
    i, j = np.indices((11, 11)).reshape(2, -1)
    hops = topology.hops()[i, j]
    np.testing.assert_array_equal(BondClasses(topology)(i, j), np.where(hops <= 4, hops, 0))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (np.zeros(6), "no volume"),
        (np.diag([1.0, 1, 0]), "no volume"),
        ([9, 9, 9], "shape"),
        ([9, 9, 0, 90, 90, 90], "no volume"),
    ],
)
def test_refuses_boxes(box, message):
    with pytest.raises(ValueError, match=message):
        radius_edges(np.zeros((2, 3)), 3.0, box)


def test_refuses_positions_that_are_not_finite():
    with pytest.raises(ValueError, match="site 1 isn't"):
        radius_edges(np.array([[0, 0, 0], [0, np.nan, 0]]), 3.0)


@pytest.mark.parametrize("few", [0, 10**9], ids=["tree", "all distances"])
def test_neighbours_of_places_are_those_of_all_distances(few, monkeypatch):
    monkeypatch.setattr(graph, "_FEW_PAIRS", few)
    rng = np.random.default_rng(0)
    queries, sites = rng.uniform(100.0, 120.0, (3, 40, 3)), rng.uniform(100.0, 120.0, (3, 300, 3))
    frame, query, site, shift = batch_neighbours(queries, sites, None, 4.0)
    lengths = np.linalg.norm(sites[frame, site] - queries[frame, query], axis=-1)
    assert lengths.max() < 4.02
    assert not shift.any()
    found = set(zip(frame[lengths < 4.0], query[lengths < 4.0], site[lengths < 4.0], strict=True))
    apart = np.linalg.norm(sites[:, None] - queries[:, :, None], axis=-1)
    assert found == set(zip(*np.nonzero(apart < 4.0), strict=True))
    assert len(found) > 500
    assert all(len(a) == 0 for a in batch_neighbours(queries, sites[:, :0], None, 4.0))


def test_neighbours_in_a_cell_are_those_of_all_images():
    rng, cell = np.random.default_rng(1), np.array([[9.0, 0, 0], [2.0, 8.0, 0], [-1.0, 3.0, 10.0]])
    queries, sites = rng.uniform(-20.0, 20.0, (2, 5, 3)), rng.uniform(-20.0, 20.0, (2, 12, 3))
    frame, query, site, shift = batch_neighbours(queries, sites, np.stack([cell] * 2), 6.0)
    found = np.linalg.norm(sites[frame, site] + shift - queries[frame, query], axis=-1)
    turns = np.array(list(product(range(-9, 10), repeat=3))) @ cell
    for b, k in product(range(2), range(5)):
        apart = np.linalg.norm(sites[b, :, None] + turns - queries[b, k], axis=-1)
        expected = np.sort(apart[apart < 6.0])
        mine = (frame == b) & (query == k)
        np.testing.assert_allclose(np.sort(found[mine]), expected, atol=1e-10)
