"""The order of placement: causal, deterministic, alike for like residues, short in long chains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from systems import DIPEPTIDE, OTHERS, flow_of, molecule, system

from ccg_ase import CGMap, Topology, TorsionMap
from ccg_mda.placement_order import build_placement
from ccg_mda.sight import Blocks, slot_kinds

ALANINE = ("N", "H", "CA", "HA", "CB", "HB1", "HB2", "HB3", "C", "O")
ALANINE_BONDS = ((0, 1), (0, 2), (2, 3), (2, 4), (4, 5), (4, 6), (4, 7), (2, 8), (8, 9))
MASSES = {"H": 1.008, "C": 12.011, "N": 14.007, "O": 15.999, "S": 32.06}


def topology_of(names, bonds, **columns) -> Topology:
    elements = [name[0] for name in names]
    masses = [MASSES[element] for element in elements]
    return Topology(names=names, elements=elements, masses=masses, bonds=bonds, **columns)


def peptide(n: int, bridge: bool = False) -> Topology:
    """Return n alanines in a row; with a disulphide bridge from the first to the last CB."""
    names, size = list(ALANINE * n), len(ALANINE)
    bonds = [(i + size * k, j + size * k) for k in range(n) for i, j in ALANINE_BONDS]
    bonds += [(8 + size * k, size * (k + 1)) for k in range(n - 1)]
    if bridge:
        bonds += [(4, len(names)), (len(names), len(names) + 1)]
        bonds += [(len(names) + 1, 4 + size * (n - 1))]
        names += ["SG", "SG"]
    resids = [1 + k // size for k in range(size * n)] + [1, n] * bridge
    resnames = ["ALA"] * len(resids)
    return topology_of(names, bonds, resids=resids, resnames=resnames)


def named(topology: Topology, *names: str) -> list[int]:
    return [k for k, name in enumerate(topology.names) if name in names]


def residues(topology: Topology) -> list[np.ndarray]:
    return [np.flatnonzero(topology.resids == k) for k in np.unique(topology.resids)]


def peptide_map(topology: Topology, kind: str) -> CGMap:
    if kind == "residues":
        return CGMap.from_groups(topology, residues(topology), ["R"] * len(residues(topology)))
    if kind == "two per residue":
        groups = [
            [a for a in residue if (topology.names[a] in ("CB", "HB1", "HB2", "HB3")) == side]
            for residue in residues(topology)
            for side in (False, True)
        ]
        return CGMap.from_groups(topology, groups, ["BB", "SC"] * (len(groups) // 2))
    names = {"CA": ["CA"], "backbone": ["N", "CA", "C"], "heavy": ["N", "CA", "CB", "C", "O"]}
    return CGMap.from_slices(topology, named(topology, *names[kind]))


SMALL = ("C6H6", "bicyclobutane", "C4H4NH", "isobutane", "CH3CONH2", "HCN", "CH3CN", "2-butyne",
         "H2O", "Na", "SiH4", "C3H4_D2d")  # fmt: skip
PEPTIDE_MAPS = ("CA", "backbone", "heavy", "residues", "two per residue")


def lipid() -> Topology:
    """Return palmitic acid: a chain of 16 carbons with its hydrogens."""
    names, bonds = [f"C{k}" for k in range(16)], [(k, k + 1) for k in range(15)]
    for k in range(1, 16):
        for _ in range(2 + (k == 15)):
            bonds.append((k, len(names)))
            names.append(f"H{len(names)}")
    names += ["O1", "O2", "HO"]
    n = len(names)
    return topology_of(names, [*bonds, (0, n - 3), (0, n - 2), (n - 2, n - 1)])


def paracetamol() -> Topology:
    names = ("C1", "C2", "C3", "C4", "C5", "C6", "O1", "N1", "C7", "O2", "C8", "H2", "H3", "H5",
             "H6", "HO", "HN", "H81", "H82", "H83")  # fmt: skip
    bonds = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 6), (3, 7), (7, 8), (8, 9),
             (8, 10), (1, 11), (2, 12), (4, 13), (5, 14), (6, 15), (7, 16), (10, 17), (10, 18),
             (10, 19)]  # fmt: skip
    return topology_of(names, bonds)


def assert_sound(the_map: CGMap | TorsionMap, **options: bool) -> None:
    """Every atom is placed once, from a bonded atom and others that are known before it."""
    placement = build_placement(the_map, **options)
    n, n_beads = the_map.n_atoms, the_map.n_beads
    assert sorted([*placement.atoms, *placement.roots]) == list(range(n))
    bonds = {frozenset(bond) for bond in the_map.atoms.bonds.tolist()}
    generation = np.full(n, -1)
    generation[placement.atoms] = placement.generation
    for slot, atom in enumerate(placement.atoms.tolist()):
        row = placement.references[slot]
        assert len(set(row[row >= 0])) == (row >= 0).sum()
        p1 = int(row[0] - n_beads) % n
        assert frozenset((atom, p1)) in bonds or placement.linear[slot]
        for point in row[row >= n_beads] - n_beads:
            known = placement.ready[point] if point < n else generation[point - n]
            assert known < placement.generation[slot]
            assert point < n or placement.fragment[point - n] == placement.fragment[atom] >= 0
    assert len(placement.table(the_map)) == len(placement.atoms)


@pytest.mark.parametrize("kind", DIPEPTIDE + OTHERS)
def test_systems_of_the_contract_are_placed_soundly(kind):
    assert_sound(system(kind).map)


@pytest.mark.parametrize("name", SMALL)
def test_small_molecules_are_placed_soundly(name):
    topology, _ = molecule(name)
    assert_sound(CGMap.from_groups(topology, [range(len(topology))]))
    assert_sound(CGMap.from_slices(topology, [0]))


@pytest.mark.parametrize("topology", [lipid(), paracetamol(), peptide(5, bridge=True)],
                         ids=["lipid", "paracetamol", "disulphide"])  # fmt: skip
def test_larger_molecules_are_placed_soundly(topology):
    n = len(topology)
    heavy = [k for k, element in enumerate(topology.elements) if element != "H"]
    assert_sound(CGMap.from_groups(topology, [range(n)]))
    assert_sound(CGMap.from_groups(topology, np.array_split(np.arange(n), 4), weighting="geometry"))
    assert_sound(CGMap.from_slices(topology, heavy))
    assert_sound(CGMap.from_slices(topology, heavy[::5]))


@pytest.mark.parametrize("kind", PEPTIDE_MAPS)
def test_peptides_are_placed_soundly_and_always_alike(kind):
    the_map = peptide_map(peptide(5), kind)
    assert_sound(the_map)
    assert_sound(the_map, branches_last=True)
    assert build_placement(the_map).to_dict() == build_placement(the_map).to_dict()


def rows_by_residue(the_map: CGMap, residue: int, **options: int) -> dict[str, tuple]:
    """Return the references of a residue's atoms by name, with residues relative to it."""
    placement = build_placement(the_map, **options)
    n, n_beads, atoms = the_map.n_atoms, the_map.n_beads, the_map.atoms
    rows = {}
    for slot, atom in enumerate(placement.atoms):
        if atoms.resids[atom] != residue:
            continue
        names = []
        for point in placement.references[slot]:
            where = the_map.beads if 0 <= point < n_beads else atoms
            k = point if point < n_beads else (point - n_beads) % n
            names.append((where.names[k], where.resids[k] - residue) if point >= 0 else None)
        rows[atoms.names[atom]] = (*names, bool(placement.linear[slot]), placement.proper[slot])
    return rows


@pytest.mark.parametrize("kind", PEPTIDE_MAPS)
def test_identical_residues_are_placed_alike(kind):
    """Bead after bead: all inner residues. By colour: every second one."""
    the_map = peptide_map(peptide(9), kind)
    in_turn = [rows_by_residue(the_map, k, max_sequence=100) for k in (4, 5, 6)]
    assert in_turn[0] == in_turn[1] == in_turn[2]
    coloured = [rows_by_residue(the_map, k, max_sequence=1) for k in (3, 5, 7)]
    assert coloured[0] == coloured[1] == coloured[2]


@pytest.mark.parametrize("kind", PEPTIDE_MAPS)
def test_identical_residues_share_kinds_of_slots_and_blocks(kind):
    the_map = peptide_map(peptide(9), kind)
    placement = build_placement(the_map, max_sequence=100)
    kinds = slot_kinds(the_map, placement)
    blocks = Blocks(the_map, placement, np.zeros(len(kinds), bool), hops=3, bead_hops=4)
    by_residue: dict[int, dict] = {4: {}, 5: {}, 6: {}}
    for slot, atom in enumerate(placement.atoms):
        residue = int(the_map.atoms.resids[atom])
        if residue in by_residue:
            edges = sorted(blocks.atom_edge[slot].tolist()), sorted(blocks.bead_edge[slot].tolist())
            name = the_map.atoms.names[atom]
            by_residue[residue][name] = (kinds[slot], blocks.kind[slot], *edges)
    assert by_residue[4] == by_residue[5] == by_residue[6]


@pytest.mark.parametrize("kind", PEPTIDE_MAPS)
def test_number_of_generations_does_not_grow_with_a_long_chain(kind):
    short, long = (
        build_placement(peptide_map(peptide(n), kind)).generation.max() for n in (40, 160)
    )
    assert long == short
    assert short < 60


@pytest.mark.parametrize("branches_last", [False, True])
def test_generations_of_a_very_long_chain(branches_last):
    short, long = (
        build_placement(peptide_map(peptide(n), "CA"), branches_last=branches_last).generation.max()
        for n in (40, 400)
    )
    assert long == short


def test_side_chains_follow_all_of_the_backbone_turn_by_turn():
    the_map = peptide_map(peptide(6), "CA")
    placement, atoms = build_placement(the_map, branches_last=True), the_map.atoms
    generation = np.full(len(atoms), -1)
    generation[placement.atoms] = placement.generation
    inner = (atoms.resids > 1) & (atoms.resids < 6)
    side = inner & ~np.isin(atoms.names, ["N", "H", "CA", "HA", "C", "O"])
    backbone = inner & np.isin(atoms.names, ["N", "H", "C", "O"])
    assert generation[backbone].max() < generation[side].min()
    for residue in (2, 3, 4):
        own, following = (side & (atoms.resids == residue + k) for k in (0, 1))
        assert generation[own].max() < generation[following].min()


@pytest.mark.parametrize("kind", DIPEPTIDE + OTHERS)
def test_no_density_sees_its_own_or_a_later_generation(kind):
    """The gradient of every block's parameters by all points and coordinates that come later."""
    flow, case = flow_of(kind), system(kind)
    placement, conditioner = flow.placement, flow.conditioner
    n, n_beads = flow.cg_map.n_atoms, flow.cg_map.n_beads
    slot = conditioner.slot.numpy()
    own = placement.generation[slot]
    n_blocks, generator = len(slot), torch.Generator().manual_seed(0)
    points = torch.randn(1, n_beads + 2 * n, 3, generator=generator).double()
    inner = torch.randn(1, len(placement.atoms) + 1, conditioner.n_inner, generator=generator)
    condition = flow._condition(case.coarse[:1], None, None)
    condition = {
        key: value if value is None else value.expand(n_blocks, *value.shape[1:])
        for key, value in condition.items()
    }
    inputs = [v.expand(n_blocks, -1, -1).clone().requires_grad_() for v in (points, inner.double())]
    raw, origin, frame = conditioner(
        *inputs,
        own=torch.zeros(n_blocks, n_blocks, conditioner.n_inner - 3).double(),
        blocks=torch.arange(n_blocks),
        **condition,
    )
    every = torch.arange(n_blocks)
    probe = (
        raw[every, every].sum() + origin[every, every].sum() + frame[every, every].square().sum()
    )
    probe = probe + (frame[every, every] * torch.arange(9.0).view(3, 3)).sum()
    by_points, by_inner = torch.autograd.grad(probe, inputs, allow_unused=True)
    seen = by_points.abs().sum(-1).numpy() > 0
    home = placement.fragment[placement.atoms[slot]]
    generation = np.full(n, -1)
    generation[placement.atoms] = placement.generation
    late = placement.ready >= own[:, None]
    assert not (seen[:, n_beads : n_beads + n] & late).any()
    same = (placement.fragment == home[:, None]) & (home >= 0)[:, None]
    assert not (seen[:, n_beads + n :] & (~same | (generation >= own[:, None]))).any()
    if by_inner is not None and placement.generation.max() > 0:
        seen = by_inner.abs().sum(-1).numpy()[:, :-1] > 0
        assert not (seen & (placement.generation >= own[:, None])).any()


def test_maps_that_cannot_be_placed_say_why(ala2_topology, ala2_map):
    loose = Topology.from_dict(
        ala2_topology.to_dict() | {"bonds": ala2_topology.bonds[1:].tolist()}
    )
    with pytest.raises(ValueError, match=r"not connected.*ACE1:H1"):
        build_placement(CGMap.from_slices(loose, ala2_map.bead_atoms))
    matrix = np.zeros((2, 22))
    matrix[0, [4, 5, 6]], matrix[1, [4, 6]] = 1 / 3, 0.5
    with pytest.raises(ValueError, match="shares all of its atoms"):
        build_placement(CGMap.from_matrix(ala2_topology, matrix))


def ring_torsion(name: str) -> tuple[Topology, list[int]]:
    """Return a carbon ring, and its atoms in their order around it."""
    ring, _ = molecule(name)
    around, carbons = ring.neighbours(), named_elements(ring, "C")
    order = carbons[:1]
    while len(order) < len(carbons):
        fresh = [a for a in around[order[-1]] if a in carbons and a not in order]
        order.append(fresh[0])
    return ring, order


def named_elements(topology: Topology, element: str) -> list[int]:
    return [k for k, e in enumerate(topology.elements) if e == element]


def test_torsions_that_cannot_be_coordinates_say_why():
    ring, order = ring_torsion("cyclobutane")
    with pytest.raises(ValueError, match="close a ring"):
        build_placement(TorsionMap(ring, [order]))
    ring, order = ring_torsion("C6H6")
    assert_torsions(TorsionMap(ring, [order[:4]]))
    with pytest.raises(ValueError, match=r"close a ring|both fix"):
        build_placement(TorsionMap(ring, [(order * 2)[k : k + 4] for k in range(6)]))
    branched, _ = molecule("isobutane")
    around, carbons = branched.neighbours(), named_elements(branched, "C")
    centre = next(k for k in carbons if sum(b in carbons for b in around[k]) == 3)
    last = next(b for b in around[centre] if b not in carbons)
    arms = [b for b in around[centre] if b in carbons][:2]
    both = [[next(a for a in around[arm] if a != centre), arm, centre, last] for arm in arms]
    assert_torsions(TorsionMap(branched, both))  # one of them is read backwards


def assert_torsions(the_map: TorsionMap) -> None:
    """Each torsion is the φ of one atom, and only three atoms need axes of the laboratory."""
    placement = build_placement(the_map)
    given = placement.torsion[placement.torsion >= 0]
    assert sorted(given) == list(range(len(the_map.torsions)))
    assert ((placement.references < 0).sum(0) == [0, 1, 2]).all()


def test_torsions_leave_six_rigid_motions():
    for kind in ("torsions", "nitrile torsion"):
        assert_torsions(system(kind).map)
    assert_torsions(TorsionMap(lipid(), [[k, k + 1, k + 2, k + 3] for k in range(13)]))
    assert_torsions(TorsionMap(paracetamol(), [[2, 3, 7, 8], [3, 7, 8, 10], [1, 0, 6, 15]]))
    chain = peptide(5)
    backbone = named(chain, "N", "CA", "C")
    assert_torsions(TorsionMap(chain, [backbone[k : k + 4] for k in range(len(backbone) - 3)]))
