"""Force maps against closed forms of Gaussian and rigid molecules, and against brute force."""

import numpy as np
import pytest
from linear_gaussian import LinearGaussian
from scipy.sparse import csr_array

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy
from ccg_training.force_aggregation import ForceMap

N = 6000


@pytest.fixture(scope="module")
def molecule():
    return LinearGaussian()


@pytest.fixture(scope="module")
def frames(molecule):
    """Two sets of (positions, forces): to fit on, and held out."""
    rng = np.random.default_rng(1)
    return [(x, molecule(x)[1]) for x in (molecule.sample(N, rng), molecule.sample(N, rng))]


def maps(atoms):
    """Slices, centres of mass with loose atoms, and beads that share an atom."""
    matrix = np.zeros((3, 8))
    matrix[0, :3], matrix[1, 2:6], matrix[2, 6:] = 1 / 3, 0.25, 0.5
    return {
        "slice": CGMap.from_slices(atoms, (0, 2, 4, 6)),
        "mass": CGMap.from_groups(atoms, [(0, 1, 2), (4, 5, 7)]),
        "shared": CGMap.from_matrix(atoms, matrix),
    }


def mean_force(molecule, cg_map, x):
    """-∂F/∂s of a Gaussian: -kT Cov(s)⁻¹ (s - <s>)."""
    M = np.kron(cg_map.matrix.toarray(), np.eye(3))
    precision = molecule.kT() * np.linalg.inv(M @ np.linalg.inv(molecule.K) @ M.T) / molecule.kT()
    delta = (cg_map.apply(x) - cg_map.apply(molecule.x0)).reshape(len(x), -1)
    return (-delta @ precision).reshape(len(x), -1, 3), delta


def least_mean_square(molecule, cg_map):
    """Least E|B f|² there is, by elimination: B = M⁺ᵀ + Y Nᵀ with the columns of N null to M."""
    Q = molecule.kT() * np.einsum("iaja->ij", molecule.K.reshape(8, 3, 8, 3))  # E[f_i · f_j]
    M = cg_map.matrix.toarray()
    start, null = np.linalg.pinv(M).T, np.linalg.svd(M)[2][len(M) :].T
    Y = -np.linalg.solve(null.T @ Q @ null, null.T @ Q @ start.T).T
    B = start + Y @ null.T
    return np.trace(B @ Q @ B.T) / (3 * len(M))


@pytest.mark.parametrize("kind", ["slice", "mass", "shared"])
def test_both_maps_have_the_exact_mean_force_and_the_optimal_one_the_least_noise(
    molecule, frames, kind
):
    cg_map = maps(molecule.cg_map.atoms)[kind]
    (_, forces), (x, held_out) = frames
    plain, optimal = ForceMap.slices(cg_map), ForceMap.optimal(cg_map, forces)
    truth, delta = mean_force(molecule, cg_map, x)
    for force_map in (plain, optimal):
        residual = (force_map.apply(held_out) - truth).reshape(N, -1)
        for moment in (residual[:, :, None], residual[:, :, None] * delta[:, None, :]):
            z = moment.mean(0) / (moment.std(0) / np.sqrt(N))
            assert np.abs(z).max() < 4.5
            assert np.sqrt((z**2).mean()) < 1.6  # entries are correlated, hence not 1.1
    found = optimal.compare(plain, held_out)
    least = least_mean_square(molecule, cg_map)
    assert found["mean_square"] == pytest.approx(least, rel=0.05)
    assert found["noise_removed"] > 5 * found["noise_removed_error"] > 0
    assert found["other_mean_square"] - found["mean_square"] == pytest.approx(
        found["noise_removed"]
    )
    noise = [((m.apply(held_out) - truth) ** 2).mean() for m in (plain, optimal)]
    assert noise[1] < 0.75 * noise[0]
    assert noise[0] - noise[1] == pytest.approx(found["noise_removed"], rel=0.1)


def test_optimum_is_stationary_in_the_null_space(molecule, frames):
    """No consistent change that keeps rigid groups makes the mean square smaller."""
    cg_map = maps(molecule.cg_map.atoms)["mass"]
    forces = frames[0][1]
    constraints = [(1, 3), (5, 6, 7)]
    B = ForceMap.optimal(cg_map, forces, constraints, l2=1e-9).matrix.toarray()
    for members in constraints:
        np.testing.assert_allclose(B[:, members].T, np.tile(B[:, members[0]], (len(members), 1)))
    members = np.zeros((8, 5))
    for k, group in enumerate([(0,), (1, 3), (2,), (4,), (5, 6, 7)]):
        members[list(group), k] = 1
    null = members @ np.linalg.svd(cg_map.matrix.toarray() @ members)[2][2:].T
    assert np.abs(cg_map.matrix @ null).max() < 1e-12

    def mean_square(matrix):
        return (np.einsum("bi,nic->nbc", matrix, forces) ** 2).mean()

    start = mean_square(B)
    for bead in range(2):
        for direction in null.T:
            step = np.zeros_like(B)
            step[bead] = 1e-3 * direction
            up, down = mean_square(B + step), mean_square(B - step)
            assert min(up, down) > start
            assert abs(up - down) < 1e-3 * (up + down - 2 * start)


def test_plain_maps_of_slices_and_centres(molecule, frames):
    forces = frames[0][1][:7].astype(np.float32)
    some = maps(molecule.cg_map.atoms)
    plain = ForceMap.slices(some["slice"])
    np.testing.assert_array_equal(plain.apply(forces), some["slice"].apply_forces(forces))
    assert plain.apply(forces).dtype == np.float64
    np.testing.assert_array_equal(plain.apply(forces[0]), plain.apply(forces)[0])
    summed = forces[:, [4, 5, 7]].astype(float).sum(1)
    np.testing.assert_allclose(ForceMap.slices(some["mass"]).apply(forces)[:, 1], summed)
    # The shared atom 2 stays where it is; the others of its beads move further to make up for it.
    B = ForceMap.slices(some["shared"]).matrix.toarray()
    np.testing.assert_allclose(B[0], [1.5, 1.5, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(B[1], [0, 0, 0, 4 / 3, 4 / 3, 4 / 3, 0, 0])


def dumbbells():
    """Bead 0 of a rigid bond (0, 1) of 1.1 Å, both atoms in harmonic wells of their own."""
    kT, length, k, centre = thermal_energy(300.0), 1.1, (0.02, 0.09), np.array([0.4, -0.3, 0.9])
    cosine, weight = np.polynomial.legendre.leggauss(40)
    phi = 2 * np.pi * (np.arange(48) + 0.5) / 48
    sine = np.sqrt(1 - cosine**2)
    u = np.stack(
        [np.outer(sine, np.cos(phi)), np.outer(sine, np.sin(phi)), np.tile(cosine, (48, 1)).T], -1
    ).reshape(-1, 3)
    weight = np.repeat(weight, 48)

    def conditional(s):
        """ln Z(s), and the forces on both atoms with their weights, by quadrature on the sphere."""
        second = s + length * u
        energy = k[0] / 2 * (s**2).sum() + k[1] / 2 * ((second - centre) ** 2).sum(-1)
        w = weight * np.exp(-energy / kT)
        forces = np.stack([np.tile(-k[0] * s, (len(u), 1)), -k[1] * (second - centre)], 1)
        return np.log(w.sum()), forces, w / w.sum()

    return conditional, kT


def test_rigid_bond_against_quadrature():
    conditional, kT = dumbbells()
    atoms = Topology(names=("C", "H"), masses=[12.0, 1.0], bonds=[(0, 1)])
    cg_map = CGMap.from_slices(atoms, (0,))
    s, h = np.array([0.7, 0.2, -0.5]), 1e-4
    steps = h * np.eye(3)
    exact = [kT * (conditional(s + e)[0] - conditional(s - e)[0]) / (2 * h) for e in steps]
    _, forces, weight = conditional(s)
    rigid = ForceMap.slices(cg_map, constraints=[(0, 1)])
    np.testing.assert_allclose(weight @ rigid.apply(forces)[:, 0], exact, rtol=1e-6)
    # There is no other map; without the constraint the force on the bead atom alone is wrong.
    fitted = ForceMap.optimal(cg_map, forces, constraints=[(0, 1)])
    np.testing.assert_allclose(fitted.matrix.toarray(), [[1.0, 1.0]])
    assert np.abs(weight @ ForceMap.slices(cg_map).apply(forces)[:, 0] - exact).max() > 0.01


@pytest.mark.parametrize("constraints", [(), [(0, 1)]])
def test_identical_molecules_share_one_map(molecule, constraints):
    """Three molecules, a solvent without beads in between: one molecule's fit on all frames."""
    atoms, n = molecule.cg_map.atoms, molecule.n_atoms
    offsets = (0, n + 3, 2 * n + 3)
    names = [*atoms.names, "OW", "HW", "HW", *atoms.names, *atoms.names]
    masses = np.concatenate([atoms.masses, [16, 1, 1], atoms.masses, atoms.masses])
    bonds = [*(pair for o in offsets for pair in (atoms.bonds + o).tolist()), (n, n + 1)]
    box = Topology(names=names, masses=masses, bonds=[*bonds, (n, n + 2)])
    groups = [(0, 1, 2), (4, 5, 7)]
    one = CGMap.from_groups(atoms, groups)
    every = [tuple(i + o for i in group) for o in offsets for group in groups]
    order = [3, 0, 5, 1, 2, 4]  # beads in any order, the same for none of the molecules
    many = CGMap.from_groups(box, [every[k] for k in order])
    rng = np.random.default_rng(2)
    forces = molecule(molecule.sample(900, rng))[1].reshape(300, 3, n, 3)
    filled = np.zeros((300, len(box), 3))
    filled[:, n : n + 3] = rng.normal(size=(300, 3, 3))
    for k, offset in enumerate(offsets):
        filled[:, offset : offset + n] = forces[:, k]
    shifted = [(i + o, j + o) for o in offsets for i, j in constraints]
    pooled = ForceMap.optimal(many, filled, shifted).matrix.toarray()
    single = ForceMap.optimal(one, forces.reshape(-1, n, 3), constraints).matrix.toarray()
    expected = np.zeros((6, len(box)))
    for k, offset in enumerate(offsets):
        expected[2 * k : 2 * k + 2, offset : offset + n] = single
    np.testing.assert_allclose(pooled, expected[order], atol=1e-9)
    assert np.abs(single).max() > 1.01


def test_what_can_t_be_mapped_is_refused(molecule, frames):
    cg_map, forces = molecule.cg_map, frames[0][1]
    bad = forces.copy()
    bad[5, 3, 1] = np.nan
    for build in (lambda f: ForceMap.optimal(cg_map, f), ForceMap.slices(cg_map).apply):
        with pytest.raises(ValueError, match="frame 5 hold NaN"):
            build(bad)
        with pytest.raises(ValueError, match="8, 3"):
            build(forces[:, 1:])
    # 8 atoms, 4 of them beads: 4 coefficients, 20 components, 7 frames.
    with pytest.raises(ValueError, match="at least 7 frames"):
        ForceMap.optimal(cg_map, forces[:6])
    ForceMap.optimal(cg_map, forces[:7])
    with pytest.raises(ValueError, match=r"beads 1 \(C2\), 2 \(C4\).*rigid"):
        ForceMap.optimal(cg_map, forces, [(2, 3, 4)])
    with pytest.raises(ValueError, match=r"bead 1 \(C2\).*one bead per rigid group"):
        ForceMap.slices(cg_map, [(2, 3, 4)])
    mixture = np.zeros((3, 8))
    mixture[0, 0] = mixture[1, 2] = 1
    mixture[2, [0, 2]] = 0.5
    mixed = CGMap.from_matrix(cg_map.atoms, mixture)
    for build in (ForceMap.slices, lambda m: ForceMap.optimal(m, forces)):
        with pytest.raises(ValueError, match="bead"):
            build(mixed)
    with pytest.raises(ValueError, match=r"outside 0\.\.7"):
        ForceMap.slices(cg_map, [(3, 8)])
    with pytest.raises(ValueError, match="unit matrix"):
        ForceMap(cg_map, csr_array(2 * cg_map.matrix))
    with pytest.raises(ValueError, match="l2 must be positive"):
        ForceMap.optimal(cg_map, forces, l2=0.0)
