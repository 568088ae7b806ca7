import numpy as np
import pytest
import torch
from bead_systems import CUBE, SKEWED, beads_of, map_of

from ccg_ase import ForceField, Prior, Topology, fit_prior, thermal_energy
from ccg_ase.prior import TERMS

KT = thermal_energy(300)
CHAIN = Topology(names="ABCD", masses=[1] * 4, bonds=[(0, 1), (1, 2), (2, 3)])
MIXTURE = ((4, 3), (1, 5))


@pytest.mark.parametrize(("mean", "spread"), [(1.5, 0.03), (3.8, 0.15), (3.8, 0.6)])
def test_a_lone_bond_reproduces_mean_and_variance(mean, spread):
    """Quadrature of r² exp(-U/kT) against the moments that the prior was fitted on."""
    rng = np.random.default_rng(0)
    r = rng.normal(mean, spread, 200_000)
    beads = np.zeros((len(r), 2, 3))
    beads[:, 1, 0] = r
    prior = fit_prior(beads, Topology(names="AB", masses=[1, 1], bonds=[(0, 1)]), 300)
    grid = np.linspace(0.3, mean + 12 * spread, 20_000)
    pair = torch.zeros(len(grid), 2, 3, dtype=torch.float64)
    pair[:, 1, 0] = torch.from_numpy(grid)
    density = grid**2 * np.exp(-prior(pair).numpy() / KT)
    density /= density.sum()
    found = (density * grid).sum()
    assert found == pytest.approx(r.mean(), abs=0.02 * spread)
    assert np.sqrt((density * (grid - found) ** 2).sum()) == pytest.approx(r.std(), rel=0.02)


def test_an_angle_reproduces_the_moments_of_its_cosine():
    rng = np.random.default_rng(0)
    cosine = rng.normal(-0.4, 0.08, 100_000)
    beads = np.zeros((len(cosine), 3, 3))
    beads[:, 0, 0] = 1.5
    beads[:, 2] = 1.5 * np.stack([cosine, np.sqrt(1 - cosine**2), 0 * cosine], -1)
    topology = Topology(names="ABC", masses=[1] * 3, bonds=[(0, 1), (1, 2)])
    (molecule,) = fit_prior(beads, topology, 300).config["molecules"]
    ((i, j, k, centre, stiffness),) = molecule["angles"]
    # p(cos θ) is flat without a potential, hence Gaussian with one.
    assert (i, j, k) == (0, 1, 2)
    assert centre == pytest.approx(cosine.mean(), abs=1e-3)
    assert KT / stiffness == pytest.approx(cosine.var(), rel=1e-3)


def test_dihedral_series_inverts_its_histogram():
    rng = np.random.default_rng(0)
    grid = np.linspace(-np.pi, np.pi, 2001)
    energy = KT * (1.2 * np.cos(grid) - 0.6 * np.sin(2 * grid) + 0.4 * np.cos(3 * grid))
    p = np.exp(-energy / KT)
    twist = rng.choice(grid, size=200_000, p=p / p.sum())
    beads = np.zeros((len(twist), 4, 3))
    beads[:, 0], beads[:, 2] = [-0.6, 1.4, 0], [1.5, 0, 0]
    beads[:, 3] = np.stack([2.1 + 0 * twist, 1.4 * np.cos(twist), 1.4 * np.sin(twist)], -1)
    prior = fit_prior(beads, CHAIN, 300, terms=("dihedrals",), dihedral_order=3)
    found = np.array(prior.config["molecules"][0]["dihedrals"][0][4:]) / KT
    np.testing.assert_allclose(found, [1.2, 0, 0, -0.6, 0.4, 0], atol=0.03)
    picked = [np.argmin(abs(twist - t)) for t in (0.5, 2.5)]
    difference = np.diff(prior(torch.from_numpy(beads[picked])).numpy())[0]
    expected = np.diff(np.interp([0.5, 2.5], grid, energy))[0]
    assert difference == pytest.approx(expected, abs=0.1 * KT)


def test_fit_of_alanine_dipeptide(ala2_prior, ala2_beads):
    (molecule,) = ala2_prior.config["molecules"]
    assert [len(molecule[key]) for key in ("bonds", "angles", "dihedrals")] == [4, 3, 0]
    pairs = {(0, 4): 0, (0, 3): 3, (1, 4): 3, (0, 2): 2, (1, 3): 2, (2, 4): 2}
    types = molecule["types"]
    volumes = {(frozenset(row[:2]), row[2]): row[3] for row in ala2_prior.config["volumes"]}
    assert len(volumes) == len(pairs)
    for (i, j), apart in pairs.items():
        r = np.linalg.norm(ala2_beads[:, i] - ala2_beads[:, j], axis=-1)
        contact = volumes[frozenset((types[i], types[j])), apart]
        assert contact == pytest.approx(np.percentile(np.minimum(r, 5), 0.5), rel=1e-12)
    rows = ala2_prior.table()
    assert [row["term"] for row in rows] == ["bond"] * 4 + ["angle"] * 3 + ["volume"] * 6
    # In the data, every quadratic degree of freedom holds about kT/2.
    energies = ala2_prior(torch.from_numpy(ala2_beads)).numpy()
    assert energies.mean() == pytest.approx(7 / 2 * KT, rel=0.15)


@pytest.mark.parametrize("cell", [None, SKEWED], ids=["open", "box"])
def test_copies_are_pooled(cell):
    """Three chains in one box are three times the frames of one chain in open space."""
    beads = beads_of(MIXTURE, SKEWED, 30)
    copies = np.concatenate([beads[:, 4 * k : 4 * k + 4] for k in range(3)])
    alone = fit_prior(copies, map_of((4, 1)).beads, 300, terms=TERMS).config["molecules"][0]
    boxes = None
    if cell is not None:
        boxes = np.tile(cell, (30, 1, 1)) * np.linspace(1.0, 1.2, 30)[:, None, None]
        beads = beads + np.random.default_rng(0).integers(-2, 3, beads.shape) @ boxes
    prior = fit_prior(beads, map_of(*MIXTURE).beads, 300, boxes=boxes, terms=TERMS)
    chain, single = prior.config["molecules"]
    assert single["types"] == ["MOL:1a"]
    assert not single["bonds"] + single["angles"] + single["dihedrals"]
    assert [len(chain[kind]) for kind in ("bonds", "angles", "dihedrals")] == [3, 2, 1]
    for kind in ("bonds", "angles", "dihedrals"):
        np.testing.assert_allclose(chain[kind], alone[kind], rtol=1e-8, atol=1e-10)


def test_contact_is_a_percentile_of_nearest_distances():
    """A and two B on a line: frame k has its nearest B at 1 + k/100 Å, the other one beyond."""
    r = 1 + np.arange(201) / 100
    beads = np.zeros((201, 3, 3))
    beads[:, 1, 0], beads[:, 2, 0] = r, -r - 0.7
    topology = Topology(names="ABB", types="ABB", masses=[1] * 3)
    found = {(a, b): d for a, b, _, d, _ in fit_prior(beads, topology, 300).config["volumes"]}
    assert set(found) == {("A", "B"), ("B", "B")}
    # From A the nearest B is at r; from the two B, A is at r and r + 0.7.
    assert found["A", "B"] == pytest.approx(np.percentile(np.r_[r, r, r + 0.7], 0.5), abs=1e-12)
    # The two B are 2 r + 0.7 apart, each the other's nearest.
    assert found["B", "B"] == pytest.approx(np.percentile(np.r_[2 * r, 2 * r] + 0.7, 0.5))
    # In a box of 4 Å, the other B is nearer by its image where 4 - r - 0.7 < r.
    boxes = np.tile(np.diag([4.0, 40, 40]), (201, 1, 1))
    wrapped = fit_prior(beads, topology, 300, boxes=boxes).config["volumes"]
    (contact,) = [d for a, b, _, d, _ in wrapped if (a, b) == ("A", "B")]
    near, far = np.minimum(r, 4 - r), np.abs((r + 0.7 + 2) % 4 - 2)
    every = np.r_[near, far, np.minimum(near, far)]
    assert contact == pytest.approx(np.percentile(every, 0.5), abs=1e-12)


def test_types_that_never_meet_touch_at_five_angstrom():
    beads = np.zeros((3, 2, 3))
    beads[:, 1, 0] = 9.0
    ((_, _, _, contact, strength),) = fit_prior(
        beads, Topology(names="AB", masses=[1, 1]), 300
    ).config["volumes"]
    assert contact == 5.0
    assert strength == pytest.approx(300 * KT)


@pytest.mark.parametrize("terms", [(), *((term,) for term in TERMS), ("bonds", "volumes"), TERMS])
def test_terms_are_optional(terms):
    """The prior of some terms is that of all terms without the others."""
    beads, cg_map = beads_of(MIXTURE, CUBE, 30), map_of(*MIXTURE)
    boxes = np.tile(CUBE, (30, 1, 1))
    every = fit_prior(beads, cg_map.beads, 300, boxes=boxes, terms=TERMS).config
    some = fit_prior(beads, cg_map.beads, 300, boxes=boxes, terms=terms)
    expected = {
        "temperature_K": 300.0,
        "molecules": [
            {key: [] if key in set(TERMS) - set(terms) else rows for key, rows in molecule.items()}
            for molecule in every["molecules"]
        ],
        "volumes": every["volumes"] if "volumes" in terms else [],
    }
    assert some.config == expected
    x, box = torch.from_numpy(beads[:4]), torch.from_numpy(CUBE)
    assert torch.equal(some(x, box=box), Prior(expected, cg_map.beads)(x, box=box))
    assert some(x, box=box).any() == (terms not in ((), ("volumes",)))


def test_from_data_passes_everything_on():
    beads, cg_map = beads_of(MIXTURE, CUBE, 30), map_of(*MIXTURE)
    boxes = np.tile(CUBE, (30, 1, 1))
    model = ForceField.from_data(
        cg_map, 310.0, beads, boxes=boxes, terms=("bonds", "dihedrals"), dihedral_order=2,
        cutoff_A=5.0, channels=2, temperatures_K=(300, 350),
    )  # fmt: skip
    prior = fit_prior(
        beads, cg_map.beads, 310.0, boxes=boxes, terms=("bonds", "dihedrals"), dihedral_order=2
    )
    assert model.prior.config == prior.config
    assert model.temperatures_K == (300.0, 350.0)
    np.testing.assert_allclose(model.reference_beads, beads[0], rtol=1e-6)
    np.testing.assert_allclose(model.reference_box, CUBE)
    # Neighbours within 5 Å, by all distances in boxes wider than twice that.
    apart = beads[:, :, None] - beads[:, None]
    apart -= np.round(apart / np.diag(CUBE)) * np.diag(CUBE)
    within = (np.linalg.norm(apart, axis=-1) < 5.0).sum() / beads[..., 0].size - 1
    assert model.config["mean_neighbours"] == pytest.approx(within, rel=1e-12)


def test_refuses(ala2_map, ala2_beads):
    beads = ala2_map.beads
    for wrong in (ala2_beads[0], ala2_beads[:, :4], ala2_beads[:1]):
        with pytest.raises(ValueError, match="shape"):
            fit_prior(wrong, beads, 300)
    with pytest.raises(ValueError, match="NaN"):
        fit_prior(np.full((3, 5, 3), np.nan), beads, 300)
    with pytest.raises(ValueError, match=r"boxes must have shape \(400, 3, 3\)"):
        fit_prior(ala2_beads, beads, 300, boxes=np.eye(3))
    with pytest.raises(ValueError, match="terms must be among bonds, angles, dihedrals, volumes"):
        fit_prior(ala2_beads, beads, 300, terms=("bond",))
    with pytest.raises(ValueError, match="at least 1"):
        fit_prior(ala2_beads, beads, 300, dihedral_order=0)
    with pytest.raises(ValueError, match="no volume"):
        fit_prior(ala2_beads, beads, 300, boxes=np.zeros((400, 3, 3)))


def test_one_bead_and_rigid_bonds():
    single = fit_prior(np.zeros((3, 1, 3)), Topology(names="A", masses=[1]), 300)
    assert single(torch.zeros(2, 1, 3, dtype=torch.float64)).tolist() == [0, 0]
    rigid = np.tile([[0.0, 0, 0], [1.5, 0, 0]], (4, 1, 1))
    prior = fit_prior(rigid, Topology(names="AB", masses=[1, 1], bonds=[(0, 1)]), 300)
    (molecule,) = prior.config["molecules"]
    # 0.01 Å is the least spread that a bond is given.
    assert molecule["bonds"][0][3] == pytest.approx(KT / 0.01**2, rel=1e-3)
