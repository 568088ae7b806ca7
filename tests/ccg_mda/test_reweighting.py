import MDAnalysis as mda
import numpy as np
import pytest
from MDAnalysis.analysis.base import AnalysisFromFunction
from MDAnalysis.analysis.dihedrals import Dihedral, Janin, Ramachandran
from MDAnalysis.analysis.hydrogenbonds import HydrogenBondAnalysis
from MDAnalysis.analysis.rdf import InterRDF
from MDAnalysis.analysis.rms import RMSD, RMSF
from molecules import PDB, GaussianBackmapper, dipeptide, slice_map

from ccg_mda.averages import WeightedAverage
from ccg_mda.potential import TorchPotential
from ccg_mda.reweighting import reweight
from ccg_mda.transformation import backmap
from ccg_mda.universe import coarse_grain

N = 90
pytestmark = pytest.mark.filterwarnings(
    "ignore:don't trust averages with these weights",
    "ignore:.*use of fork:DeprecationWarning",
    "ignore:No hydrogen bonds were found",
)


@pytest.fixture
def u(tmp_path):
    """Two alanine dipeptides that drift, in a box whose size changes; read from a file.

    In memory, MDAnalysis' RMSD with groupselections would rotate the frames for good.
    """
    one = dipeptide(N)
    frames = one.trajectory.timeseries(order="fac")
    other = dipeptide(N, seed=1).trajectory.timeseries(order="fac")[:, :, [1, 2, 0]]
    pair = mda.Merge(one.atoms, one.atoms)
    pair.add_TopologyAttr("ids", np.arange(1, 45))
    pair.load_new(
        np.concatenate([frames, other + np.float32([4, 3, 2])], axis=1),
        dimensions=np.column_stack([*[np.linspace(30, 36, N)] * 3, *[np.full(N, 90.0)] * 3]),
    )
    pair.atoms.write(tmp_path / "pair.trr", frames="all")
    return pair.load_new(str(tmp_path / "pair.trr"))


BONDS = {"hydrogens_sel": "name H", "acceptors_sel": "name O", "update_selections": False}
BONDS |= {"d_h_a_angle_cutoff": 70, "d_a_cutoff": 6.0}


def rmsd(u):
    return RMSD(u.atoms, u, select="name CA C N", groupselections=["name O"], weights="mass")


def rmsf(u):
    return RMSF(u.select_atoms("not element H"))


def rdf(u):
    carbons, others = u.select_atoms("element C"), u.select_atoms("element N O")
    return InterRDF(carbons, others, nbins=20, range=(1, 9), exclude_same="segment")


def density(u):
    carbons = u.select_atoms("element C")
    return InterRDF(carbons, carbons, norm="density", nbins=12, exclusion_block=(1, 1))


def dihedral(u):
    return Dihedral([u.atoms[[4, 6, 8, 14]], u.atoms[[28, 30, 36, 38]]])


def dihedral_of_one(u):
    return Dihedral([u.atoms[[4, 6, 8, 14]]])


def ramachandran(u):
    return Ramachandran(u.select_atoms("resname ALA"))


def bonds(u):
    return HydrogenBondAnalysis(u, **BONDS)


def histogram(*angles):
    """Density with the bins of reweight, through numpy's own binning."""
    edges = [np.linspace(-180, 180, 25)] * len(angles)
    return np.histogramdd(np.transpose([a.ravel() for a in angles]), edges, density=True)[0]


PLAIN = {
    rmsd: lambda run: run.results.rmsd[:, 2:].mean(axis=0),
    rmsf: lambda run: run.results.rmsf,
    rdf: lambda run: run.results.rdf,
    density: lambda run: run.results.rdf,
    dihedral: lambda run: [histogram(angle) for angle in run.results.angles.T],
    ramachandran: lambda run: histogram(*np.moveaxis(run.results.angles, -1, 0)),
    bonds: lambda run: run.count_by_time().mean(),
}


def options(analysis):
    return {"bins": 24} if analysis in (dihedral, ramachandran) else {}


@pytest.mark.parametrize("analysis", PLAIN)
def test_without_weights_it_is_the_plain_analysis(u, analysis):
    found = reweight(analysis(u), np.zeros(N), **options(analysis))
    assert isinstance(found, WeightedAverage)
    expected = PLAIN[analysis](analysis(u).run())
    np.testing.assert_allclose(found.results.mean, expected, rtol=1e-9, atol=1e-12)
    assert np.shape(found.results.error) == np.shape(expected)
    assert np.max(found.results.error) > 0


@pytest.mark.parametrize("analysis", PLAIN)
def test_integer_weights_are_repeated_frames(u, analysis):
    times = np.random.default_rng(3).integers(0, 5, size=N)
    with np.errstate(divide="ignore"):
        log_w = np.log(times) - 700
    found = reweight(analysis(u), log_w, start=10, **options(analysis)).results
    frames = np.repeat(np.arange(N), times)
    if analysis is bonds:  # count_by_time overlooks repeats
        counts = bonds(u).run().count_by_time()
        expected = np.average(counts[10:], weights=times[10:])
    else:
        expected = PLAIN[analysis](analysis(u).run(frames=frames[frames >= 10]))
    np.testing.assert_allclose(found.mean, expected, rtol=1e-9, atol=1e-12)


def test_occupancies_of_hydrogen_bonds(u):
    found = reweight(bonds(u), np.zeros(N)).results
    ids = bonds(u).run().count_by_ids()
    assert len(ids) > 3
    order, expected = np.lexsort(found.hbonds.T), np.lexsort(ids[:, :3].T)
    np.testing.assert_array_equal(found.hbonds[order], ids[expected, :3] - 1)
    np.testing.assert_allclose(found.occupancy[order] * N, ids[expected, 3], rtol=1e-12)
    assert found.mean == pytest.approx(found.occupancy.sum())
    assert found.occupancy_error.shape == found.occupancy.shape
    # The same from distances, with selections that are found anew in every frame.
    by_distance = {**BONDS, "donors_sel": "name N", "d_h_cutoff": 1.8, "update_selections": True}
    again = reweight(HydrogenBondAnalysis(u, **by_distance), np.zeros(N)).results
    np.testing.assert_array_equal(again.hbonds, found.hbonds)
    np.testing.assert_array_equal(again.occupancy, found.occupancy)


def test_axes_are_named(u):
    names = {}
    for analysis in PLAIN:
        own = analysis(u)
        names[analysis] = reweight(own, np.zeros(N), **options(analysis)).results
        assert not hasattr(own, "n_frames")  # it wasn't touched
    run = rdf(u).run()
    np.testing.assert_array_equal(names[rdf].bins, run.results.bins)
    np.testing.assert_array_equal(names[rdf].edges, run.results.edges)
    np.testing.assert_array_equal(names[rmsf].atom_indices, rmsf(u).atomgroup.indices)
    np.testing.assert_array_equal(names[dihedral].atom_indices, [[4, 6, 8, 14], [28, 30, 36, 38]])
    np.testing.assert_array_equal(names[ramachandran].resids, [2, 2])
    np.testing.assert_allclose(names[ramachandran].bins, np.arange(-172.5, 180, 15))
    # Probabilities per degree: they sum to one.
    assert names[ramachandran].mean.sum() * 15**2 == pytest.approx(1)
    np.testing.assert_allclose(names[dihedral].mean.sum(axis=1) * 15, 1)


@pytest.mark.parametrize("analysis", PLAIN)
def test_workers_give_the_same(u, analysis):
    log_w = np.random.default_rng(4).normal(size=N)
    one = reweight(analysis(u), log_w).results
    two = reweight(analysis(u), log_w, backend="multiprocessing", n_workers=2).results
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-9, atol=1e-12)


def test_weights_of_a_backmapped_universe():
    """Weights are read frame by frame, also in workers, and RMSD reads its reference once."""
    model = GaussianBackmapper(slice_map())
    potential = TorchPotential(lambda x: 0.002 * (x[1:] - x[:-1]).square().sum(), 22)
    u = backmap(coarse_grain(dipeptide(40), model.cg_map), model, n_samples=2, potential=potential)
    reference = mda.Universe(PDB)
    found = reweight(RMSD(u, reference), n_blocks=8, frames=np.arange(5, 75)).results
    values = RMSD(u, reference).run().results.rmsd[5:75, 2]
    w = np.exp(found.log_weights - found.log_weights.max())
    np.testing.assert_allclose(found.mean, [np.average(values, weights=w)], rtol=1e-10)
    assert found.n_blocks == 8
    assert found.effective_sample_size < 0.9


def test_side_chain_angles_wrap():
    u = mda.Universe(PDB)
    u.residues[1].resname = "GLU"
    u.atoms[[10, 11, 12]].names = ["CB", "CG", "CD"]
    # Janin counts from 0 to 360 degrees, the bins here from -180 to 180.
    u.load_new(np.repeat(u.atoms.positions[None], 60, axis=0))
    janin = Janin(u.select_atoms("resname GLU"))
    found = reweight(janin, np.zeros(60), bins=36).results
    angles = Janin(u.select_atoms("resname GLU")).run().results.angles[0, 0]
    i, j = np.floor(((angles + 180) % 360) / 10).astype(int)
    assert found.mean[i, j] == pytest.approx(0.01)
    assert found.mean.sum() == pytest.approx(0.01)


def test_errors(u):
    with pytest.raises(TypeError, match=r"can't weigh AnalysisFromFunction.*resample\(log_w, n\)"):
        reweight(AnalysisFromFunction(len, u.trajectory, u.atoms))
    with pytest.raises(TypeError, match="bins goes with dihedrals; InterRDF has its own"):
        reweight(rdf(u), bins=3)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        reweight(dihedral(u), bins=0)
    broken = dipeptide(60)
    broken.trajectory.get_array()[7, 8] = np.nan
    with pytest.raises(ValueError, match="a dihedral of frame 7, which has weight, is NaN"):
        reweight(dihedral_of_one(broken), np.zeros(60))
    with pytest.raises(ValueError, match="value of frame 7, which has weight, is NaN"):
        reweight(RMSF(broken.atoms), np.zeros(60))
    many = mda.Universe.empty(3000, trajectory=True)
    many.add_TopologyAttr("names", ["H", "O", "H"] * 1000)
    many.add_TopologyAttr("bonds", [(k, k + 1) for k in range(2999)])
    with pytest.raises(ValueError, match="2000 hydrogens and 1000 acceptors could form more"):
        reweight(HydrogenBondAnalysis(many, hydrogens_sel="name H", acceptors_sel="name O"))
    atoms = mda.Universe.empty(4, trajectory=True)
    atoms.add_TopologyAttr("names", ["N", "H", "O", "O"])
    atoms.add_TopologyAttr("bonds", [(0, 1)])
    x = np.tile([0.0, 1.0, 2.9, -5.0], (60, 1))
    x[30:, 2] = 2.8
    atoms.load_new(np.stack([x, 0 * x, 0 * x], axis=-1).astype(np.float32))
    near = HydrogenBondAnalysis(
        atoms, hydrogens_sel="name H", acceptors_sel="name O and prop x < 2.85"
    )
    with pytest.raises(ValueError, match="of atoms 0, 1 and 2 in frame 30 was impossible"):
        reweight(near, np.zeros(60))
