import numpy as np
import pytest
import torch
from e3nn import o3
from torch.autograd import gradcheck, gradgradcheck

from ccg_ase import Encoder, Topology
from ccg_ase.graph import BondClasses, all_pairs

CHAIN = Topology(names="ABCDE", masses=[1] * 5, bonds=[(0, 1), (1, 2), (2, 3), (3, 4)])


def bond_classes(topology, edges):
    return torch.from_numpy(BondClasses(topology)(*edges.numpy()))


def system(l_max=1, n=5, **sizes):
    torch.manual_seed(0)
    encoder = Encoder(3, channels=4, l_max=l_max, **sizes).double()
    edges = all_pairs(n)
    topology = Topology(names="A" * n, masses=[1] * n, bonds=[(i, i + 1) for i in range(n - 1)])
    return encoder, torch.arange(n) % 3, edges, bond_classes(topology, edges)


def positions(batch=2, n=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, n, 3, dtype=torch.float64, generator=generator)


def rotation():
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))
    return torch.from_numpy(q * np.sign(np.linalg.det(q)))


@pytest.fixture
def _float64_by_default():
    """e3nn builds Wigner D matrices in torch's default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_edges_and_bond_classes():
    edges = all_pairs(5)
    assert edges.shape == (2, 20)
    assert len(set(map(tuple, edges.T.tolist()))) == 20
    hops = (edges[0] - edges[1]).abs()
    assert torch.equal(bond_classes(CHAIN, edges), hops)
    lonely = Topology(names="AB", masses=[1, 1])
    assert bond_classes(lonely, all_pairs(2)).tolist() == [0, 0]
    long = Topology(names="A" * 6, masses=[1] * 6, bonds=[(i, i + 1) for i in range(5)])
    assert bond_classes(long, torch.tensor([[0, 0], [5, 4]])).tolist() == [0, 4]


@pytest.mark.usefixtures("_float64_by_default")
@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
def test_equivariant_with_parity(l_max):
    encoder, *graph = system(l_max)
    x, turn = positions(), rotation()
    features = encoder(x, *graph)
    assert features.shape == (2, 5, encoder.irreps_out.dim)
    for matrix in (turn, -turn):
        moved = encoder(x @ matrix.T + torch.tensor([3.0, -7, 11]), *graph)
        expected = features @ encoder.irreps_out.D_from_matrix(matrix).T
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


def test_both_parities_of_scalars_and_vectors_are_alive():
    encoder, *graph = system()
    features = encoder(positions(), *graph)
    assert {str(irrep) for _, irrep in encoder.irreps_out} == {"0e", "0o", "1e", "1o"}
    for block in encoder.irreps_out.slices():
        assert features[..., block].abs().max() > 1e-4


@pytest.mark.usefixtures("_float64_by_default")
def test_converted_back_from_float32_stays_equivariant():
    encoder, *graph = system()
    encoder.float().double()
    x, turn = positions(), rotation()
    expected = encoder(x, *graph) @ encoder.irreps_out.D_from_matrix(turn).T
    torch.testing.assert_close(encoder(x @ turn.T, *graph), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
def test_harmonics_are_those_of_e3nn(l_max):
    encoder = system(l_max)[0]
    units = torch.nn.functional.normalize(positions(n=7), dim=-1)
    expected = o3.spherical_harmonics(
        list(range(l_max + 1)), units, normalize=False, normalization="component"
    )
    found = encoder.harmonics(units.movedim(-1, 0)).movedim(0, -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_float64_by_default")
def test_tensor_product_is_that_of_e3nn():
    """The dense coupling equals e3nn's TensorProduct, path by path, up to a positive factor."""
    layer = system(l_max=2)[0].layers[1].message
    left, right = ["0e", "0o", "1e", "1o", "2e", "2o"], ["0e", "1o", "2e"]
    x, y = torch.randn(6, 18), torch.randn(6, 9)
    rows = layer.paths_of(x.T, y.T)
    for number, (i, j, k) in enumerate(layer.paths):
        path = (left.index(str(i)), right.index(str(j)), 0, "uuu", False)
        product = o3.TensorProduct("+".join(left), "+".join(right), str(k), [path])
        found = rows[layer.row_path == number].T
        expected = product(x, y)
        scale = (found * expected).sum() / (expected * expected).sum()
        torch.testing.assert_close(found, scale * expected, rtol=0, atol=1e-12)
        assert scale > 0


def test_batch_equals_single_and_permutation():
    encoder, types, edges, bonded = system()
    x = positions(batch=3)
    together = encoder(x, types, edges, bonded)
    alone = torch.cat([encoder(one[None], types, edges, bonded) for one in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-13)
    order = torch.tensor([3, 0, 4, 1, 2])
    place = order.argsort()
    shuffled = encoder(x[:, order], types[order], place[edges], bonded)
    torch.testing.assert_close(shuffled, together[:, order], rtol=0, atol=1e-13)


def test_derivatives():
    encoder, *graph = system(n=3, n_radial=2)
    x = positions(batch=1, n=3).requires_grad_()

    def weighted(x):
        return (encoder(x, *graph) ** 2).sum()

    assert gradcheck(weighted, x)
    assert gradgradcheck(weighted, x)


def test_twice_smooth_at_the_cutoff():
    encoder, *graph = system(n=2, cutoff_A=5.0)
    seen = []
    for distance in (5.0 - 1e-4, 5.0 + 1e-4):
        x = torch.zeros(1, 2, 3, dtype=torch.float64)
        x[0, 1, 0] = distance
        x.requires_grad_()
        value = encoder(x, *graph).sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(first[0, 1, 0], x)
        seen.append([value.item(), first[0, 1, 0].item(), second[0, 1, 0].item()])
    below, above = np.array(seen)
    np.testing.assert_allclose(above[1:], 0, atol=1e-14)
    np.testing.assert_allclose(below, above, atol=1e-2 * 5.0**-2)


def test_coincident_and_single_sites_are_finite():
    encoder, *graph = system(n=3)
    x = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    features = encoder(x, *graph)
    (gradient,) = torch.autograd.grad(features.sum(), x)
    assert features.isfinite().all()
    assert gradient.isfinite().all()
    encoder, types, edges, bonded = system(n=1)
    assert encoder(x[:, :1], types, edges, bonded).shape == (1, 1, encoder.irreps_out.dim)


def test_small_bond_changes_are_visible():
    """0.03 Å of a bond is one standard deviation: as visible as 0.3 Å of a soft distance."""
    encoder, types, edges, bonded = system()
    mean, std = torch.full((20,), 1.5), torch.full((20,), 0.03)
    bond = bonded == 1

    def change(statistics):
        torch.manual_seed(0)
        if statistics:
            encoder.set_distance_statistics(
                mean[bond], std[bond], types, edges[:, bond], bonded[bond]
            )
        r = torch.tensor([1.5, 1.53], dtype=torch.float64).view(1, 1, 2).expand(1, 20, 2)
        hidden = encoder.radial(r, 1 / r, types[edges[0]], types[edges[1]], bonded)
        weights = encoder.radial.weights(0, hidden)
        return weights.view(-1, 20, 2)[:, bond].diff(dim=-1).abs().mean()

    before = change(False)
    assert change(True) > 3 * before


def test_distance_statistics_pool_edges_of_one_kind():
    encoder, types, edges, bonded = system()
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.rand(20, generator=rng) + 1, torch.rand(20, generator=rng)
    encoder.set_distance_statistics(mean, std, types, edges, bonded)
    key = (bonded[0], types[edges[0, 0]], types[edges[1, 0]])
    alike = [e for e in range(20) if (bonded[e], types[edges[0, e]], types[edges[1, e]]) == key]
    shift, slope = encoder.radial.typical[key]
    assert -shift / slope == pytest.approx(mean[alike].mean().item(), rel=1e-6)
    spread = ((std[alike] ** 2).mean() + mean[alike].var(correction=0)).sqrt()
    assert 0.25 / slope == pytest.approx(spread.item(), rel=1e-6)


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="n_types"):
        Encoder(0)
    with pytest.raises(ValueError, match="cutoff_A"):
        Encoder(1, cutoff_A=-1)
