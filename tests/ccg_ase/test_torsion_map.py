"""TorsionMap: its sign convention against MDAnalysis, its gradient, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from MDAnalysis.lib.distances import calc_dihedrals

from ccg_ase import Topology, TorsionMap

PHI_PSI = ((4, 6, 8, 14), (6, 8, 14, 16))


@pytest.fixture
def torsion_map(ala2_topology) -> TorsionMap:
    return TorsionMap(ala2_topology, PHI_PSI, ("phi", "psi"))


def test_angles_are_those_of_mdanalysis(torsion_map, ala2_positions):
    frames = ala2_positions + 0.5 * np.random.default_rng(0).normal(size=(50, 22, 3))
    expected = np.stack(
        [
            calc_dihedrals(*(frames[:, k].astype(np.float32) for k in atoms))
            for atoms in torsion_map.torsions
        ],
        axis=-1,
    )
    assert (expected < 0).any()
    assert (expected > 0).any()
    got = torsion_map.apply(frames)
    assert isinstance(got, np.ndarray)
    assert got.shape == (50, *torsion_map.coarse_shape)
    np.testing.assert_allclose(torsion_map.difference(got, expected), 0.0, atol=1e-4)
    torch.testing.assert_close(torsion_map.apply(torch.from_numpy(frames)).numpy(), got)


def test_reading_a_torsion_backwards_changes_nothing_and_a_mirror_its_sign(ala2_topology, rng):
    frames = rng.normal(size=(20, 22, 3))
    there, back = (
        TorsionMap(ala2_topology, [row]).apply(frames) for row in (PHI_PSI[0], PHI_PSI[0][::-1])
    )
    np.testing.assert_allclose(there, back, atol=1e-12)
    mirrored = TorsionMap(ala2_topology, [PHI_PSI[0]]).apply(frames * [1, -1, 1])
    np.testing.assert_allclose(mirrored, -there, atol=1e-12)


def test_angles_are_twice_differentiable(torsion_map, ala2_positions):
    def angles(x: torch.Tensor) -> torch.Tensor:
        return torsion_map.apply(x)

    x = torch.from_numpy(ala2_positions).requires_grad_()
    assert torch.autograd.gradcheck(angles, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(angles, (x,), fast_mode=True)


def test_difference_goes_the_short_way_round(torsion_map):
    a, b = np.array([[3.1, -3.1]]), np.array([[-3.1, 3.1]])
    short = 2 * np.pi - 6.2
    np.testing.assert_allclose(torsion_map.difference(a, b), [[-short, short]])
    torch.testing.assert_close(
        torsion_map.difference(torch.tensor(a), torch.tensor(b)),
        torch.tensor([[-short, short]]).double(),
    )


def test_dictionary_round_trip(torsion_map, ala2_topology):
    copy = TorsionMap.from_dict(json.loads(json.dumps(torsion_map.to_dict())))
    assert copy == torsion_map
    assert copy.fingerprint() == torsion_map.fingerprint()
    assert copy.names == ("phi", "psi")
    other = TorsionMap(ala2_topology, PHI_PSI[:1])
    assert other.names == ("C-N-CA-C",)
    assert other != torsion_map
    assert other.fingerprint() != torsion_map.fingerprint()


@pytest.mark.parametrize(
    ("torsions", "cause"),
    [
        ([], "shape"),
        ([[4, 6, 8]], r"shape \(n, 4\)"),
        ([[4, 6, 8, 22]], r"outside 0\.\.21"),
        ([[-1, 6, 8, 14]], r"outside 0\.\.21"),
        ([[4, 6, 8, 16]], "C-N-CA-N are not bonded in a row"),
        ([[6, 8, 14, 6]], "not bonded in a row"),
        ([[4, 6, 8, 14], [7, 6, 8, 10]], "same bond"),
    ],
)
def test_torsions_that_are_none_are_refused(ala2_topology, torsions, cause):
    with pytest.raises(ValueError, match=cause):
        TorsionMap(ala2_topology, torsions)


def test_other_misuse_is_refused(ala2_topology, torsion_map):
    with pytest.raises(ValueError, match="1 names given for 2"):
        TorsionMap(ala2_topology, PHI_PSI, ("phi",))
    with pytest.raises(ValueError, match=r"expected shape \(\.\.\., 22, 3\)"):
        torsion_map.apply(np.zeros((21, 3)))
    loose = Topology.from_dict(ala2_topology.to_dict() | {"bonds": ala2_topology.bonds[1:]})
    with pytest.raises(ValueError, match="single molecule"):
        TorsionMap(loose, PHI_PSI)
