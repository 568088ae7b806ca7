"""Part of the atoms reconstructed, the rest omitted or from a given structure."""

import numpy as np
import pytest
from molecules import GaussianBackmapper, dipeptide, slice_map
from scipy.spatial.transform import Rotation

from ccg_mda.grafting import Graft
from ccg_mda.potential import TorchPotential
from ccg_mda.transformation import backmap
from ccg_mda.universe import cg_map, coarse_grain

ONLY = "resname NME"


@pytest.fixture(scope="module")
def model():
    return GaussianBackmapper(slice_map())


@pytest.fixture(scope="module")
def u_cg(model):
    return coarse_grain(dipeptide(20), model.cg_map)


def test_atoms_of_a_part_are_those_of_the_whole(u_cg, model, tmp_path):
    whole = backmap(u_cg, model, n_samples=2, seed=3)
    part = backmap(u_cg, model, n_samples=2, seed=3, only=ONLY)
    expected = whole.select_atoms(ONLY)
    assert list(part.atoms.names) == list(expected.names)
    assert len(part.bonds) == len(expected.bonds.atomgroup_intersection(expected, strict=True))
    for key in ("masses", "elements", "resids", "resnames", "segids"):
        np.testing.assert_array_equal(getattr(part.atoms, key), getattr(expected, key))
    for ts, _ in zip(part.trajectory, whole.trajectory, strict=True):
        np.testing.assert_array_equal(part.atoms.positions, expected.positions)
        assert "log_prob" not in ts.data
    part.trajectory[7]
    np.testing.assert_array_equal(part.copy().atoms.positions, part.atoms.positions)
    part.atoms.write(tmp_path / "part.xtc", frames="all")


def test_the_rest_is_laid_on_the_beads(model):
    """The frame is the structure, moved; bead by bead the rest must come back exactly."""
    structure = dipeptide(1, seed=5)
    given = structure.atoms.positions.astype(float)
    turn, shift = Rotation.random(random_state=1).as_matrix(), np.array([5.0, -3.0, 20.0])
    moved = structure.copy()
    moved.load_new((given @ turn.T + shift)[None].astype(np.float32), dt=1.0)
    u = backmap(coarse_grain(moved, model.cg_map), model, only=ONLY, rest=structure)
    rest = ~np.isin(np.arange(22), u.select_atoms(ONLY).ix)
    np.testing.assert_allclose(u.atoms.positions[rest], moved.atoms.positions[rest], atol=1e-5)
    assert u.trajectory.ts.data["rest_rmsd"] < 1e-5
    assert "log_prob" not in u.trajectory.ts.data
    # What is reconstructed stays where it was placed.
    plain = backmap(coarse_grain(moved, model.cg_map), model)
    np.testing.assert_array_equal(u.atoms.positions[~rest], plain.atoms.positions[~rest])


def test_what_is_left_of_the_fit_is_told(model, u_cg):
    structure = dipeptide(1)
    given = structure.atoms.positions.astype(float)
    graft = Graft(model.cg_map, given, np.arange(16))
    u = backmap(u_cg, model, only="index 16:21", rest=structure)
    beads = u.trajectory[11].data["beads"].astype(float)[:4]
    fixed = given[[4, 6, 8, 14]]
    _, residual = Rotation.align_vectors(beads - beads.mean(0), fixed - fixed.mean(0))
    assert u.trajectory.ts.data["rest_rmsd"] == pytest.approx(residual / 2, rel=1e-3)
    assert graft.parallelizable


def test_errors(model, u_cg):
    structure, potential = dipeptide(1), TorchPotential(lambda x: x.sum(), 22)
    cases = [
        ({"only": "resname GLY"}, "selects no atoms; residues here are 1 to 3"),
        ({"only": "residue 3 or"}, "is no selection"),
        ({"only": ONLY, "potential": potential}, "has no energy and no weight"),
        ({"rest": structure}, "say which are reconstructed"),
        ({"only": ONLY, "rest": structure.select_atoms("index 0:9")}, "shape .10, 3."),
        ({"only": "not index 4", "rest": structure}, "1 beads lie in the given part"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            backmap(u_cg, model, **options)
    broken = structure.atoms.positions
    broken[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        Graft(cg_map(structure, "residue-com"), broken, np.arange(22))
