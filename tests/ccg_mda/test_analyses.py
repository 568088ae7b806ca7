"""MDAnalysis' analyses run on a backmapped Universe as on any other.

The truth is the same analysis of an in-memory Universe of the same positions: no reader of ours,
no transformation.
"""

import operator
import signal
from contextlib import contextmanager
from multiprocessing import get_context

import MDAnalysis as mda
import numpy as np
import pytest
import torch
from MDAnalysis.analysis.align import AlignTraj, AverageStructure
from MDAnalysis.analysis.backends import BackendBase
from MDAnalysis.analysis.base import AnalysisBase, AnalysisFromFunction
from MDAnalysis.analysis.density import DensityAnalysis
from MDAnalysis.analysis.dihedrals import Dihedral, Ramachandran
from MDAnalysis.analysis.hydrogenbonds import HydrogenBondAnalysis
from MDAnalysis.analysis.pca import PCA
from MDAnalysis.analysis.rdf import InterRDF
from MDAnalysis.analysis.rms import RMSD, RMSF
from MDAnalysis.coordinates.memory import MemoryReader
from MDAnalysis.transformations import translate, wrap
from molecules import GaussianBackmapper, dipeptide, slice_map
from systems import flow_of, system

from ccg_mda.bead_sources import bead_universe
from ccg_mda.readers import BeadReader
from ccg_mda.transformation import Backmap, backmap
from ccg_mda.universe import coarse_grain, universe_from

N_FRAMES = 24
BOX = np.array([24.0, 25.0, 26.0, 90.0, 90.0, 90.0])
HEAVY = "not name H*"


def radius_of_gyration(atoms):
    return atoms.radius_of_gyration()


class Inertia(AnalysisBase):
    """An analysis as users write it: serial, with all three methods."""

    def __init__(self, atoms):
        super().__init__(atoms.universe.trajectory)
        self.atoms = atoms

    def _prepare(self):
        self.results.inertia = np.zeros((self.n_frames, 3, 3))

    def _single_frame(self):
        self.results.inertia[self._frame_index] = self.atoms.moment_of_inertia()

    def _conclude(self):
        self.results.mean = self.results.inertia.mean(axis=0)


# What is made of a Universe, and which of its results are compared.
ANALYSES = {
    "RMSD": (lambda u: RMSD(u, dipeptide(), select=HEAVY), ["rmsd"]),
    "RMSF": (lambda u: RMSF(u.select_atoms(HEAVY)), ["rmsf"]),
    "InterRDF": (
        lambda u: InterRDF(u.select_atoms("name N C"), u.select_atoms("name O H"), nbins=20),
        ["bins", "rdf", "count"],
    ),
    "Ramachandran": (lambda u: Ramachandran(u.select_atoms("resname ALA")), ["angles"]),
    "Dihedral": (lambda u: Dihedral([u.atoms[[6, 8, 10, 11]]]), ["angles"]),
    "HydrogenBondAnalysis": (
        lambda u: HydrogenBondAnalysis(
            u, "name N", "name H", "name O", d_a_cutoff=4.5, d_h_a_angle_cutoff=20
        ),
        ["hbonds"],
    ),
    "DensityAnalysis": (
        lambda u: DensityAnalysis(
            u.select_atoms("name O"),
            delta=2.0,
            padding=0,
            gridcenter=[16, 16, 16],
            xdim=20,
            ydim=20,
            zdim=20,
        ),
        ["density.grid"],
    ),
    "PCA": (lambda u: PCA(u, select=HEAVY), ["p_components", "variance"]),
    "AverageStructure": (lambda u: AverageStructure(u, dipeptide(), select=HEAVY), ["positions"]),
    "AnalysisFromFunction": (
        lambda u: AnalysisFromFunction(radius_of_gyration, u.atoms),
        ["timeseries", "times"],
    ),
    "of the user": (lambda u: Inertia(u.atoms), ["inertia", "mean"]),
}


@pytest.fixture(scope="module")
def model():
    return GaussianBackmapper(slice_map())


@pytest.fixture(scope="module")
def u_cg(model):
    boxes = np.tile(BOX, (N_FRAMES, 1))
    return coarse_grain(dipeptide(N_FRAMES, dimensions=boxes), model.cg_map)


@pytest.fixture
def u(u_cg, model):
    return backmap(u_cg, model, seed=2, prefetch=4)


@pytest.fixture(scope="module")
def positions(u_cg, model):
    lazy = backmap(u_cg, model, seed=2, prefetch=4)
    return np.array([ts.positions.copy() for ts in lazy.trajectory])


@pytest.fixture
def in_memory(positions, model):
    # One for each test: analyses that align change a MemoryReader for good.
    u = universe_from(model.cg_map.atoms, positions.copy(), dimensions=BOX, dt=2.0)
    assert isinstance(u.trajectory, MemoryReader)
    return u


def compare(analysis, expected, names):
    for name in names:
        found, truth = (operator.attrgetter(name)(run.results) for run in (analysis, expected))
        assert np.size(truth)
        np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("name", ANALYSES)
@pytest.mark.parametrize("frames", [{}, {"start": 3, "step": 4}, {"frames": [17, 2, 2, 9]}])
def test_as_in_memory(u, in_memory, name, frames):
    make, names = ANALYSES[name]
    compare(make(u).run(**frames), make(in_memory).run(**frames), names)


def test_alignment(u, in_memory, tmp_path):
    path = str(tmp_path / "aligned.trr")
    AlignTraj(u, dipeptide(), select=HEAVY, filename=path).run()
    for universe in (u, in_memory):
        AlignTraj(universe, dipeptide(), select=HEAVY, in_memory=True).run()
    expected = in_memory.trajectory.timeseries(order="fac")
    np.testing.assert_array_equal(u.trajectory.timeseries(order="fac"), expected)
    u.load_new(path)
    np.testing.assert_allclose(u.trajectory.timeseries(), expected, atol=1e-5)


def test_merge_and_transfer_to_memory(u, positions):
    u.trajectory[7]
    ala = u.select_atoms("resname ALA")
    merged = mda.Merge(ala, dipeptide().atoms)
    np.testing.assert_array_equal(merged.atoms.positions[:10], positions[7, 6:16])
    np.testing.assert_array_equal(
        u.trajectory.timeseries(atomgroup=ala, step=5), positions[::5, 6:16]
    )
    u.transfer_to_memory(start=3, stop=20, step=4)
    assert isinstance(u.trajectory, MemoryReader)
    np.testing.assert_array_equal(u.trajectory.timeseries(order="fac"), positions[3:20:4])
    np.testing.assert_array_equal(np.diff([ts.time for ts in u.trajectory]), 8.0)


def test_wrap_follows(u_cg, model, positions):
    u = universe_from(model.cg_map.atoms)
    u.load_new(u_cg, format=BeadReader, cg_map=model.cg_map)
    shift = np.array([8.0, 9.0, 10.0])
    placed = Backmap(model, seed=2, prefetch=4)
    u.trajectory.add_transformations(placed, translate(shift), wrap(u.atoms))
    turns = []
    for ts, whole in zip(u.trajectory, positions, strict=True):
        assert (ts.positions >= 0).all()
        assert (ts.positions < BOX[:3]).all()
        turns.append((whole + shift - ts.positions) / BOX[:3])
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-6)
    assert np.round(turns).any(axis=(0, 1)).all()


@contextmanager
def at_most(seconds):
    """Fail rather than wait for ever; workers that hang are then ended by their pool."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def openmp_used():
    """Let this process use OpenMP, whose threads a fork leaves behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.rand(2**20).sin().sum()
        yield
    finally:
        torch.set_num_threads(before)


PARALLEL = [
    name
    for name, (make, _) in ANALYSES.items()
    if "multiprocessing" in make(dipeptide()).get_supported_backends()
]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", PARALLEL)
def test_in_two_processes(u, in_memory, name):
    make, names = ANALYSES[name]
    with openmp_used(), at_most(20):
        parallel = make(u).run(backend="multiprocessing", n_workers=2)
    compare(parallel, make(in_memory).run(), names)


def test_with_dask(u, in_memory):
    pytest.importorskip("dask", reason="one of MDAnalysis' backends, and no dependency of ours")
    make, names = ANALYSES["RMSD"]
    with openmp_used(), at_most(120):
        parallel = make(u).run(backend="dask", n_workers=2)
    compare(parallel, make(in_memory).run(), names)


class Started(BackendBase):
    """Workers that are started in a given way; MDAnalysis has that of the Python version only."""

    def __init__(self, method, n_workers):
        super().__init__(n_workers)
        self.method = method

    def apply(self, function, computations):
        with get_context(self.method).Pool(self.n_workers) as pool:
            return pool.map(function, computations)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(("method", "n_workers"), [("fork", 2), ("forkserver", 1)])
def test_a_network_in_workers(method, n_workers):
    """The same bits in workers that inherit everything, and in ones that begin from nothing."""
    flow = flow_of("slices")
    u = backmap(bead_universe(system("slices").coarse.numpy(), flow), flow, n_samples=4)
    run = AnalysisFromFunction(positions_of, u.atoms).run
    with openmp_used(), at_most(60):
        parallel = run(backend=Started(method, n_workers), n_parts=2, unsupported_backend=True)
    compare(parallel, run(), ["timeseries"])


def positions_of(atoms):
    return atoms.positions
