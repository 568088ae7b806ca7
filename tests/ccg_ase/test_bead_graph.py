import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ccg_ase import Encoder, Topology, bead_graph
from ccg_ase.bead_graph import BeadGraph
from ccg_ase.graph import BondClasses

SKEWED = torch.tensor([[11.0, 0, 0], [4, 10, 0], [-3, 2, 9]], dtype=torch.float64)


def molecules(count, n_each=3):
    """Chains of beads of types 0, 1, 2, ..., 0, 1, 2, ...."""
    bonds = [(k * n_each + i, k * n_each + i + 1) for k in range(count) for i in range(n_each - 1)]
    n = count * n_each
    return Topology(names="A" * n, masses=[1] * n, bonds=bonds), torch.arange(n) % n_each


def system(count=6, n_each=3, cutoff_A=5.0, **sizes):
    torch.manual_seed(0)
    encoder = Encoder(n_each, channels=3, cutoff_A=cutoff_A, **sizes).double()
    topology, types = molecules(count, n_each)
    return encoder, BeadGraph(topology, cutoff_A, types)


def frames(count=6, n_each=3, batch=2, seed=1):
    rng = np.random.default_rng(seed)
    first = rng.uniform(0, 9, size=(batch, count, 1, 3))
    steps = 0.8 * rng.normal(size=(batch, count, n_each - 1, 3))
    x = np.concatenate([first, first + steps.cumsum(2)], axis=2)
    return torch.from_numpy(x.reshape(batch, -1, 3))


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=atol)  # sums in another order


@pytest.mark.parametrize("cutoff_A", [2.0, 5.0, 50.0])
def test_both_routes_give_the_same(cutoff_A, monkeypatch):
    encoder, graph = system(cutoff_A=cutoff_A)
    x = frames().requires_grad_()
    dense = graph.features(encoder, x)
    monkeypatch.setattr(bead_graph, "ALL_PAIRS_AT_MOST", 0)
    sparse = graph.features(encoder, x)
    assert dense.shape == sparse.shape
    assert sparse.is_contiguous()
    close(dense, sparse)
    probe = torch.randn_like(dense)
    (a,) = torch.autograd.grad((dense * probe).sum(), x)
    (b,) = torch.autograd.grad((sparse * probe).sum(), x)
    close(a, b)


@pytest.mark.parametrize("trained", [True, False])
def test_working_in_blocks_changes_nothing(monkeypatch, trained):
    """Nor for the gradient, which blocks add up by themselves where nothing is trained."""
    encoder, graph = system()
    encoder.requires_grad_(trained)
    x = frames().requires_grad_()
    box = SKEWED.expand(2, 3, 3).clone().requires_grad_()
    results = []
    for edges_per_block in (1, 50, 8192):  # a block for each site, several blocks, one block
        monkeypatch.setattr(bead_graph, "_EDGES_PER_BLOCK", edges_per_block)
        features = graph.features(encoder, x, box)
        results.append((features, *torch.autograd.grad((features**2).sum(), (x, box))))
    for blocks in results[:-1]:
        for found, expected in zip(blocks, results[-1], strict=True):
            close(found, expected, atol=1e-12)


def test_a_wide_box_is_open_space():
    encoder, graph = system()
    box = 200 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    close(graph.features(encoder, frames(), box), graph.features(encoder, frames()))


def test_frames_of_a_batch_have_their_own_boxes():
    encoder, graph = system()
    x, box = frames(), torch.stack([SKEWED, 1.3 * SKEWED])
    together = graph.features(encoder, x, box)
    for b in range(2):
        close(together[..., b : b + 1], graph.features(encoder, x[b : b + 1], box[b : b + 1]))


@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_box_translations_of_single_beads_change_nothing(scale):
    """Also where the box is smaller than the cut-off, and molecules are torn by wrapping."""
    encoder, graph = system()
    x, box = frames(), (scale * SKEWED).expand(2, 3, 3)
    cells = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, size=(2, 18, 3))).double()
    close(graph.features(encoder, x + cells @ box, box), graph.features(encoder, x, box))


def test_a_supercell_is_the_cell_many_times():
    """Images, those of the bead itself among them, act as real beads do. Two independent graphs."""
    cell = 0.55 * SKEWED  # faces 4.95, 5.0, 4.5 Å apart: less than the cut-off
    encoder, graph = system(count=2)
    x = frames(count=2, batch=1)
    shifts = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3) @ cell
    many = (x[0] + shifts[:, None]).reshape(1, -1, 3)
    topology, types = molecules(16)
    large = BeadGraph(topology, 5.0, types)
    small = graph.features(encoder, x, cell[None]).squeeze(-1)
    expected = small.repeat(1, 1, 8)
    close(large.features(encoder, many, 2 * cell[None]).squeeze(-1), expected)


def test_permuting_identical_molecules_permutes_the_features():
    encoder, graph = system()
    order = torch.from_numpy(np.random.default_rng(0).permutation(6))
    site = (3 * order[:, None] + torch.arange(3)).flatten()
    x, box = frames(), SKEWED.expand(2, 3, 3)
    for cell in (box, None):
        features = graph.features(encoder, x, cell)
        close(graph.features(encoder, x[:, site], cell), features[:, :, site], atol=1e-12)


def test_derivatives_in_positions_and_box():
    encoder, graph = system(count=1, n_radial=2)
    x = frames(count=1, batch=1).requires_grad_()
    box = (0.5 * SKEWED)[None].clone().requires_grad_()

    def weighted(x, box):
        return (graph.features(encoder, x, box) ** 2).sum() / 100

    assert gradcheck(weighted, (x, box))
    assert gradgradcheck(weighted, (x, box))


@pytest.mark.parametrize("periodic", [False, True])
def test_twice_smooth_where_edges_come_and_go(periodic, monkeypatch):
    monkeypatch.setattr(bead_graph, "ALL_PAIRS_AT_MOST", 0)
    encoder, _ = system()
    graph = BeadGraph(Topology(names="AB", masses=[1, 1]), 5.0, torch.tensor([0, 1]))
    box = 13 * torch.eye(3, dtype=torch.float64)[None] if periodic else None
    seen = []
    for distance in (5 - 1e-4, 5 + 1e-4):
        x = torch.zeros(1, 2, 3, dtype=torch.float64)
        # In the box, the image at -13 Å is the one at this distance.
        x[0, 1, 0] = 13 - distance if periodic else distance
        x.requires_grad_()
        value = graph.features(encoder, x, box).sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        second = torch.zeros(())
        if first.requires_grad:
            (second,) = torch.autograd.grad(first[0, 1, 0], x)
            second = second[0, 1, 0]
        seen.append([value.item(), first[0, 1, 0].item(), second.item()])
    below, above = np.array(seen)
    assert above[1] == above[2] == 0
    assert below[1] != 0
    np.testing.assert_allclose(below, above, atol=1e-2 * 5.0**-2)


def test_lonely_beads():
    encoder, graph = system(count=1, n_each=1)
    x = torch.zeros(2, 1, 3, dtype=torch.float64)
    box = 30 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    features = graph.features(encoder, x, box)
    assert features.isfinite().all()
    close(features, graph.features(encoder, x))


def test_only_the_nearest_image_is_bonded():
    topology, types = molecules(1, 2)
    graph = BeadGraph(topology, 5.0, types)
    x = torch.tensor([[[0.0, 0, 0], [3.5, 0, 0]]], dtype=torch.float64)  # the image is at -0.5 Å
    box = torch.diag(torch.tensor([4.0, 20, 20], dtype=torch.float64))[None]
    edges, _, lengths, bonded = graph._radius_graph(x, box)
    np.testing.assert_allclose(lengths[bonded == 1], 0.5)
    assert (bonded == 1).sum() == 2
    assert set(np.round(lengths[(bonded == 0) & (edges[0] != edges[1])], 9)) == {3.5, 4.5}


@pytest.mark.parametrize("box", [None, SKEWED])
def test_statistics_are_those_of_pooled_distances(box):
    encoder, graph = system(count=12)
    x = frames(count=12, batch=20)
    cells = None if box is None else box.expand(20, 3, 3)
    topology, types = molecules(12)
    classes = BondClasses(topology)
    pooled = {}
    images = torch.cartesian_prod(*[torch.arange(-2.0, 3, dtype=torch.float64)] * 3)
    shifts = torch.zeros(1, 3) if box is None else images @ box
    for frame in x:
        vectors = frame[None] + shifts[:, None, None] - frame[:, None]
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        nearest = distances.amin(0)
        for k, i, j in (distances < 5).nonzero().tolist():
            r = distances[k, i, j].item()
            if r > 0:
                bonded = int(classes(i, j)) if r <= nearest[i, j] + 1e-9 else 0
                pooled.setdefault((bonded, int(types[j]), int(types[i])), []).append(r)
    graph.set_distance_statistics(encoder, x, cells)
    assert all(len(lengths) >= 30 for lengths in pooled.values())
    assert len(pooled) == 9 + 4 + 2
    for kind, lengths in pooled.items():
        shift, slope = encoder.radial.typical[kind]
        assert -shift / slope == pytest.approx(np.mean(lengths), rel=1e-6)
        assert 0.25 / slope == pytest.approx(np.std(lengths), rel=1e-6)


def test_rare_kinds_take_the_statistics_of_their_class():
    encoder, graph = system(count=12)
    before = encoder.radial.typical.clone()
    graph.set_distance_statistics(encoder, frames(count=12, batch=1))
    after = encoder.radial.typical
    # 24 bonds, and 12 of each kind, are both seen from two ends: 48 distances of one class.
    assert torch.equal(after[1], after[1, 0, 1].expand(3, 3, 2))
    # 12 pairs are two bonds apart, seen from two ends: too few for any statistics.
    assert torch.equal(after[2:], before[2:])


@pytest.mark.parametrize(
    ("x", "box", "message"),
    [
        ((2, 17, 3), None, "positions"),
        ((18, 3), None, "positions"),
        ((2, 18, 3), (3, 3), "box"),
        ((2, 18, 3), (2, 6), "box"),
    ],
)
def test_refuses_shapes(x, box, message):
    encoder, graph = system()
    with pytest.raises(ValueError, match=message):
        graph.features(encoder, torch.zeros(x), None if box is None else torch.zeros(box))


def test_refuses_another_cutoff():
    _, graph = system()
    with pytest.raises(ValueError, match="cut-off is 6"):
        graph.features(system(cutoff_A=6.0)[0], frames())
