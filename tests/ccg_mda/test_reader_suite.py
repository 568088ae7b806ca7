"""MDAnalysis' own tests of readers, run against both of ours, and against Backmap.

No test of the base classes is left out; two of them skip themselves, because they want more frames
than their own reference has. One fixture differs: transformations can be added to a reader once, so
those of the tests come together with Backmap.
"""

import MDAnalysis as mda
import numpy as np
import pytest
import torch
from MDAnalysis.coordinates.timestep import Timestep
from MDAnalysis.coordinates.XTC import XTCWriter
from MDAnalysis.transformations import translate
from MDAnalysisTests.coordinates.base import BaseReference, MultiframeReaderTest

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_mda.readers import AtomReader, BeadReader
from ccg_mda.transformation import Backmap

# Some tests of MDAnalysis use an argument that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:asel argument to timeseries:DeprecationWarning")

N_BEADS = 4
# Each row gives a site that a reader shows, from the beads.
BEADS = np.eye(N_BEADS)
OWNERS = np.repeat(BEADS, 2, axis=0)
MIDPOINTS = (OWNERS + BEADS[[0, 1, 1, 2, 2, 3, 3, 3]]) / 2


def topology(bonds):
    return Topology(
        names=[f"C{k}" for k in range(8)], elements=["C"] * 8, masses=[12.0] * 8, bonds=bonds
    )


SLICES = CGMap.from_slices(topology([[k, k + 1] for k in range(0, 8, 2)]), [0, 2, 4, 6])
PAIRS = CGMap.from_groups(
    topology([[k, k + 1] for k in range(0, 8, 2)]), np.arange(8).reshape(4, 2)
)


class Midpoints(torch.nn.Module):
    """A backmapper that puts atoms between beads, the same in every sample."""

    cg_map, temperature_K = SLICES, 300.0

    def sample_noise(self, rng):
        return torch.zeros(0)

    def forward(self, beads, *, temperature_K, box=None):
        self.beads = beads
        return self

    def positions_and_log_prob_from(self, noise):
        return torch.tensor(MIDPOINTS) @ self.beads, torch.zeros(len(noise))


class Reference(BaseReference):
    """What the tests expect: the sites P s, where the beads s double from frame to frame."""

    def __init__(self, path, reader, cg_map, matrix, first=()):
        super().__init__()
        self.reader_class, self.cg_map, self.first = reader, cg_map, first
        self.ext, self.writer = "xtc", XTCWriter
        self.changing_dimensions = True
        self.n_atoms = len(matrix)
        beads = np.arange(3.0 * N_BEADS).reshape(N_BEADS, 3)
        frames = 2 ** np.arange(self.n_frames)[:, None, None] * beads
        if reader is AtomReader:  # two atoms around every bead
            frames = np.repeat(frames, 2, axis=1) + np.tile([[1.0], [-1.0]], (N_BEADS, 1))
        boxes = [self.dimensions, self.dimensions_second_frame, *[self.dimensions] * 3]
        path.write_text("".join(map(pdb, frames, boxes)))
        # Without a topology, since the tests open the file so.
        self.trajectory = mda.Universe(str(path), to_guess=(), dt=self.dt)
        for name in ("first_frame", "second_frame", "last_frame", "jump_to_frame"):
            expected = getattr(self, name)
            ts = Timestep(self.n_atoms, dt=self.dt)
            ts.frame, ts.aux = expected.frame, expected.aux
            ts.positions = 2**expected.frame * (matrix @ beads)
            setattr(self, name, ts)

    def reader(self, trajectory, *transformations):
        reader = self.reader_class(trajectory, cg_map=self.cg_map)
        if self.first or transformations:
            reader.add_transformations(*self.first, *transformations)
        return reader


def pdb(positions, box):
    """Return a frame in PDB format, which keeps a box for each, and 0.001 Å."""
    lines = ["CRYST1" + "{:9.3f}{:9.3f}{:9.3f}{:7.2f}{:7.2f}{:7.2f}".format(*box), "MODEL"]
    for k, (x, y, z) in enumerate(positions, start=1):
        site = f"ATOM  {k:5d}  C   UNK A{k:4d}    {x:8.3f}{y:8.3f}{z:8.3f}{1:6.2f}{0:6.2f}"
        lines.append(site + " " * 11 + "C")
    return "\n".join([*lines, "ENDMDL", ""])


class Suite(MultiframeReaderTest):
    @pytest.fixture
    def reader(self, ref):
        # As in the base class, where pytest objects to the order of its decorators.
        reader = ref.reader(ref.trajectory)
        options = {"initial_time": 0, "time_selector": None}
        reader.add_auxiliary("lowf", ref.aux_lowf, dt=ref.aux_lowf_dt, **options)
        reader.add_auxiliary("highf", ref.aux_highf, dt=ref.aux_highf_dt, **options)
        return reader

    @pytest.fixture
    def transformed(self, ref):
        return ref.reader(ref.trajectory, translate([1, 1, 1]), translate([0, 0, 0.33]))


class TestBeadReader(Suite):
    @pytest.fixture
    def ref(self, tmp_path):
        return Reference(tmp_path / "beads.pdb", BeadReader, SLICES, OWNERS)


class TestBeadReaderWithBackmap(Suite):
    @pytest.fixture
    def ref(self, tmp_path):
        first = [Backmap(Midpoints(), prefetch=2)]
        return Reference(tmp_path / "beads.pdb", BeadReader, SLICES, MIDPOINTS, first)


class TestAtomReader(Suite):
    @pytest.fixture
    def ref(self, tmp_path):
        return Reference(tmp_path / "atoms.pdb", AtomReader, PAIRS, BEADS)
