"""Beads from files and Universes of all kinds, in the order of the model."""

import pickle

import MDAnalysis as mda
import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from MDAnalysis.lib.mdamath import triclinic_vectors
from molecules import dipeptide, slice_map

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_mda.bead_sources import bead_universe, in_model_order
from ccg_mda.universe import coarse_grain, torsion_map

BOX = np.array([30.0, 32.0, 35.0, 80.0, 75.0, 95.0])
N = 5
# MDAnalysis says what files lack, and ASE symbols of beads aren't elements.
pytestmark = [
    pytest.mark.filterwarnings("ignore:DCDReader currently makes independent timesteps"),
    pytest.mark.filterwarnings("ignore:Reader has no dt information"),
    pytest.mark.filterwarnings("ignore:.*[Ee]lement:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*netCDF4"),
    pytest.mark.filterwarnings("ignore:Found no information for attr"),
    pytest.mark.filterwarnings("ignore:Found missing chainIDs"),
    pytest.mark.filterwarnings("ignore:1 A.3 CRYST1 record, this is usually a placeholder"),
]


@pytest.fixture(scope="module")
def the_map():
    return slice_map()


@pytest.fixture(scope="module")
def beads(the_map):
    boxes = np.tile(BOX, (N, 1))
    boxes[:, :3] += np.arange(N)[:, None]
    return coarse_grain(dipeptide(N, dimensions=boxes), the_map)


def read(universe):
    return np.array([ts.positions.copy() for ts in universe.trajectory])


def dump(path, positions, boxes, *, columns="x y z", edges="pp pp pp", origin=0.0, seed=0):
    """A LAMMPS dump by hand, its beads in another order in each frame."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for k, (x, box) in enumerate(zip(positions, boxes, strict=True)):
            cell = triclinic_vectors(box, dtype=float)
            (lx, _, _), (xy, ly, _), (xz, yz, lz) = cell
            lo = (origin + min(0, xy, xz, xy + xz), origin + min(0, yz), origin)
            hi = (origin + lx + max(0, xy, xz, xy + xz), origin + ly + max(0, yz), origin + lz)
            shown = x @ np.linalg.inv(cell) if columns.startswith("xs") else x + origin
            file.write(f"ITEM: TIMESTEP\n{1000 * k}\nITEM: NUMBER OF ATOMS\n{len(x)}\n")
            file.write(f"ITEM: BOX BOUNDS xy xz yz {edges}\n")
            for bound in zip(lo, hi, (xy, xz, yz), strict=True):
                file.write(" ".join(f"{value:.10g}" for value in bound) + "\n")
            file.write(f"ITEM: ATOMS id type {columns}\n")
            for i in rng.permutation(len(x)):
                file.write(f"{i + 1} 1 " + " ".join(f"{v:.9g}" for v in shown[i]) + "\n")


@pytest.mark.parametrize(
    "suffix",
    ["traj", "extxyz", "db", "npy", "xyz", "xtc", "dcd", "trr", "nc", "h5md", "pdb", "dump"],
)
def test_round_trip(suffix, beads, the_map, tmp_path):
    expected, boxes = read(beads), np.array([ts.dimensions.copy() for ts in beads.trajectory])
    path, options = tmp_path / f"beads.{suffix}", {}
    if suffix == "npy":
        path, options = expected, {"dt": 2.0, "dimensions": boxes}
    elif suffix in ("traj", "extxyz", "db"):
        frames = [the_map.to_ase(frame) for frame in expected]
        for k, (frame, box) in enumerate(zip(frames, boxes, strict=True)):
            frame.set_cell(triclinic_vectors(box, dtype=float))
            frame.pbc = True
            frame.info["time_fs"] = 2000.0 * k
        write(path, frames)
    elif suffix == "dump":
        dump(path, expected, boxes)
        options = {"dt": 0.002}
    else:
        if suffix == "h5md":
            pytest.importorskip("h5py")
        if suffix == "dcd":
            options = {"dt": 2.0}  # the writer doesn't know it
        beads.atoms.write(path, frames="all")
    u = bead_universe(path, the_map, **options)
    assert u.atoms.names.tolist() == list(the_map.beads.names)
    np.testing.assert_allclose(u.atoms.masses, the_map.beads.masses)
    np.testing.assert_array_equal(u.bonds.indices, the_map.beads.bonds)
    assert u.residues.resnames.tolist() == ["ACE", "ALA", "NME"]
    atol = {"xtc": 0.006, "pdb": 0.0006}.get(suffix, 1e-5)
    for other in (u, u.copy(), pickle.loads(pickle.dumps(u))):
        np.testing.assert_allclose(read(other), expected, atol=atol)
        other.trajectory[3]
        np.testing.assert_allclose(other.atoms.positions, expected[3], atol=atol)
        if suffix == "pdb":  # the writer of MDAnalysis puts down the first box only
            np.testing.assert_allclose(other.dimensions, boxes[0], atol=0.006)
        elif suffix != "xyz":
            np.testing.assert_allclose(other.dimensions, boxes[3], atol=1e-3)
        if suffix not in ("xyz", "pdb", "db"):
            assert [ts.time for ts in other.trajectory] == pytest.approx(2.0 * np.arange(N))
        other.trajectory.close()


def test_gro(beads, the_map, tmp_path):
    beads.trajectory[2]
    beads.atoms.write(tmp_path / "beads.gro")
    u = bead_universe(tmp_path / "beads.gro", the_map)
    np.testing.assert_allclose(u.atoms.positions, beads.atoms.positions, atol=0.006)
    np.testing.assert_allclose(u.dimensions, beads.dimensions, atol=1e-3)
    np.testing.assert_allclose(u.atoms.masses, the_map.beads.masses)
    beads.trajectory[0]


def test_boxes_of_pdb_models(beads, the_map, tmp_path):
    """Before each model, as GROMACS has them, or within; none before the first, or the dummy."""
    path, atoms = tmp_path / "beads.pdb", []
    for k, name in enumerate(the_map.beads.names):
        atoms.append(f"ATOM  {k + 1:5d} {name:^4s} ALA A{k + 1:4d}    {k:8.3f}   0.000   0.000\n")
    cells = [f"CRYST1{a:9.3f}   31.000   32.000  90.00  90.00  90.00 P 1\n" for a in (40, 50)]
    dummy = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1\n"
    model = "MODEL\n{}" + "".join(atoms) + "ENDMDL\n"
    models = [model.format(""), cells[0] + model.format(""), model.format(cells[1])]
    path.write_text("".join([*models, model.format(""), dummy + model.format(""), "END\n"]))
    u = bead_universe(path, the_map)
    found = [None if ts.dimensions is None else ts.dimensions[0] for ts in u.trajectory]
    assert found == [None, 40, 50, 50, None]
    assert [u.trajectory[k].dimensions[0] for k in (3, 1, 2)] == [50, 40, 50]
    assert u.trajectory[4].dimensions is None
    u.trajectory.close()


@pytest.mark.parametrize("columns", ["x y z", "xu yu zu", "xs ys zs"])
@pytest.mark.parametrize("suffix", ["lammpstrj", "0"])
def test_lammps_dumps(columns, suffix, beads, the_map, tmp_path):
    """Any name; box not at the origin: beads move with it, as MDAnalysis has it."""
    expected, boxes = read(beads), np.array([ts.dimensions.copy() for ts in beads.trajectory])
    dump(tmp_path / f"dump.{suffix}", expected, boxes, columns=columns, origin=-7.0)
    u = bead_universe(tmp_path / f"dump.{suffix}", the_map, dt=0.002)
    for ts, frame, box in zip(u.trajectory, expected, boxes, strict=True):
        np.testing.assert_allclose(
            ts.positions - ts.positions[0], frame - frame[0], atol=1e-4 if "s" in columns else 1e-5
        )
        np.testing.assert_allclose(ts.dimensions, box, atol=1e-3)
    u.trajectory.close()


def test_boundaries_of_lammps_dumps(beads, the_map, tmp_path):
    path, x, boxes = tmp_path / "beads.dump", read(beads), np.tile(BOX, (N, 1))
    dump(path, x, boxes, edges="ss ff fm", origin=-3.0)
    u = bead_universe(path, the_map)
    assert all(ts.dimensions is None for ts in u.copy().trajectory)
    np.testing.assert_allclose(read(u), x, atol=1e-5)
    u.trajectory.close()
    with pytest.raises(ValueError, match="dumps to be in Å"):
        bead_universe(path, the_map, lengthunit="nm")
    dump(path, x, boxes, edges="pp pp ff")
    with pytest.raises(ValueError, match=r"some directions only \(ff pp\)"):
        bead_universe(path, the_map)
    text = path.read_text()
    for changed, message in (
        (text.replace("ATOMS id", "ATOMS mol"), "which bead is which.*write a dump with ids"),
        ("ITEM: UNITS\nlj\n" + text, "'ITEM: UNITS' and isn't.*without dump_modify units"),
    ):
        path.write_text(changed)
        with pytest.raises(ValueError, match=message):
            bead_universe(path, the_map)


def test_units_of_lammps_dcd(beads, the_map, tmp_path):
    """Options go to the reader: LAMMPS' DCD files say nothing of their units."""
    expected = read(beads)
    beads.atoms.write(tmp_path / "beads.dcd", frames="all")
    options = {"format": "LAMMPS", "lengthunit": "nm", "timeunit": "ps"}
    u = bead_universe(tmp_path / "beads.dcd", the_map, **options)
    np.testing.assert_allclose(read(u), 10 * expected, rtol=1e-6)
    u.trajectory.close()


def test_cells_of_ase_in_any_orientation(beads, the_map, tmp_path):
    """MDAnalysis has boxes upright: distances to images stay, and no mirror image is taken."""
    rng = np.random.default_rng(4)
    x, cell = read(beads)[0].astype(float), triclinic_vectors(BOX, dtype=float)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    write(tmp_path / "a.traj", Atoms("X5", x @ turn, cell=cell @ turn, pbc=True))
    u = bead_universe(tmp_path / "a.traj", the_map)
    np.testing.assert_allclose(u.atoms.positions, x, atol=1e-5)
    np.testing.assert_allclose(u.dimensions, BOX, atol=1e-5)
    for atoms, message in (
        (Atoms("X5", x, cell=cell, pbc=[1, 1, 0]), "frame 1 of .* some directions only"),
        (Atoms("X5", x, cell=cell[::-1], pbc=True), "left-handed"),
    ):
        write(tmp_path / "b.traj", [the_map.to_ase(x), atoms])
        with pytest.raises(ValueError, match=message):
            bead_universe(tmp_path / "b.traj", the_map)


def test_times_of_ase_files(the_map, tmp_path):
    frames = [the_map.to_ase(np.full((5, 3), float(k))) for k in range(4)]
    path = tmp_path / "run.xyz"
    write(path, frames, format="extxyz")
    assert [ts.time for ts in bead_universe(path, the_map, dt=3.0).trajectory] == [0, 3, 6, 9]
    times = [1.0, 2.0, 4.0, 8.0]  # a run that was continued with another interval
    for frame, time in zip(frames, times, strict=True):
        frame.info["time_fs"] = 1000 * time
    write(path, frames, format="extxyz")
    u = bead_universe(path, the_map)
    assert u.dimensions is None
    for other in (u, u.copy(), pickle.loads(pickle.dumps(u))):
        assert [ts.time for ts in other.trajectory] == pytest.approx(times)
        assert other.trajectory[2].time == 4.0


# ---------------------------------------------------------------------- names and order


@pytest.fixture(scope="module")
def martini():
    """Seven beads of four residues, numbered from 19: BB in each, side chains in two of them."""
    names = ("BB", "BB", "SC1", "SC2", "BB", "BB", "SC1")
    residue = np.array([0, 1, 1, 1, 2, 3, 3])
    topology = Topology(
        names=names,
        masses=np.arange(1.0, 8.0),
        resnames=np.array(["GLY", "HSD", "ALA", "LYS"])[residue].tolist(),
        resids=19 + residue,
        bonds=[(0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (5, 6)],
    )
    return CGMap.from_slices(topology, range(7))


def universe_of(names, resids, resnames=None, *, frames=2):
    """A Universe of which bead k sits at (k, frame, 0)."""
    changes = np.diff(resids, prepend=resids[0]) != 0
    residue = np.cumsum(changes)
    u = mda.Universe.empty(len(resids), residue[-1] + 1, atom_resindex=residue, trajectory=True)
    if names is not None:
        u.add_TopologyAttr("names", names)
    first = np.unique(residue, return_index=True)[1]
    u.add_TopologyAttr("resids", np.array(resids)[first])
    if resnames is not None:
        u.add_TopologyAttr("resnames", np.array(resnames)[first])
    x = np.zeros((frames, len(resids), 3), np.float32)
    x[..., 0], x[..., 1] = np.arange(len(resids)), np.arange(frames)[:, None]
    return u.load_new(x)


@pytest.mark.parametrize("shift", [0, -18, 981])
def test_martini_names_go_by_residue(shift, martini):
    """Residues and the beads in them in another order, numbered from elsewhere."""
    beads = martini.beads
    order = np.array([5, 6, 0, 3, 1, 2, 4])
    names, resids = np.array(beads.names)[order], beads.resids[order] + shift
    resnames = np.array(["GLY", "HIS", "ALA", "LYS"])[beads.resids[order] - 19]
    u = universe_of(names, resids, resnames)
    group = in_model_order(u, martini)
    np.testing.assert_array_equal(order[group.ix], np.arange(7))
    ordered = bead_universe(u, martini)
    assert ordered.atoms.masses.tolist() == beads.masses.tolist()
    ordered.trajectory[1]
    np.testing.assert_array_equal(ordered.atoms.positions[:, 0], np.argsort(order))
    assert (ordered.atoms.positions[:, 1] == 1).all()
    assert u.trajectory.frame == 0


def test_order_of_beads(martini, the_map):
    beads = martini.beads
    same = universe_of(beads.names, beads.resids)
    # In this order; without names; called X; all in one residue; of other numbers.
    for u in (
        same,
        universe_of(None, beads.resids),
        universe_of(["X"] * 7, [1] * 7),
        universe_of(beads.names, [1] * 7),
        universe_of(beads.names, [7, 3, 3, 3, 7, 3, 3]),
    ):
        np.testing.assert_array_equal(in_model_order(u, martini).ix, np.arange(7))
    # Residues numbered at random but in order: only beads within them change places.
    u = universe_of(["BB", "SC2", "SC1", "BB", "BB", "SC1", "BB"], [40, 7, 7, 7, 12, 3, 3])
    np.testing.assert_array_equal(in_model_order(u, martini).ix, [0, 3, 2, 1, 4, 6, 5])
    # Names that are unique need no residues at all.
    order = [4, 2, 0, 1, 3]
    u = universe_of(np.array(the_map.beads.names)[order], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(np.array(order)[in_model_order(u, the_map).ix], np.arange(5))
    # Of a Universe of several molecules, any group.
    two = mda.Merge(same.atoms, same.atoms)
    np.testing.assert_array_equal(in_model_order(two.atoms[7:], martini).ix, np.arange(7, 14))


def test_chains_with_the_same_numbers(martini):
    two, n = martini.repeated(2), 7
    chains = Topology.from_dict(
        two.beads.to_dict()
        | {"resids": np.tile(martini.beads.resids, 2), "segids": ["A"] * n + ["B"] * n}
    )
    the_map = CGMap.from_slices(chains, range(2 * n))
    one = universe_of(martini.beads.names, martini.beads.resids).atoms
    u = mda.Merge(one, one)
    u.add_TopologyAttr("segids", ["S"] * len(u.segments))
    np.testing.assert_array_equal(in_model_order(u, the_map).ix, np.arange(2 * n))
    for segid, residues in (("B", u.residues[:4]), ("A", u.residues[4:])):
        residues.segments = u.add_Segment(segid=segid)
    np.testing.assert_array_equal(in_model_order(u, the_map).ix, np.r_[n : 2 * n, :n])


def test_what_doesn_t_match_is_refused(martini):
    names, resids = list(martini.beads.names), martini.beads.resids
    with pytest.raises(ValueError, match=r"has 7 beads, the given AtomGroup has 6.*select_atoms"):
        in_model_order(universe_of(names, resids).atoms[1:], martini)
    with pytest.raises(ValueError, match=r"bead 2 is 'SCX' of residue 20.*'SC1' there.*SC2"):
        in_model_order(universe_of([*names[:2], "SCX", *names[3:]], resids), martini)
    mixed = [names[k] for k in (2, 0, 1, 3, 4, 5, 6)]
    with pytest.raises(ValueError, match=r"one name \('BB'\) can't be told apart.*residue numbers"):
        in_model_order(universe_of(mixed, [1] * 7), martini)
    resnames = np.array(["GLY", "HIS", "VAL", "LYS"])[resids - 19]
    with pytest.raises(ValueError, match=r"bead 4 \(BB\) is in residue VAL.*in ALA.*sequence"):
        in_model_order(universe_of(names, resids, resnames), martini)


@pytest.mark.parametrize("suffix", ["gro", "pdb", "xyz"])
def test_permuted_files(suffix, martini, tmp_path):
    beads, order = martini.beads, np.array([0, 3, 1, 2, 4, 6, 5])
    u = universe_of(np.array(beads.names)[order], beads.resids[order] - 18, frames=1)
    u.add_TopologyAttr("resnames", ["GLY", "HIS", "ALA", "LYS"])
    u.dimensions = BOX
    path = tmp_path / f"beads.{suffix}"
    u.atoms.write(path)
    if suffix == "xyz":  # no residues there
        with pytest.raises(ValueError, match="can't be told apart"):
            bead_universe(path, martini)
        path.write_text(path.read_text().replace("BB", "P").replace("SC", "Q"))
        with pytest.raises(ValueError, match=r"model's 5 beads \(Number of atoms 7\)"):
            bead_universe(path, slice_map())
        expected = np.arange(7)
    else:
        expected = np.argsort(order)
    ordered = bead_universe(path, martini)
    np.testing.assert_allclose(ordered.atoms.positions[:, 0], expected, atol=1e-3)
    assert ordered.atoms.names.tolist() == list(beads.names)
    assert ordered.atoms.masses.tolist() == beads.masses.tolist()
    ordered.trajectory.close()


def test_names_that_a_file_cuts(the_map, tmp_path):
    names = ("methyl-1", "amide-1", "alpha", "amide-2", "methyl-2")
    topology = Topology.from_dict(the_map.beads.to_dict() | {"names": names})
    long = CGMap.from_slices(topology, range(5))
    u = coarse_grain(universe_of(names, topology.resids, topology.resnames), long)
    u.dimensions = BOX
    u.atoms.write(tmp_path / "beads.gro")
    with pytest.raises(ValueError, match="told apart"):  # reversed, but of the same names
        in_model_order(mda.Universe(tmp_path / "beads.gro", to_guess=()).atoms[::-1], long)
    u = bead_universe(tmp_path / "beads.gro", long)
    np.testing.assert_allclose(u.atoms.positions[:, 0], np.arange(5), atol=1e-3)
    assert tuple(u.atoms.names) == names


def test_errors(the_map, tmp_path):
    path = tmp_path / "beads.extxyz"
    write(path, the_map.to_ase(np.zeros((5, 3))))
    other = CGMap.from_slices(the_map.atoms, [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="use the model that the trajectory was made with"):
        bead_universe(path, other)
    for suffix in ("extxyz", "traj", "db", "xyz", "gro", "pdb"):
        cut_off = tmp_path / f"cut_off.{suffix}"
        for content, message in ((b"", "is empty"), (b"\x00junk\n\n", "can't be read")):
            cut_off.write_bytes(content)
            with pytest.raises(ValueError, match=message):
                bead_universe(cut_off, the_map)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bead_universe(tmp_path / "nowhere.xtc", the_map)
    for array in (np.zeros((7, 4, 3)), np.zeros((0, 5, 3))):
        with pytest.raises(ValueError, match=r"\(n_frames, 5, 3\), got"):
            bead_universe(array, the_map)
    broken = tmp_path / "broken.gro"
    broken.write_text("no frames\n5\nhere\n")
    with pytest.raises(ValueError, match=r"broken.gro can't be read .* model's 5 beads"):
        bead_universe(broken, the_map)
    with pytest.raises(TypeError, match=r"drop {'dt': 1}"):
        bead_universe(coarse_grain(dipeptide(1), the_map), the_map, dt=1)
    psi = ["index 4", "index 6", "index 8", "index 14"]
    with pytest.raises(ValueError, match="torsions phi, not beads"):
        bead_universe(np.zeros((1, 2)), torsion_map(dipeptide(), {"phi": psi}))
