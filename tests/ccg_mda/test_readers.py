import pickle

import MDAnalysis as mda
import numpy as np
import pytest
from molecules import PDB, GaussianBackmapper, dipeptide, slice_map

from ccg_mda.readers import AtomReader, BeadReader
from ccg_mda.transformation import backmap
from ccg_mda.universe import coarse_grain, universe_from

N = 6


@pytest.fixture(scope="module")
def the_map():
    return slice_map()


@pytest.fixture(params=["memory", "xtc", "chain"])
def source(request, the_map, tmp_path):
    atoms = dipeptide(N)
    if request.param == "memory":
        return coarse_grain(atoms, the_map)
    beads = coarse_grain(atoms, the_map)
    path = str(tmp_path / "beads.xtc")
    beads.atoms.write(path, frames="all")
    return universe_from(the_map.beads, path if request.param == "xtc" else [path, path])


def host(source, the_map, **options):
    u = universe_from(the_map.atoms)
    return u.load_new(source, format=BeadReader, cg_map=the_map, **options)


def test_presents_beads_at_atomistic_size(source, the_map):
    source.trajectory[2]
    u = host(source, the_map, n_samples=3)
    assert u.trajectory.n_atoms == 22
    assert len(u.trajectory) == 3 * len(source.trajectory)
    for ts in u.trajectory:
        cg_frame, sample = divmod(ts.frame, 3)
        assert (ts.data["cg_frame"], ts.data["sample"]) == (cg_frame, sample)
        assert source.trajectory.frame == 2
        reference = source.copy().trajectory[cg_frame]
        np.testing.assert_array_equal(ts.data["beads"], reference.positions)
        np.testing.assert_array_equal(ts.positions, reference.positions[the_map.owner])
        assert ts.time == reference.time
    assert u.trajectory.totaltime == source.trajectory.totaltime


def test_any_order_of_access(source, the_map):
    u = host(source, the_map, n_samples=2)
    frames = np.array([ts.positions.copy() for ts in u.trajectory])
    n = len(frames)
    mask = np.arange(n) % 3 == 0
    keys = (slice(None, None, -1), slice(1, 9, 4), [5, 0, 0, 7], mask, slice(-3, None))
    for key in (*keys, mask.tolist()):
        read = np.array([ts.positions.copy() for ts in u.trajectory[key]])
        np.testing.assert_array_equal(read, frames[key])
    np.testing.assert_array_equal(u.trajectory[-1].positions, frames[-1])
    assert next(iter(u.trajectory)).frame == 0
    with pytest.raises(IndexError):
        u.trajectory[n]
    np.testing.assert_array_equal(u.trajectory.timeseries(order="fac"), frames)


def test_copies_are_independent(source, the_map):
    u = host(source, the_map)
    u.trajectory[3]
    for other in (u.copy(), pickle.loads(pickle.dumps(u))):
        assert other.trajectory.frame == 3
        assert other.trajectory.ts.dt == u.trajectory.ts.dt
        np.testing.assert_array_equal(other.atoms.positions, u.atoms.positions)
        other.trajectory[1]
        assert u.trajectory.frame == 3
        np.testing.assert_array_equal(u.trajectory[1].positions, other.atoms.positions)
        u.trajectory[3]
    group = pickle.loads(pickle.dumps(u.select_atoms("name CA")))
    assert group.universe.trajectory.frame == 3


def test_atom_reader_pickles(the_map):
    beads = coarse_grain(dipeptide(N), the_map)
    beads.trajectory[4]
    other = pickle.loads(pickle.dumps(beads))
    assert isinstance(other.trajectory, AtomReader)
    np.testing.assert_array_equal(other.atoms.positions, beads.atoms.positions)


@pytest.fixture
def table(tmp_path):
    """Every other frame of N has a value, 10 + its number."""
    path = tmp_path / "pull.xvg"
    frames = np.arange(0, N, 2)
    np.savetxt(path, np.column_stack([2.0 * frames, 10 + frames]))
    return str(path)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_auxiliary_data_travels(the_map, n_samples, table):
    u = host(coarse_grain(dipeptide(N), the_map), the_map, n_samples=n_samples)
    u.trajectory[4]
    later = [u.copy(), pickle.loads(pickle.dumps(u))]
    u.trajectory.add_auxiliary("pull", table)
    for other in later:
        other.trajectory.add_auxiliary("pull", table)
    frames = np.repeat(np.arange(N), n_samples)
    expected = np.where(frames % 2 == 0, 10.0 + frames, np.nan)
    for other in (u, u.copy(), pickle.loads(pickle.dumps(u)), *later):
        assert other.trajectory.frame == 4
        read = [ts.aux.pull[-1] for ts in other.trajectory]
        np.testing.assert_array_equal(read, expected)
        backwards = [ts.aux.pull[-1] for ts in other.trajectory[::-1]]
        np.testing.assert_array_equal(backwards, expected[::-1])
        with_value = [(ts.frame, ts.aux.pull[-1]) for ts in other.trajectory.iter_as_aux("pull")]
        known = np.flatnonzero(frames % 2 == 0)
        np.testing.assert_array_equal(with_value, np.column_stack([known, expected[known]]))
        other.trajectory[4]


def test_user_topology_file(the_map):
    source = coarse_grain(dipeptide(N), the_map)
    u = mda.Universe(PDB, source, format=BeadReader, cg_map=the_map, topology_format="PDB")
    np.testing.assert_array_equal(u.select_atoms("name CA").positions[0], u.atoms.positions[8])
    assert len(u.trajectory) == N


def test_box_and_data_are_kept(the_map):
    atoms = dipeptide(2, dimensions=np.tile([30, 31, 32, 90, 90, 90], (2, 1)))
    u = host(coarse_grain(atoms, the_map), the_map)
    np.testing.assert_array_equal(u.trajectory[1].dimensions, [30, 31, 32, 90, 90, 90])


def test_look_ahead_leaves_the_frame(the_map):
    u = host(coarse_grain(dipeptide(N), the_map), the_map, n_samples=2)
    ts = u.trajectory[3]
    before = ts.positions.copy()
    coming = u.trajectory.look_ahead(range(4, 9))
    assert [frame[2:] for frame in coming] == [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]
    np.testing.assert_array_equal(ts.positions, before)
    np.testing.assert_array_equal(coming[2].beads, u.trajectory[6].data["beads"])
    assert coming[0].dimensions is None
    boxed = dipeptide(2, dimensions=np.array([[30, 31, 32, 90, 90, 90], [33, 31, 32, 90, 90, 90]]))
    ahead = host(coarse_grain(boxed, the_map), the_map, n_samples=2).trajectory.look_ahead([1, 2])
    assert [frame.dimensions[0] for frame in ahead] == [30, 33]


def test_backmap_of_any_source(source, the_map):
    u = backmap(source, GaussianBackmapper(the_map), n_samples=2, prefetch=4)
    frames = np.array([ts.positions.copy() for ts in u.trajectory])
    beads = np.repeat(source.trajectory.timeseries(order="fac"), 2, axis=0)
    np.testing.assert_array_equal(frames[:, the_map.bead_atoms], beads)
    for k in (7, 11, 0, 8):
        np.testing.assert_array_equal(u.trajectory[k].positions, frames[k])


@pytest.mark.parametrize("suffix", ["xtc", "trr", "dcd", "h5md", "pdb", "xyz"])
@pytest.mark.filterwarnings("ignore:DCDReader currently makes independent timesteps")
@pytest.mark.filterwarnings("ignore:Found no information for attr:UserWarning")
@pytest.mark.filterwarnings("ignore:Found missing chainIDs:UserWarning")
def test_some_frames_in_a_file(the_map, suffix, tmp_path):
    boxes = np.array([[30 + k, 31, 32, 90, 90, 90] for k in range(N)])
    beads = coarse_grain(dipeptide(N, dimensions=boxes), the_map)
    u = backmap(beads, GaussianBackmapper(the_map), n_samples=2)
    ala, path = u.select_atoms("resname ALA"), str(tmp_path / f"atoms.{suffix}")
    chosen = [3, 4, 9]
    frames = [(ts.time, ala.positions.copy()) for ts in u.trajectory[chosen]]
    ala.write(path, frames=u.trajectory[chosen])
    again = mda.Merge(ala).load_new(path)
    times, positions = zip(*frames, strict=True)
    atol = {"xtc": 0.006, "pdb": 0.0006}.get(suffix, 1e-5)
    np.testing.assert_allclose(again.trajectory.timeseries(order="fac"), positions, atol=atol)
    if suffix not in ("pdb", "xyz"):
        lengths = [ts.dimensions[0] for ts in again.trajectory]
        np.testing.assert_allclose(lengths, [31, 32, 34], rtol=1e-6)
    if suffix in ("xtc", "trr", "h5md"):  # the others keep no times but a fixed step
        assert [ts.time for ts in again.trajectory] == list(times)


def test_one_frame_source(the_map):
    u = host(coarse_grain(dipeptide(1), the_map), the_map)
    assert [ts.frame for ts in u.trajectory] == [0]


def test_group_of_beads(the_map):
    two = mda.Merge(*[coarse_grain(dipeptide(1, seed=k), the_map).atoms for k in (0, 1)])
    reader = BeadReader(two.atoms[9:4:-1][::-1], cg_map=the_map)
    np.testing.assert_array_equal(reader.ts.data["beads"], two.atoms.positions[5:])


def test_errors(the_map):
    source = coarse_grain(dipeptide(N), the_map)
    with pytest.raises(ValueError, match=r"5 beads, the given AtomGroup has 4"):
        BeadReader(source.atoms[:4], cg_map=the_map)
    with pytest.raises(TypeError, match="pass the Universe"):
        BeadReader(source.trajectory, cg_map=the_map)
    with pytest.raises(ValueError, match="topology has 5 sites"):
        source.copy().load_new(source, format=BeadReader, cg_map=the_map)
    with pytest.raises(ValueError, match="at least 1"):
        BeadReader(source, cg_map=the_map, n_samples=0)
    for n_frames in (1, 2):  # MDAnalysis takes a reader of one frame for a list of files
        reader = coarse_grain(dipeptide(n_frames), the_map).trajectory
        with pytest.raises(TypeError, match="pass the Universe"):
            host(reader, the_map)
    for empty in (universe_from(the_map.beads), universe_from(the_map.beads).atoms):
        with pytest.raises(ValueError, match="has no frames; load a trajectory"):
            BeadReader(empty, cg_map=the_map)
    with pytest.raises(ValueError, match="has no frames; load a trajectory"):
        coarse_grain(mda.Universe.empty(22), the_map)
