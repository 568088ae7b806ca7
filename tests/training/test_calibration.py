"""Values and error bars of every estimator in repetitions: no bias, and the coverage they claim."""

import numpy as np
import pytest
from double_well import KT as WELL_KT
from double_well import TEMPERATURE_K, DoubleWell, WideBackmapper
from linear_gaussian import GaussianBackmapper, LinearGaussian
from scipy.stats import binom

from ccg_mda.two_level import TwoLevelWeights
from ccg_mda.weights import log_mean_exp, weighted_average
from ccg_training.annealing import AnnealingPath, anneal, tune_path
from ccg_training.estimators import at_temperature, mean_force, thermodynamics
from ccg_training.pseudo_marginal import pseudo_marginal_chains, stored_chain
from ccg_training.reconstruction import reconstruct

REPETITIONS = 100


def assert_calibrated(value, error, truth):
    """Mean within 3 standard errors; 68 % and 95 % intervals cover as often as chance allows.

    That is within binomial bounds which all of some sixty such checks keep together at 99.4 %.
    """
    n = len(value)
    deviation = value - truth
    assert abs(deviation.mean()) < 3 * deviation.std(ddof=1) / np.sqrt(n)
    for level, width in ((0.6827, 1.0), (0.95, 1.96)):
        covered = (np.abs(deviation) < width * error).sum()
        low, high = binom.interval(0.9999, n, level)
        assert low <= covered <= high, (level, covered, low, high)


def test_this_check_can_fail():
    rng = np.random.default_rng(0)
    value, error = rng.normal(size=REPETITIONS), np.ones(REPETITIONS)
    assert_calibrated(value, error, 0.0)
    for wrong in ((value, error / 1.5, 0.0), (value, error * 1.7, 0.0), (value + 0.4, error, 0.0)):
        with pytest.raises(AssertionError):
            assert_calibrated(*wrong)


def pulled(path, n_states):
    """Path of one state, for its repetitions."""
    return AnnealingPath(path.fractions, np.repeat(path.step_sizes, n_states, axis=1))


def along(vectors, direction):
    """Component of vectors per bead, (..., n_beads, 3)."""
    return (vectors * direction).sum((-1, -2))


# -------------------------------------------------- linear-Gaussian molecule


@pytest.fixture(scope="module")
def molecule():
    return LinearGaussian()


@pytest.fixture(scope="module")
def state(molecule):
    return molecule.sample_beads(1, np.random.default_rng(1))


@pytest.fixture(scope="module")
def plain(molecule, state):
    """Estimates from plain weights in repetitions: name to value, error and truth."""
    flow = GaussianBackmapper(molecule, shift=0.12, scale=1.05, bend=0.06, stretch=0.03)
    states = np.repeat(state, REPETITIONS, axis=0)
    drawn = reconstruct(flow, molecule, states, 128, np.random.default_rng(2), batch_size=8192)
    T, warm = 300.0, 310.0
    direction = np.random.default_rng(3).normal(size=state.shape[1:])
    here = thermodynamics(drawn.log_weight, drawn.energy, T)
    shifted = at_temperature(drawn.log_weight, drawn.energy, T, warm)
    there = thermodynamics(shifted, drawn.energy, warm)
    found = {
        "free energy": (here.free_energy, molecule.free_energy(state)),
        "energy": (here.energy, molecule.mean_energy(state)),
        "entropy": (here.entropy, molecule.entropy(state)),
        "warmer free energy": (there.free_energy, molecule.free_energy(state, warm)),
        "warmer energy": (there.energy, molecule.mean_energy(state, warm)),
        "warmer entropy": (there.entropy, molecule.entropy(state, warm)),
    }
    force = along(molecule.mean_force(state), direction)
    for name in ("labels", "slice_labels"):
        projected = along(getattr(drawn, name), direction)
        found[name] = (mean_force(drawn.log_weight, projected), force)
    return {name: (*estimate, truth[0]) for name, (estimate, truth) in found.items()}


@pytest.mark.parametrize(
    "name",
    [
        "free energy",
        "energy",
        "entropy",
        "warmer free energy",
        "warmer energy",
        "warmer entropy",
        "labels",
        "slice_labels",
    ],
)
def test_plain_weights(plain, name):
    assert_calibrated(*plain[name])


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["AIS", "SMC"])
def annealed(request, molecule, state):
    flow = GaussianBackmapper(molecule, shift=0.7, scale=1.25, bend=0.1)
    path = tune_path(flow, molecule, state, 64, np.random.default_rng(4))
    states = np.repeat(state, REPETITIONS, axis=0)
    return anneal(
        flow,
        molecule,
        states,
        160,
        pulled(path, REPETITIONS),
        np.random.default_rng(5),
        resample_below=request.param,
        batch_size=8192,
    )


def test_annealed_partition_function(molecule, state, annealed):
    assert_calibrated(*annealed.log_partition, molecule.log_partition(state)[0])


def test_annealed_averages(molecule, state, annealed):
    assert_calibrated(*annealed.average(annealed.energy), molecule.mean_energy(state)[0])
    direction = np.random.default_rng(3).normal(size=state.shape[1:])
    force = annealed.average(along(annealed.labels, direction))
    assert_calibrated(*force, along(molecule.mean_force(state), direction)[0])


# ------------------------------------------------------------- averages over s

N_STEPS, N_BLOCKS = 300, 15


@pytest.fixture(scope="module")
def bead_run():
    """Draws of a bead force field that is too soft, with estimates of Z, in repetitions."""
    molecule = LinearGaussian(n_atoms=4, bead_atoms=(0, 2, 3))
    flow = GaussianBackmapper(molecule, shift=0.3, bend=0.3, stretch=0.2)
    stiffness = 0.8 * molecule.schur
    rest, kT = molecule.x0.ravel()[molecule.bead_dof], molecule.kT()
    root = np.linalg.cholesky(stiffness / kT)

    def draw(n, rng):
        noise = rng.normal(size=(len(rest), n))
        return (rest + np.linalg.solve(root.T, noise).T).reshape(n, -1, 3)

    def reduced(states):
        delta = states.reshape(len(states), -1) - rest
        return 0.5 * np.einsum("si,ij,sj->s", delta, stiffness, delta) / kT

    def samples(states, rng):
        return reconstruct(flow, molecule, states, 2, rng, batch_size=8192)

    truth = 0.5 * 3 * molecule.n_atoms * kT  # of E[U|s]: equipartition
    return molecule, draw, reduced, samples, truth


def block_average(energy):
    """Mean over steps, (n, C), and block errors of each chain."""
    averages = [
        weighted_average(chain, np.zeros(len(chain)), n_blocks=N_BLOCKS) for chain in energy.T
    ]
    return np.array(averages).T


def test_pseudo_marginal_chains(bead_run):
    molecule, draw, reduced, samples, truth = bead_run

    def propose(states, rng):
        new = draw(len(states), rng)
        return new, reduced(new) - reduced(states)

    def log_z(states, rng):
        return log_mean_exp(samples(states, rng).log_weight, axis=1)[0]

    rng = np.random.default_rng(6)
    first = molecule.sample_beads(REPETITIONS, rng)
    chains = pseudo_marginal_chains(propose, log_z, first, 20 + N_STEPS, rng)
    assert chains.acceptance.mean() > 0.4
    assert_calibrated(*block_average(molecule.mean_energy(chains.states[20:])), truth)


def test_stored_chains_and_two_level_weights(bead_run):
    molecule, draw, reduced, samples, truth = bead_run
    rng = np.random.default_rng(7)
    states = draw(REPETITIONS * N_STEPS, rng)
    drawn, F = samples(states, rng), reduced(states)
    log_z = log_mean_exp(drawn.log_weight, axis=1)[0]
    energy = molecule.mean_energy(states)
    chains, weighted = np.empty((N_STEPS, REPETITIONS)), []
    for repeat in range(REPETITIONS):
        part = slice(repeat * N_STEPS, (repeat + 1) * N_STEPS)
        chains[:, repeat] = energy[part][stored_chain(log_z[part], F[part], rng).index]
        bead = np.repeat(np.arange(N_STEPS), 2)
        weights = TwoLevelWeights.combine(drawn.log_weight[part].ravel(), bead, F[part])
        weighted.append(weights.average(drawn.energy[part].ravel(), n_blocks=N_STEPS))
    assert_calibrated(*block_average(chains), truth)
    assert_calibrated(*np.array(weighted).T, truth)


# ----------------------------------------------------------------- double well


@pytest.fixture(scope="module")
def wells():
    molecule = DoubleWell()
    state = np.array([[[0.3, -0.2, 0.5]]])
    truth = {
        "log_partition": molecule.log_partition(state)[0],
        "energy": molecule.mean_energy(state)[0],
        "force": molecule.mean_force_x(state)[0],
    }
    return molecule, state, truth


def test_double_well_by_plain_weights(wells):
    molecule, state, truth = wells
    flow = WideBackmapper(molecule)
    states = np.repeat(state, REPETITIONS, axis=0)
    drawn = reconstruct(flow, molecule, states, 600, np.random.default_rng(8), batch_size=8192)
    result = thermodynamics(drawn.log_weight, drawn.energy, TEMPERATURE_K)
    assert_calibrated(*result.free_energy, -WELL_KT * truth["log_partition"])
    assert_calibrated(*result.energy, truth["energy"])
    force = mean_force(drawn.log_weight, drawn.labels[..., 0, 0])
    assert_calibrated(*force, truth["force"])


@pytest.mark.parametrize("resample_below", [0.0, 0.5], ids=["AIS", "SMC"])
def test_double_well_annealed(wells, resample_below):
    """From a flow that has most of its weight in one well."""
    molecule, state, truth = wells
    flow = WideBackmapper(molecule, centre=0.4, width=0.5)
    path = tune_path(flow, molecule, state, 64, np.random.default_rng(9))
    samples = anneal(
        flow,
        molecule,
        np.repeat(state, REPETITIONS, axis=0),
        192,
        pulled(path, REPETITIONS),
        np.random.default_rng(10),
        resample_below=resample_below,
        batch_size=16384,
    )
    assert_calibrated(*samples.log_partition, truth["log_partition"])
    assert_calibrated(*samples.average(samples.energy), truth["energy"])
    assert_calibrated(*samples.average(samples.labels[..., 0, 0]), truth["force"])
