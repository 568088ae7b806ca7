import warnings

import MDAnalysis as mda
import numpy as np
import pytest
from MDAnalysis.lib.mdamath import triclinic_vectors
from MDAnalysis.transformations import wrap
from molecules import BACKBONE, PDB, dipeptide

import ccg_mda
from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_mda.universe import (
    cg_map,
    coarse_grain,
    topology_from,
    torsion_map,
    universe_from,
)


@pytest.fixture(scope="module")
def u():
    return dipeptide(4)


def test_public_names():
    for name in ccg_mda.__all__:
        assert getattr(ccg_mda, name).__name__ == name
    assert set(ccg_mda.__all__) <= set(dir(ccg_mda))
    with pytest.raises(AttributeError, match="no attribute 'bakmap'"):
        _ = ccg_mda.bakmap


def test_topology_round_trip(u):
    topology = topology_from(u)
    assert topology.names == tuple(u.atoms.names)
    assert topology.elements == tuple(u.atoms.elements)
    assert topology.types[8] == "ALA:CA"
    assert len(topology.bonds) == 21
    assert topology_from(universe_from(topology)) == topology
    charged = Topology.from_dict({**topology.to_dict(), "charges": np.linspace(-1, 1, 22)})
    assert topology_from(universe_from(charged)) == charged


def test_topology_guesses_what_is_missing(u):
    bare = mda.Universe.empty(22, trajectory=True)
    bare.add_TopologyAttr("names", u.atoms.names)
    bare.atoms.positions = u.atoms.positions
    with pytest.warns(UserWarning, match="has no bonds; guessing"):
        topology = topology_from(bare)
    expected = topology_from(u)
    assert topology.elements == expected.elements
    np.testing.assert_allclose(topology.masses, expected.masses, atol=0.01)
    np.testing.assert_array_equal(topology.bonds, expected.bonds)
    assert not hasattr(bare, "bonds")
    with pytest.raises(ValueError, match="neither names nor elements"):
        topology_from(mda.Universe.empty(2))


def test_bonds_are_guessed_across_the_border_of_the_box(u):
    bare = mda.Universe(PDB)
    bare.dimensions = [20.0, 20.0, 20.0, 90.0, 90.0, 90.0]
    bare.atoms.positions += 20.0 - bare.atoms.center_of_geometry()
    bare.atoms.wrap()
    assert np.ptp(bare.atoms.positions, axis=0).min() > 15
    bare.atoms.types = [f"{e}X{k}" for k, e in enumerate(bare.atoms.elements)]  # no radius known
    with pytest.warns(UserWarning, match="guessing"):
        topology = topology_from(bare)
    np.testing.assert_array_equal(topology.bonds, topology_from(u).bonds)


def test_bonds_that_cannot_be_guessed():
    strange = mda.Universe.empty(2, trajectory=True)
    strange.add_TopologyAttr("names", ["QQ1", "QQ2"])
    with (
        pytest.warns(UserWarning, match="guessing"),
        pytest.raises(ValueError, match=r"can't be guessed.*load a topology"),
    ):
        topology_from(strange)


PHI = ["index 4", "index 6", "index 8", "index 14"]


def test_torsion_map(u):
    torsions = torsion_map(u, {"phi": PHI, "psi": ["index 6", "index 8", "index 14", "index 16"]})
    assert torsions.names == ("phi", "psi")
    dihedrals = [u.atoms[list(row)].dihedral.value() for row in torsions.torsions]
    np.testing.assert_allclose(np.degrees(torsions.apply(u.atoms.positions)), dihedrals, atol=1e-3)
    inside = torsion_map(u.select_atoms("resname ALA"), {"chi": [f"name {n}" for n in CHI]})
    assert [inside.atoms.names[i] for i in inside.torsions[0]] == CHI
    with pytest.raises(ValueError, match="four selections, got 3"):
        torsion_map(u, {"phi": PHI[:3]})
    with pytest.raises(ValueError, match=r"'phi': the selection 'name H1' matches 2 atoms"):
        torsion_map(u, {"phi": [*PHI[:3], "name H1"]})
    with pytest.raises(ValueError, match="torsions phi, psi, not beads"):
        coarse_grain(u, torsions)


CHI = ["N", "CA", "CB", "HB1"]


def test_topology_of_a_reordered_group(u):
    order = np.r_[21:10:-1, 0:11]
    topology = topology_from(u.atoms[order])
    assert topology.names == tuple(u.atoms.names[order])
    pairs = {frozenset(pair) for pair in order[topology.bonds].tolist()}
    assert pairs == {frozenset(pair) for pair in topology_from(u).bonds.tolist()}


def test_slice_map(u):
    the_map = cg_map(u, BACKBONE)
    assert the_map.kind == "slice"
    assert the_map.beads.names == tuple(BACKBONE)
    np.testing.assert_array_equal(the_map.bead_atoms, [4, 6, 8, 14, 16])
    assert cg_map(u, list(BACKBONE.values())).beads.names == ("C", "N", "CA", "C", "N")
    assert cg_map(u, "name CB CA").n_beads == 2


@pytest.mark.parametrize(
    ("preset", "indices"),
    [
        ("ca", [8]),
        ("backbone", [4, 6, 8, 14, 16]),
        ("heavy", [1, 4, 5, 6, 8, 10, 14, 15, 16, 18]),
    ],
)
def test_slice_presets(u, preset, indices):
    np.testing.assert_array_equal(cg_map(u, preset).bead_atoms, indices)


def test_centre_of_mass_presets(u):
    residues = cg_map(u, "residue-com")
    assert residues.kind == "mass"
    np.testing.assert_allclose(
        residues.apply(u.atoms.positions.astype(float)),
        u.atoms.center_of_mass(compound="residues"),
        atol=1e-6,
    )
    np.testing.assert_array_equal(residues.beads.bonds, [[0, 1], [1, 2]])
    two = mda.Merge(u.atoms, u.atoms)
    assert cg_map(two, "molecule-com").n_beads == 2


def test_groups(u):
    beads = {"BB": "name N CA C O and resname ALA", "SC": "name CB HB*"}
    masses = cg_map(u, beads)
    geometry = cg_map(u, beads, weighting="geometry")
    assert (masses.kind, geometry.kind) == ("mass", "geometry")
    group = u.select_atoms(beads["SC"])
    x = u.atoms.positions.astype(float)
    np.testing.assert_allclose(masses.apply(x)[1], group.center_of_mass(), atol=1e-6)
    np.testing.assert_allclose(geometry.apply(x)[1], group.center_of_geometry(), atol=1e-6)


def test_one_call_makes_martini_like_beads(u):
    """One bead per residue and kind where it has atoms: ACE and NME have no side chain."""
    two = mda.Merge(u.atoms, u.atoms)
    two.atoms[22:].positions += 30.0
    beads = {"BB": "name N CA C O", "SC1": "name CB HB*"}
    the_map = cg_map(two, beads, per="residue")
    assert the_map.beads.names == ("BB", "BB", "SC1", "BB") * 2
    assert the_map.beads.resnames == ("ACE", "ALA", "ALA", "NME") * 2
    expected = [
        two.atoms[part].select_atoms(f"resname {residue} and ({beads[bead]})").center_of_mass()
        for part in (slice(22), slice(22, None))
        for residue, bead in (("ACE", "BB"), ("ALA", "BB"), ("ALA", "SC1"), ("NME", "BB"))
    ]
    np.testing.assert_allclose(the_map.apply(two.atoms.positions.astype(float)), expected, 1e-6)
    np.testing.assert_array_equal(the_map.beads.bonds[:3], [[0, 1], [1, 2], [1, 3]])
    resids = two.residues.resids.tolist()
    assert the_map.beads.resids.tolist() == [resids[k] for k in (0, 1, 1, 2, 3, 4, 4, 5)]
    coarse = coarse_grain(two, the_map)
    assert coarse.residues.resnames.tolist() == ["ACE", "ALA", "NME"] * 2
    ends = cg_map(two, {"A": "resname ACE", "E": "resname NME"}, per="molecule")
    assert ends.beads.names == ("A", "E") * 2
    with pytest.raises(ValueError, match="'name XX' matches no atoms"):
        cg_map(two, {"BB": "name CA", "SC1": "name XX"}, per="residue")
    with pytest.raises(ValueError, match=r"needs {bead name: selection}"):
        cg_map(two, "name CA", per="residue")
    with pytest.raises(ValueError, match="'residue' or 'molecule', got 'chain'"):
        cg_map(two, beads, per="chain")


def test_map_of_a_group_counts_from_its_start(u):
    the_map = cg_map(u.select_atoms("resname ALA"), {"CA": "name CA", "CB": "name CB"})
    assert the_map.n_atoms == 10
    np.testing.assert_array_equal(the_map.bead_atoms, [2, 4])


def test_empty_selections_are_named(u):
    with pytest.raises(ValueError, match="'name XX' matches no atoms"):
        cg_map(u, {"CA": "name CA", "X": "name XX"})
    with pytest.raises(ValueError, match=r"'name XX' selects no atoms.*residue-com"):
        cg_map(u, "name XX")


@pytest.mark.parametrize("kind", ["slice", "mass"])
def test_coarse_grain(kind):
    rng = np.random.default_rng(2)
    more = {key: rng.normal(size=(4, 22, 3)) for key in ("velocities", "forces")}
    u = dipeptide(4, **more)
    the_map = cg_map(u, BACKBONE if kind == "slice" else "residue-com")
    u.trajectory[1]
    beads = coarse_grain(u, the_map)
    assert tuple(beads.atoms.names) == the_map.beads.names
    np.testing.assert_allclose(beads.atoms.masses, the_map.beads.masses)
    np.testing.assert_array_equal(beads.bonds.indices, the_map.beads.bonds)
    matrix = the_map.matrix.toarray()
    for k in (3, 0, 2):
        beads.trajectory[k]
        assert u.trajectory.frame == 1
        source = u.copy()
        source.trajectory[k]
        np.testing.assert_allclose(beads.atoms.positions, matrix @ source.atoms.positions, 1e-5)
        np.testing.assert_allclose(
            beads.atoms.velocities, matrix @ source.atoms.velocities, atol=1e-6
        )
        # Every atom of a residue feels a part of the force on its centre.
        own = matrix > 0
        np.testing.assert_allclose(beads.atoms.forces, own @ source.atoms.forces, atol=1e-6)


def test_coarse_grain_across_the_box():
    """Wrapped atom by atom; the centres are those that MDAnalysis finds when it unwraps."""
    box = np.array([8.0, 9.0, 9.5, 75.0, 82.0, 100.0])
    u = dipeptide(5, dimensions=box)
    the_map = cg_map(u, "residue-com")
    cell = triclinic_vectors(box, dtype=float)
    for transformation in (None, wrap(u.atoms)):
        if transformation:
            u.trajectory.add_transformations(transformation)
        for ts, coarse in zip(u.trajectory, coarse_grain(u, the_map).trajectory, strict=True):
            whole = u.atoms.center_of_mass(compound="residues", unwrap=True)
            apart = (coarse.positions - whole) @ np.linalg.inv(cell)
            np.testing.assert_allclose(apart, np.round(apart), atol=1e-5)
            np.testing.assert_array_equal(coarse.dimensions, ts.dimensions)
            assert coarse.time == ts.time
    assert np.abs(u.atoms.center_of_mass(compound="residues") - whole).max() > 1


def test_coarse_grain_has_no_forces_where_no_map_of_them_exists():
    u = dipeptide(1, forces=np.ones((1, 22, 3)))
    matrix = np.zeros((2, 22))
    matrix[0, 4], matrix[1, [6, 8]] = 1, 0.5
    assert coarse_grain(u, CGMap.from_matrix(topology_from(u), matrix)).trajectory.ts.has_forces
    matrix[1, [4, 6, 8]] = 0.5, 0.5, 0
    shared = CGMap.from_matrix(topology_from(u), matrix)
    assert not coarse_grain(u, shared).trajectory.ts.has_forces


def test_coarse_grain_in_solvent(u):
    water = mda.Universe.empty(3, trajectory=True)
    water.add_TopologyAttr("names", ["OW", "HW1", "HW2"])
    water.add_TopologyAttr("masses", [16.0, 1.0, 1.0])
    system = mda.Merge(water.atoms, u.atoms)
    solute = system.atoms[3:]
    the_map = cg_map(dipeptide(), BACKBONE)
    np.testing.assert_array_equal(
        coarse_grain(solute, the_map).atoms.positions,
        system.atoms.positions[the_map.bead_atoms + 3],
    )
    with pytest.raises(ValueError, match=r"CGMap has 22 atoms.*has 25.*select_atoms"):
        coarse_grain(system, the_map)


def test_analyses_of_hydrogen_bonds_and_torsions_work():
    from MDAnalysis.analysis.dihedrals import Ramachandran
    from MDAnalysis.analysis.hydrogenbonds import HydrogenBondAnalysis

    source = dipeptide(3)
    u = universe_from(topology_from(source), source.trajectory.timeseries(order="fac"))
    expected = Ramachandran(source.select_atoms("resname ALA")).run().results.angles
    angles = Ramachandran(u.select_atoms("resname ALA")).run().results.angles
    np.testing.assert_allclose(angles, expected, atol=1e-3)
    options = {"donors_sel": "name N", "hydrogens_sel": "name H", "acceptors_sel": "name O"}
    options |= {"d_h_a_angle_cutoff": 90, "d_a_cutoff": 4.5}
    counts = [
        HydrogenBondAnalysis(universe, **options).run().count_by_time() for universe in (source, u)
    ]
    np.testing.assert_array_equal(*counts)
    assert counts[0].sum() > 0


def test_writes_pdb(tmp_path):
    u = universe_from(topology_from(dipeptide()), dipeptide().atoms.positions[None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the PDB writer reports every column that it fills itself
        u.atoms.write(tmp_path / "out.pdb")
    lines = (tmp_path / "out.pdb").read_text().splitlines()
    names = [line[12:16].strip() for line in lines if line.startswith("ATOM")]
    assert names == [line[12:16].strip() for line in PDB.read_text().splitlines()[:-1]]
