import MDAnalysis as mda
import numpy as np
import pytest
from ensembles import WrongEnsemble
from MDAnalysis.exceptions import NoDataError
from molecules import GaussianBackmapper, dipeptide, slice_map

from ccg_mda.averages import WeightedAverage
from ccg_mda.potential import TorchPotential
from ccg_mda.transformation import backmap
from ccg_mda.universe import coarse_grain, universe_from
from ccg_mda.weights import log_weights, weighted_average

FEW = "ignore:don't trust averages with these weights"


def series(values):
    """A Universe whose atoms' coordinates are the given numbers, (n_frames, n)."""
    values = np.asarray(values, dtype=np.float32)
    u = mda.Universe.empty(values.shape[1], trajectory=True)
    return u.load_new(np.stack([values, values**2, np.ones_like(values)], axis=-1))


def positions(atoms):
    return atoms.positions


def x(atoms):
    return atoms.positions[:, 0]


def ratio(mean):
    return mean[0] / mean[1]


def harmonic(x):
    return 0.002 * (x[1:] - x[:-1]).square().sum()


@pytest.fixture(scope="module")
def sampled():
    """180 frames: three weighted reconstructions of each of 60 bead frames."""
    model = GaussianBackmapper(slice_map())
    u_cg = coarse_grain(dipeptide(60), model.cg_map)
    return backmap(u_cg, model, n_samples=3, potential=TorchPotential(harmonic, 22))


def test_unweighted_is_textbook(rng):
    u = series(rng.normal(size=(64, 3)))
    each = u.trajectory.timeseries(order="fac").astype(float)
    run = WeightedAverage(positions, u, log_w=np.zeros(64), n_blocks=64).run()
    expected = each.std(axis=0, ddof=1) / 8
    np.testing.assert_allclose(run.results.mean, each.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(run.results.error, expected, rtol=1e-12)
    assert run.results.effective_sample_size == 1
    assert run.results.pareto_k == -np.inf
    drawn = WeightedAverage(
        positions, u, log_w=np.zeros(64), n_blocks=8, error="bootstrap", n_bootstrap=8000
    ).run()
    expected = each.reshape(8, 8, 3, 3).mean(axis=1).std(axis=0, ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(
        drawn.results.error, expected, rtol=5 / np.sqrt(2 * 8000), atol=1e-12
    )


def test_jackknife_is_that_of_busing(rng):
    # 109 frames in 20 blocks of five or six, with weights, and a result that isn't linear.
    values = rng.normal(size=(109, 2)) + 4
    log_w = rng.normal(size=109) - 1e5
    u = series(values)
    run = WeightedAverage(x, u, log_w=log_w, finish=np.log).run()
    values, w = u.trajectory.timeseries(order="fac")[..., 0].astype(float), np.exp(log_w + 1e5)
    block = np.searchsorted(np.arange(20) * 109 // 20, np.arange(109), side="right") - 1

    def estimate(kept):
        return np.log(np.average(values[kept], axis=0, weights=w[kept]))

    h = 109 / np.bincount(block)[:, None]
    whole = estimate(np.full(109, True))
    without = np.array([estimate(block != j) for j in range(20)])
    jackknife = 20 * whole - np.sum((1 - 1 / h) * without, axis=0)
    pseudo = h * whole - (h - 1) * without
    variance = np.mean((pseudo - jackknife) ** 2 / (h - 1), axis=0)
    np.testing.assert_allclose(run.results.mean, whole, rtol=1e-11)
    np.testing.assert_allclose(run.results.error, np.sqrt(variance), rtol=1e-8)


def test_integer_weights_are_repeats(rng):
    times = rng.integers(0, 5, size=200)
    u = series(rng.normal(size=(200, 2)))
    with np.errstate(divide="ignore"):
        log_w = np.log(times) + 2e4
    chosen = slice(3, 197, 2)
    weighted = WeightedAverage(positions, u, log_w=log_w).run(start=3, stop=197, step=2)
    mask = np.isin(np.arange(200), np.arange(200)[chosen])
    masked = WeightedAverage(positions, u, log_w=log_w).run(frames=mask)
    np.testing.assert_array_equal(masked.results.error, weighted.results.error)
    frames = np.repeat(np.arange(200)[chosen], times[chosen])
    # Blocks are those of the bead frames read: keep one frame of every bead frame of weight zero.
    zero = np.arange(200)[chosen][times[chosen] == 0]
    log_w_repeated = np.where(np.isin(np.arange(200), zero), -np.inf, 0.0)
    repeated = WeightedAverage(positions, u, log_w=log_w_repeated).run(
        frames=np.sort(np.concatenate([frames, zero]))
    )
    for name in ("mean", "error"):
        np.testing.assert_allclose(weighted.results[name], repeated.results[name], rtol=1e-9)
    values = u.trajectory.timeseries(order="fac")[chosen]
    mean, error = weighted_average(values, log_w[chosen], n_blocks=20)
    np.testing.assert_allclose(weighted.results.mean, mean, rtol=1e-11)
    np.testing.assert_allclose(weighted.results.error[:, 0], error[:, 0], rtol=0.1)


@pytest.mark.parametrize("error", ["jackknife", "bootstrap"])
def test_error_bars_cover_the_truth(error, rng):
    # 1000 runs at once: values of correlation time 10 and weights that turn N(0, 1) into N(0.5, 1).
    n, repeats, memory = 4000, 1000, np.exp(-1 / 10)
    noise = rng.normal(size=(n, repeats)) * np.sqrt(1 - memory**2)
    walk = np.empty_like(noise)
    walk[0] = rng.normal(size=repeats)
    for k in range(1, n):
        walk[k] = memory * walk[k - 1] + noise[k]
    w = np.exp(0.5 * walk - 0.125)
    u = mda.Universe.empty(repeats, trajectory=True)
    u.load_new(np.stack([w * walk, w, walk], axis=-1).astype(np.float32))
    options = {"error": error, "n_bootstrap": 300}
    run = WeightedAverage(weighted_and_weight, u, log_w=np.zeros(n), finish=ratio, **options).run()
    z = (run.results.mean - 0.5) / run.results.error
    assert abs(z.mean()) < 0.15  # a ratio is biased by a fraction of its error
    # Student's t with 19 degrees of freedom: 94 % within two errors, spread 1.06.
    assert np.mean(np.abs(z) < 2) == pytest.approx(0.94, abs=0.03)
    assert z.std() == pytest.approx(1.06, abs=0.1)
    # Weights as values and weights as weights are the same.
    single = WeightedAverage(first, u, log_w=np.log(w[:, 0]), **options).run()
    assert single.results.mean == pytest.approx(run.results.mean[0], rel=1e-5)
    assert single.results.error == pytest.approx(run.results.error[0], rel=1e-5)


def weighted_and_weight(atoms):
    return atoms.positions[:, :2].T


def first(atoms):
    return atoms.positions[0, 2]


@pytest.mark.filterwarnings(FEW)
def test_samples_of_a_bead_frame_stay_together(sampled):
    log_w = log_weights(sampled)
    values = sampled.trajectory.timeseries(order="fac").astype(float)
    chosen = np.r_[np.arange(30, 180, 2), 31, 31]  # some bead frames whole, some in part
    run = WeightedAverage(positions, sampled, n_blocks=1000).run(frames=np.sort(chosen))
    np.testing.assert_array_equal(run.results.log_weights, log_w[np.sort(chosen)])
    assert run.results.n_blocks == len(np.unique(chosen // 3)) == 50
    w = np.exp(log_w[chosen] - log_w.max())
    mean = np.average(values[chosen], axis=0, weights=w)
    kept = [np.isin(chosen // 3, bead, invert=True) for bead in np.unique(chosen // 3)]
    without = np.array([np.average(values[chosen][k], axis=0, weights=w[k]) for k in kept])
    error = np.sqrt(49 / 50 * np.sum((without - without.mean(axis=0)) ** 2, axis=0))
    np.testing.assert_allclose(run.results.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(run.results.error, error, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings(FEW, "ignore:.*use of fork:DeprecationWarning")
def test_workers_and_files_agree(sampled, tmp_path):
    one = WeightedAverage(positions, sampled, n_blocks=7).run().results
    two = WeightedAverage(positions, sampled, n_blocks=7)
    two.run(backend="multiprocessing", n_workers=2, n_parts=5)
    path = str(tmp_path / "atoms.h5md")
    sampled.atoms.write(path, frames="all")
    again = universe_from(slice_map().atoms, path)
    three = WeightedAverage(positions, again, n_blocks=7).run()
    for other in (two, three):
        assert set(other.results) == set(one)
        for name in one:
            np.testing.assert_allclose(other.results[name], one[name], rtol=1e-9, atol=1e-12)


def test_weight_zero_spoils_nothing():
    u = series(np.r_[np.linspace(0, 1, 100), np.inf, np.nan][:, None])
    log_w = np.r_[np.linspace(-0.5, 0.5, 100), -np.inf, -np.inf]
    run = WeightedAverage(x, u, log_w=log_w).run()
    expected = np.average(np.linspace(0, 1, 100), weights=np.exp(log_w[:100]))
    assert run.results.mean == pytest.approx(expected)
    assert np.isfinite(run.results.error)
    log_w[101] = -900.0
    with pytest.raises(ValueError, match="value of frame 101, which has weight, is NaN"):
        WeightedAverage(x, u, log_w=log_w).run()
    with pytest.raises(ValueError, match="all weights are zero"):
        WeightedAverage(x, u, log_w=np.full(102, -np.inf)).run()


def test_warnings_carry_the_number(rng):
    u = series(np.ones((1000, 1)))
    with pytest.warns(UserWarning, match=r"25\.0 effective bead frames of 1000"):
        WeightedAverage(x, u, log_w=np.r_[np.zeros(25), np.full(975, -1e4)], n_blocks=500).run()
    heavy = rng.standard_exponential(1000)
    with pytest.warns(UserWarning, match=r"Pareto k 1\.\d\d is above 0\.7"):
        WeightedAverage(x, u, log_w=np.log1p(0.01 * np.exp(1.2 * heavy))).run()
    with pytest.warns(UserWarning, match="all weight lies in one block"):
        run = WeightedAverage(
            x, u, log_w=np.r_[np.full(940, -1e4), np.zeros(60)], n_blocks=10
        ).run()
    assert run.results.mean == 1
    assert np.isnan(run.results.error)


def test_errors(sampled):
    u = series(np.ones((60, 1)))
    with pytest.raises(ValueError, match="5 log weights given for a trajectory of 60"):
        WeightedAverage(x, u, log_w=np.zeros(5))
    with pytest.raises(ValueError, match="must not be NaN"):
        WeightedAverage(x, u, log_w=np.full(60, np.nan))
    with pytest.raises(ValueError, match="n_blocks must be at least 2"):
        WeightedAverage(x, u, n_blocks=1)
    with pytest.raises(ValueError, match="'jackknife' or 'bootstrap', got 'jacknife'"):
        WeightedAverage(x, u, error="jacknife")
    with pytest.raises(NoDataError, match="frame 0 carries no log_weight"):
        WeightedAverage(x, u).run()
    for frames in ({"stop": 2}, {"frames": []}):
        with pytest.raises(ValueError, match="at least 2 bead frames"):
            WeightedAverage(x, sampled).run(**frames)
    with pytest.raises(ValueError, match="cannot be combined"):
        WeightedAverage(x, sampled).run(stop=3, frames=[1, 2])
    shapes = iter([1, 2])
    with pytest.raises(ValueError, match=r"one shape in all frames, got \(1,\) and \(2,\)"):
        WeightedAverage(lambda atoms: np.ones(next(shapes)), u, log_w=np.zeros(60)).run()


def test_weights_turn_wrong_models_into_the_exact_ensemble():
    """Beads from a wrong free energy, atoms from a wrong q: energies and lengths come out right."""
    wrong = WrongEnsemble(1500, 2, shift=0.15, scale=1.15)
    u, molecule, kT = wrong.universe, wrong.molecule, wrong.molecule.kT()
    log_w = log_weights(u, free_energy=wrong.free_energy, temperature_K=molecule.temperature_K)
    run = WeightedAverage(energy_and_square_length, u, log_w=log_w, n_blocks=50).run().results
    # Equipartition over all 12 degrees of freedom, and a Gaussian distance between the ends.
    ends = np.zeros((3, 12))
    ends[:, 9:], ends[:, :3] = np.eye(3), -np.eye(3)
    variance = kT * np.trace(ends @ np.linalg.inv(molecule.K) @ ends.T)
    exact = np.array([6 * kT, np.sum((molecule.x0[3] - molecule.x0[0]) ** 2) + variance])
    z = (run.mean - exact) / run.error
    assert np.all(np.abs(z) < 3)
    plain = WeightedAverage(
        energy_and_square_length, u, log_w=np.zeros(len(log_w)), n_blocks=50
    ).run()
    assert abs(plain.results.mean[0] - exact[0]) > 20 * plain.results.error[0]
    assert run.error[0] < 0.03 * exact[0]


def energy_and_square_length(atoms):
    ends = atoms.positions[3] - atoms.positions[0]
    return np.array([atoms.universe.trajectory.ts.data["energy"], ends @ ends])
