"""F on grids, both ways, against closed forms and quadrature."""

import numpy as np
import pytest
import torch
from free_energy_systems import (
    KT,
    TEMPERATURE_K,
    TORSIONS,
    ChainBeads,
    GaussianBeads,
    barrier,
    chain_flow,
    chain_potential,
    distance_density,
    ridges,
)
from linear_gaussian import GaussianBackmapper, LinearGaussian

from ccg_training.free_energy_direct import EvenlyInBin
from ccg_training.free_energy_ensemble import (
    FromEnsemble,
    WindowSettings,
    n_windows,
    run_windows,
    usual_windows,
)
from ccg_training.free_energy_grid import Grid, Variable
from ccg_training.free_energy_landscape import (
    agreement,
    basin_differences,
    landscape,
    marginal,
)
from ccg_training.free_energy_output import windows_warning
from ccg_training.free_energy_sampling import Sampling, sample_grid

PHI, PSI = (
    Variable(name, "torsion", tuple(row), of_beads=False)
    for name, row in zip(("phi", "psi"), TORSIONS.tolist(), strict=True)
)
GRID = Grid.regular([PHI, PSI], [12, 8], [None, None])
SAMPLING = Sampling(n_first=8, n_samples=32, n_most=256, max_kT=4.0)


def direct(folder, seed=0, grid=GRID, extent=1.0, potential=None, **changes):
    settings = Sampling(**{**vars(SAMPLING), "seed": seed, **changes})
    potential = potential or chain_potential()
    proposal = EvenlyInBin(grid, extent)
    sampled = sample_grid(chain_flow(), potential, proposal, folder, settings, origin="test")
    return landscape(sampled, proposal, TEMPERATURE_K, settings), sampled, proposal, settings


def truth(grid=GRID, kT=KT, n=20):
    """-kT ln of the mean of exp(-V/kT) over every bin."""
    offset = (np.arange(n) + 0.5) / n - 0.5
    phi = grid.centres[:, 0, None, None] + offset[:, None] * grid.widths[0]
    psi = grid.centres[:, 1, None, None] + offset * grid.widths[1]
    return -kT * np.log(np.exp(-barrier(phi, psi) / kT).mean((1, 2)))


def z_scores(of, exact):
    """Deviations over errors in the gauge of the errors: equal weighted mean of F."""
    low = of.trusted
    gap = of.free_energy[low] - exact[low]
    gap = gap - of.probability[low] @ gap
    return gap / of.error[low]


# ------------------------------------------------------------------ direct


def test_bins_of_torsions_within_their_errors(tmp_path):
    exact, found = truth(), []
    for seed in range(6):
        of, sampled, _, _ = direct(tmp_path / str(seed), seed)
        found.append(z_scores(of, exact))
        assert of.above[exact > exact.min() + 5 * KT].all()
        assert not of.above[exact < exact.min() + 3 * KT].any()
        assert of.doubtful.sum() <= 1
        # What is clearly above the cut-off got the first look only.
        assert (of.n_samples[exact > exact.min() + 6.8 * KT] == 8).all()
        assert of.n_calls == sum(len(one.energy) for one in sampled.bins) == of.n_samples.sum()
    z = np.concatenate(found)
    assert len(z) > 400
    assert abs(z.mean()) < 0.2
    # States spread evenly over a bin do a little better than the independent ones of the error.
    assert 0.65 < z.std() < 1.1
    assert 0.65 < np.mean(np.abs(z) < 1) < 0.88
    assert np.mean(np.abs(z) < 2) > 0.94


def test_centres_are_the_potential_itself(tmp_path):
    of, _, _, _ = direct(tmp_path, extent=0.0, n_samples=64)
    z = z_scores(of, barrier(*GRID.centres.T))
    assert np.abs(z).max() < 4
    assert np.sqrt((z**2).mean()) < 1.4


def test_energy_entropy_and_other_temperatures(tmp_path):
    """U = V + (7/2) kT for seven harmonic modes, but for terms of kT over angles' stiffness."""
    of, sampled, proposal, settings = direct(tmp_path, extent=0.0, n_samples=256, n_most=256)
    low = of.trusted
    V = barrier(*GRID.centres.T)
    gap = of.energy[low] - V[low]
    assert gap.mean() == pytest.approx(3.5 * KT, abs=0.15 * KT)
    z = (gap - gap.mean()) / of.energy_error[low]
    assert 0.7 < z.std() < 1.4
    # S doesn't depend on the torsions.
    entropy = of.entropy[low]
    z = (entropy - entropy.mean()) / of.entropy_error[low]
    assert 0.7 < z.std() < 1.4
    cool = landscape(sampled, proposal, TEMPERATURE_K, settings, at_K=280.0)
    assert cool.temperature_K == 280.0
    z = z_scores(cool, V)  # V doesn't depend on T, so F doesn't either
    assert np.sqrt((z**2).mean()) < 1.4
    assert cool.effective[low].mean() < of.effective[low].mean()
    with pytest.raises(ValueError, match=r"can be trusted at 40 K.*effective"):
        landscape(sampled, proposal, TEMPERATURE_K, settings, at_K=40.0)


def test_marginals_and_basins_against_quadrature(tmp_path):
    fine = np.exp(-truth(Grid.regular([PHI, PSI], [12, 60], [None, None]), n=12) / KT)
    of_phi = fine.reshape(12, 60).sum(1)
    exact = -KT * np.log(of_phi)
    basin = -KT * np.log(of_phi[6:].sum() / of_phi[:6].sum())
    z, of_basin, errors = [], [], []
    for seed in range(6):
        whole, _, _, _ = direct(tmp_path / str(seed), seed, max_kT=9.0)
        of = marginal(whole, [0])
        assert of.trusted.all()
        z.append(z_scores(of, exact))
        masks = [whole.grid.basin("phi<0"), whole.grid.basin("phi>=0")]
        found = basin_differences(whole, masks)
        again = basin_differences(of, [of.grid.basin("phi<0"), of.grid.basin("0<phi")])
        np.testing.assert_allclose(again.difference, found.difference, atol=1e-9)
        np.testing.assert_allclose(again.error, found.error, rtol=1e-6)
        of_basin.append((found.difference[1] - basin) / found.error[1])
        errors.append(found.error[1])
        assert not found.missing.any()
    assert 0.75 < np.concatenate(z).std() < 1.3
    of_basin = np.array(of_basin)
    assert max(errors) < 0.1 * KT
    assert abs(of_basin.mean()) < 1.0
    assert 0.5 < of_basin.std() < 1.6  # 6 repetitions
    assert np.abs(of_basin).max() < 3.5


def test_bins_that_fail_the_gate_are_never_used(tmp_path):
    """Where few samples, of short bonds, have nearly all the weight, there is no F."""

    class Jumping:
        n_atoms, n_calls = 5, 0

        def __init__(self):
            self.plain = chain_potential()

        def __call__(self, positions):
            energy, forces = self.plain(positions)
            phi = PHI.values(positions)
            length = np.linalg.norm(positions[:, 1] - positions[:, 0], axis=1)
            return energy - np.where((phi > 0) & (length < shortest), 0.2, 0.0), forces

    shortest = 1.5 - 1.9 * np.sqrt(KT / 12.0)
    of, _, _, settings = direct(tmp_path, potential=Jumping())
    right = GRID.centres[:, 0] > 0
    bad = right & of.doubtful
    assert bad.sum() > 10
    assert np.isnan(of.free_energy[bad]).all()
    assert (of.n_samples[bad] == settings.n_most).all()
    assert (of.probability[bad] == 0).all()
    masks = [GRID.basin("phi<0"), GRID.basin("phi>0")]
    if (masks[1] & of.trusted).any():
        found = basin_differences(of, masks)
        assert found.doubtful[1] == bad.sum()
        assert found.missing[1] > 0.3
    else:
        with pytest.raises(ValueError, match="no bin that can be trusted"):
            basin_differences(of, masks)


def test_calls_stay_within_the_limit_and_go_to_the_lowest_bins(tmp_path):
    exact = truth()
    of, _, _, _ = direct(tmp_path, max_calls=1400)
    assert of.n_calls <= 1400
    more = of.n_samples > 8
    assert 20 <= more.sum() < of.grid.n_points
    assert exact[more].mean() < exact[~more].min() + 2 * KT
    with pytest.raises(ValueError, match="768 energy calls for a first look"):
        direct(tmp_path, max_calls=700)


# -------------------------------------------------------------- from beads

MOLECULE = LinearGaussian()
DISTANCE = Variable("d", "distance", (0, 1))
WINDOWS = WindowSettings(per_variable=8, n_steps=4000, timestep_fs=4.0, friction_per_ps=20.0)


@pytest.fixture(scope="module")
def beads_grid():
    r = np.linalg.norm(MOLECULE.x0[2] - MOLECULE.x0[0])
    return Grid.regular([DISTANCE], [12], [(r - 0.6, r + 0.75)])


@pytest.fixture(scope="module")
def ensemble(beads_grid, tmp_path_factory):
    start = MOLECULE.cg_map.apply(MOLECULE.x0)
    evaluator = GaussianBeads(MOLECULE, n_windows(beads_grid, WINDOWS))
    folder = tmp_path_factory.mktemp("windows")
    return run_windows(evaluator, start, beads_grid, folder, WINDOWS)


def test_a_distance_of_an_imperfect_force_field_and_flow(beads_grid, ensemble, tmp_path):
    flow = GaussianBackmapper(MOLECULE, shift=0.1, scale=1.05, bend=0.1)
    proposal = FromEnsemble(beads_grid, ensemble, WINDOWS, TEMPERATURE_K)
    settings = Sampling(n_samples=128, n_most=256)
    sampled = sample_grid(flow, MOLECULE, proposal, tmp_path, settings, origin="beads")
    of = landscape(sampled, proposal, TEMPERATURE_K, settings)
    edges = beads_grid.edges[0]
    r = np.linspace(edges[0] - 1.2, edges[-1] + 1.2, 400)
    density = distance_density(MOLECULE, 0, 1, r)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(r))])
    exact = -KT * np.log(np.diff(np.interp(edges, r, cumulative)))
    assert of.trusted.all()
    z = z_scores(of, exact)
    assert np.abs(z).max() < 4
    assert np.sqrt((z**2).mean()) < 1.6
    assert (of.error < 0.25 * KT).all()
    # Without the weights the force field is wrong by more than that.
    plain = -KT * proposal.log_share
    assert np.ptp(plain - exact) > 0.5 * KT
    # Mean energy, too: by the samples of the molecule itself.
    x = MOLECULE.sample(40_000, np.random.default_rng(5))
    energy, _ = MOLECULE(x)
    bins = beads_grid.index(DISTANCE.values(MOLECULE.cg_map.apply(x))[:, None])
    for point in (4, 6, 8):
        own = energy[bins == point]
        error = np.hypot(own.std() / np.sqrt(len(own)), of.energy_error[point])
        assert abs(of.energy[point] - own.mean()) < 4 * error


PHI_OF_BEADS = Grid.regular([Variable("phi", "torsion", tuple(TORSIONS[0].tolist()))], [24], [None])


def _over_ridges(folder, per_variable, n_steps):
    """F of φ over barriers that curve down by 100 kT/rad², from windows; and the truth, in kT."""
    settings = WindowSettings(per_variable, n_steps=n_steps)
    ensemble = run_windows(
        ChainBeads(per_variable), ChainBeads.start, PHI_OF_BEADS, folder, settings
    )
    found = FromEnsemble(PHI_OF_BEADS, ensemble, settings, TEMPERATURE_K)
    turns = (np.arange(2400) + 0.5) * 2 * np.pi / 2400 - np.pi
    angles = np.stack(np.meshgrid(turns, turns[::24], indexing="ij"), -1)
    p = np.exp(-ridges(torch.from_numpy(angles)).numpy() / KT).reshape(24, -1).sum(1)
    weight = np.where(found.known, p, 0) / p[found.known].sum()
    low = found.known & (p > np.exp(-10) * p.max())
    ln_p = np.where(found.known, [found.log_share, *found.log_share_replicas], 0)
    ln_p = ln_p - (ln_p @ weight)[:, None]
    exact = np.where(found.known, np.log(p), 0)
    gap = ln_p[0] - exact + exact @ weight
    return found, gap[low], ln_p[1:].std(0)[low]


def test_the_usual_windows_hold_on_a_steep_surface(tmp_path):
    assert [usual_windows(d) for d in (1, 2, 3)] == [24, 24, 8]
    found, gap, error = _over_ridges(tmp_path, usual_windows(1), 4000)
    assert not windows_warning(found)
    assert np.sqrt((gap**2).mean()) < 0.4
    assert np.sqrt(((gap / error) ** 2).mean()) < 2
    assert (error < 0.4).all()


def test_windows_that_stick_beside_a_barrier_are_found_out(tmp_path):
    """Half as many are softer than barriers curve: each sees one side, with blocks that agree."""
    found, gap, error = _over_ridges(tmp_path, 12, 2000)
    assert np.sqrt((gap**2).mean()) > 0.5
    assert (np.abs(gap) < 4 * error).all()
    (warning,) = windows_warning(found)
    assert "phi = 0 °" in warning
    assert "--windows" in warning


def test_both_ways_agree_or_say_how_far_they_are_apart(tmp_path):
    one = direct(tmp_path / "a", 1)[0]
    other = direct(tmp_path / "b", 2)[0]
    found = agreement(one, other, 4.0)
    assert found.n_bins > 30
    assert found.rms_kT == pytest.approx(found.expected_rms_kT, rel=0.4)
    shifted = landscape(*_tilted(tmp_path / "b"))
    assert agreement(one, shifted, 4.0).rms_kT > 3 * found.expected_rms_kT


def _tilted(folder):
    """Return what `landscape` takes, of a run whose weights are tilted along φ."""
    _, sampled, proposal, settings = direct(folder, 2)
    tilt = np.sin(GRID.centres[:, 0])
    bins = [
        one._replace(log_weight=one.log_weight + t)
        for one, t in zip(sampled.bins, tilt, strict=True)
    ]
    return sampled._replace(bins=bins), proposal, TEMPERATURE_K, settings


# ----------------------------------------------------------------- resuming


class Killed(Exception):
    pass


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path):
    whole = direct(tmp_path / "whole")[0]
    potential = chain_potential()
    for limit in (300, 700, 1500, 2200):

        def killing(positions, limit=limit):
            if potential.n_calls > limit:
                raise Killed
            return potential(positions)

        with pytest.raises(Killed):
            direct(tmp_path / "parts", potential=killing)
    (tmp_path / "parts" / ".half.npz.1.tmp").write_bytes(b"half a file")
    resumed = direct(tmp_path / "parts", potential=potential)[0]
    np.testing.assert_array_equal(resumed.free_energy, whole.free_energy)
    np.testing.assert_array_equal(resumed.error, whole.error)
    assert resumed.n_calls == whole.n_calls
    n_calls = potential.n_calls
    direct(tmp_path / "parts", potential=potential)
    assert potential.n_calls == n_calls  # nothing is computed twice


def test_interrupted_windows_end_in_the_same_bits(beads_grid, tmp_path):
    settings = WindowSettings(per_variable=4, n_steps=200)
    start = MOLECULE.cg_map.apply(MOLECULE.x0)

    def run(folder, tick=None):
        return run_windows(
            GaussianBeads(MOLECULE, 4), start, beads_grid, folder, settings, tick=tick
        )

    whole = run(tmp_path / "whole")

    def killing(done, total, note):
        if len(list((tmp_path / "parts").glob("*.npz"))) in (3, 7):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            run(tmp_path / "parts", killing)
    (tmp_path / "parts" / "windows_06.npz").unlink()  # killed before the frames, after the state
    resumed = run(tmp_path / "parts")
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
