"""Annealing in noise space against closed forms, where plain weights fail."""

import numpy as np
import pytest
import torch
from double_well import DoubleWell, WideBackmapper
from linear_gaussian import GaussianBackmapper, LinearGaussian
from scipy.integrate import quad

from ccg_mda import Backmapper
from ccg_mda.transforms import Base
from ccg_mda.weights import effective_sample_size, log_mean_exp
from ccg_training.annealing import AnnealingPath, anneal, tune_path
from ccg_training.estimators import mean_force
from ccg_training.hmc import hmc_move, leapfrog
from ccg_training.noise_space import NoiseSpace
from ccg_training.reconstruction import pull_back, reconstruct

N_STATES, K = 100, 48


@pytest.fixture(scope="module")
def molecule():
    return LinearGaussian()


@pytest.fixture(scope="module")
def bad_flow(molecule):
    """Displaced by 0.9 and 1.3 times as wide in each of twelve dimensions, and bent along s."""
    return GaussianBackmapper(molecule, shift=0.9, scale=1.3, bend=0.1)


@pytest.fixture(scope="module")
def beads(molecule):
    return molecule.sample_beads(N_STATES, np.random.default_rng(1))


@pytest.fixture(scope="module")
def path(molecule, bad_flow, beads):
    """All states are alike here: tuned at a few, used at all."""
    few = tune_path(bad_flow, molecule, beads[:4], 32, np.random.default_rng(2))
    steps = np.repeat(few.step_sizes.mean(1, keepdims=True), len(beads), axis=1)
    return AnnealingPath(few.fractions, steps)


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["AIS", "SMC often"])
def annealed(request, molecule, bad_flow, beads, path):
    rng = np.random.default_rng(3)
    return anneal(
        bad_flow, molecule, beads, K, path, rng, resample_below=request.param, batch_size=8192
    )


SMALLEST = LinearGaussian(n_atoms=4, bead_atoms=(0, 2, 3))  # one placed atom


@pytest.fixture(params=["bent", "rotor", "lone bead"])
def real_flow(request):
    """An untrained flow, with a wide component: of normal noise, with a rotor, a free direction."""
    molecule = SMALLEST
    if request.param == "lone bead":
        molecule = LinearGaussian(n_atoms=2, bead_atoms=(0,))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        flow = Backmapper(
            molecule.cg_map, 300.0, rotor=[request.param == "rotor"], defensive=0.1, width=8
        )
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rest = torch.from_numpy(molecule.x0[None])
    r, theta, phi = flow.internal_coordinates(rest, flow.cg_map.apply(rest))[0].unbind(-1)
    centre = torch.stack([torch.log(r), torch.log(torch.tan(theta / 2)), phi + 0.2], -1)
    flow.coordinates.location.copy_(centre)
    flow.coordinates.scale.fill_(0.15)
    return molecule, flow


# ------------------------------------------------------------ noise space


def test_density_of_the_noise(real_flow):
    """It integrates to one, and is what the noise is drawn from."""
    base = Base(weight=0.3, sigma=1.7)
    normal = torch.tensor([[True, False, False]])
    for widened in (normal, torch.zeros_like(normal)):

        def density(z, widened=widened):
            noise = torch.tensor([[z, 0.0, 0.4]], dtype=torch.float64)
            circular = torch.tensor([[False, False, True]])
            return float(base.log_density(noise, normal, circular, widened).exp()) * 2 * np.pi

        assert quad(density, -15, 15)[0] == pytest.approx(1.0, abs=1e-6)
    flow = real_flow[1]
    noise = flow.sample_noise(np.random.default_rng(0), (2000, 50))
    rng = np.random.default_rng(1)
    uniform = torch.from_numpy(rng.uniform(-4, 4, noise.shape))
    inside = torch.where(flow.circular_noise, noise.abs() <= np.pi, noise.abs() < 4).all(-1)
    volume = torch.where(flow.circular_noise, 2 * np.pi, 8.0).prod()
    uniform = torch.where(flow.circular_noise, uniform * np.pi / 4, uniform)
    integral = volume * flow.log_base(uniform).exp()
    error = integral.std() / integral.numel() ** 0.5
    assert abs(integral.mean() - inside.double().mean()) < 4 * error


def test_slopes_are_those_of_the_log_weight(real_flow):
    """Of l and ln r, on the circle across its seam, too."""
    molecule, flow = real_flow
    beads = molecule.sample_beads(3, np.random.default_rng(0))
    space = NoiseSpace(flow, molecule, beads, batch_size=4)
    noise = flow.sample_noise(np.random.default_rng(1), (3, 5))
    noise[..., flow.circular_noise] = np.pi - 1e-6
    points = space.at(noise)
    step = 1e-5 * torch.from_numpy(np.random.default_rng(2).normal(size=noise.shape))
    ahead, behind = (space.at(space.moved(noise, sign * step)) for sign in (1, -1))
    assert not flow.circular_noise.any() or (ahead.noise < 0)[..., flow.circular_noise].any()
    for fraction in (0.0, 1.0):
        rise = ahead.log_target(fraction) - behind.log_target(fraction)
        slope = (points.target_slope(fraction) * 2 * step).sum(-1)
        torch.testing.assert_close(rise, slope, rtol=1e-4, atol=1e-8)
    assert molecule.n_calls >= space.n_calls == 45


def test_leapfrog_is_reversible_round_the_circle(real_flow):
    molecule, flow = real_flow
    space = NoiseSpace(flow, molecule, molecule.sample_beads(4, np.random.default_rng(0)))
    rng = np.random.default_rng(1)
    start = space.draw(3, rng)
    momentum = torch.from_numpy(3 * rng.standard_normal(start.noise.shape))
    step = torch.full((4, 3, flow.n_dof), 0.03, dtype=torch.float64)
    there, turned = leapfrog(space, start, momentum, 0.7, step, 12)
    back, final = leapfrog(space, there, -turned, 0.7, step, 12)
    assert (there.noise - start.noise).abs().max() > 0.5
    difference = space.moved(back.noise, -start.noise)
    torch.testing.assert_close(difference, torch.zeros_like(difference), atol=1e-8, rtol=0)
    torch.testing.assert_close(-final, momentum, atol=1e-7, rtol=1e-7)
    assert (there.noise[..., flow.circular_noise].abs() <= np.pi).all()


@pytest.mark.parametrize("step_size", [0.4, 0.7])
def test_hmc_leaves_its_target_invariant(molecule, step_size):
    """Steps so long that without a decision the variance would be off by far."""
    flow = GaussianBackmapper(molecule, shift=0.3, scale=0.8)
    state = molecule.sample_beads(1, np.random.default_rng(0))
    space = NoiseSpace(flow, molecule, state, batch_size=8192)
    # l + ln r = -(shift + 0.8 ε)²/2 + const: normal of mean -shift/0.8, standard deviation 1/0.8.
    rng, n = np.random.default_rng(1), 4000
    mean, deviation = -flow.shift / 0.8, 1 / 0.8
    start = mean + deviation * torch.from_numpy(rng.standard_normal((1, n, flow.n_dof)))
    points, acceptances = space.at(start), []
    for _ in range(6):
        points, acceptance = hmc_move(
            space, points, 1.0, np.full((1, flow.n_dof), step_size), 3, rng
        )
        acceptances.append(acceptance[0])
    assert 0.2 < np.mean(acceptances) < 0.995
    standard = (points.noise[0] - mean) / deviation
    before = (start[0] - mean) / deviation
    assert abs((standard * before).mean()) < 0.1  # they have moved
    assert standard.mean(0).abs().max() < 4 / np.sqrt(n)
    assert (standard.square().mean(0) - 1).abs().max() < 4 * np.sqrt(2 / n)
    at_once = space.at(points.noise)
    torch.testing.assert_close(at_once.log_weight, points.log_weight)
    torch.testing.assert_close(at_once.positions, points.positions)


# ------------------------------------------------------------- annealing


def test_plain_weights_fail_here(molecule, bad_flow, beads):
    assert bad_flow.ess(torch.from_numpy(beads)).max() < 0.01
    plain = reconstruct(bad_flow, molecule, beads, K, np.random.default_rng(5))
    error = log_mean_exp(plain.log_weight, axis=1)[0] - molecule.log_partition(beads)
    assert np.sqrt((error**2).mean()) > 1.0


def test_mean_weight_is_unbiased(molecule, beads, annealed):
    ratio = np.exp(annealed.log_z - molecule.log_partition(beads))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(N_STATES)
    assert ratio.std() < 0.5


def test_log_partition_and_averages_with_their_errors(molecule, beads, annealed):
    for estimate, truth in (
        (annealed.log_partition, molecule.log_partition(beads)),
        (annealed.average(annealed.energy), molecule.mean_energy(beads)),
        (annealed.average(annealed.labels), molecule.mean_force(beads)),
    ):
        z = ((estimate.value - truth) / estimate.error).ravel()
        assert abs(z.mean()) < 0.1 + 4 / np.sqrt(N_STATES)
        assert 0.8 < z.std() < 1.25
    assert annealed.log_partition.error.mean() < 0.4


def test_energy_calls_are_counted_exactly(molecule, bad_flow, beads):
    molecule.n_calls = 0
    rng = np.random.default_rng(6)
    tuned = tune_path(bad_flow, molecule, beads[:2], 8, rng, n_leapfrog=3, n_moves=2, n_warm_up=5)
    stages = len(tuned.fractions)
    assert tuned.n_calls == molecule.n_calls == 2 * 8 * (1 + stages * 5 * 3)
    molecule.n_calls = 0
    samples = anneal(bad_flow, molecule, beads[:2], 10, tuned, rng)
    assert samples.n_calls == molecule.n_calls == 2 * 10 * (1 + stages * 2 * 3)
    assert samples.acceptance.shape == samples.effective_sample_size.shape == (stages, 2)


def test_samples_carry_what_potential_and_flow_say(molecule, bad_flow, beads, annealed):
    energy, forces = molecule(annealed.positions)
    np.testing.assert_allclose(annealed.energy, energy, atol=1e-10)
    np.testing.assert_allclose(annealed.forces, forces, atol=1e-10)
    x = torch.from_numpy(annealed.positions).transpose(0, 1)
    distribution = bad_flow(torch.from_numpy(beads))
    np.testing.assert_allclose(annealed.log_prob, distribution.log_prob(x).T, atol=1e-8)
    anew = pull_back(bad_flow, molecule, beads, distribution.noise_from(x), batch_size=8192)
    np.testing.assert_allclose(annealed.labels, anew.labels, atol=1e-8)


def test_without_resampling_plain_estimators_hold(molecule, bad_flow, beads, path):
    samples = anneal(bad_flow, molecule, beads, 8, path, np.random.default_rng(7), resample_below=0)
    here, plain = (
        samples.average(samples.labels),
        mean_force(samples.log_weight, samples.labels),
    )
    np.testing.assert_allclose(here.value, plain.value)
    np.testing.assert_allclose(here.error, plain.error)
    variance = log_mean_exp(samples.log_weight, axis=1)[1]
    np.testing.assert_allclose(samples.log_partition.error, np.sqrt(variance))


def test_tuned_path_keeps_its_promises(annealed, path):
    assert (np.diff(path.fractions) > 0).all()
    assert abs(annealed.acceptance.mean() - 0.8) < 0.12
    first = annealed.effective_sample_size[0]
    assert first.mean() > 0.85


def test_real_flow_with_circular_noise_and_wide_component(real_flow):
    """An untrained `Backmapper` gives ln Z of the fibre as it is in closed form."""
    molecule, flow = real_flow
    # Near the rest positions, for which it is made: far off, an untrained rotor is metastable.
    rest = flow.cg_map.apply(molecule.x0)
    states = rest + 0.05 * np.random.default_rng(8).normal(size=(2, *rest.shape))
    states = np.repeat(states, 7, axis=0)
    plain = reconstruct(flow, molecule, states, 64, np.random.default_rng(9))
    assert effective_sample_size(plain.log_weight).mean() < 0.2
    rng = np.random.default_rng(10)
    tuned = tune_path(flow, molecule, states, 16, rng, conditional_ess=0.7, n_warm_up=2)
    samples = anneal(flow, molecule, states, 48, tuned, rng)
    ratio = np.exp(samples.log_z - molecule.log_partition(states))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(states))
    assert ratio.std() / np.sqrt(len(states)) < 0.2  # a factor of 2π would show
    force = samples.average(samples.labels)
    # Labels of a lone bead have no scatter.
    z = (force.value - molecule.mean_force(states)) / np.hypot(force.error, 1e-9)
    assert abs(z.mean()) < 4 / np.sqrt(len(states))
    assert z.std() < 1.4


# --------------------------------------------------------------- clashes


@pytest.mark.parametrize("resample_below", [0.0, 0.5])
def test_clashes_have_no_weight_and_are_never_entered(resample_below):
    """Part of the support, most of what the flow offers, has infinite energy."""
    molecule = DoubleWell(wall=0.1)
    flow = WideBackmapper(molecule)
    beads = np.random.default_rng(0).normal(size=(50, 1, 3))
    tuned = tune_path(flow, molecule, beads, 16, np.random.default_rng(1))
    samples = anneal(
        flow, molecule, beads, 64, tuned, np.random.default_rng(2), resample_below=resample_below
    )
    clash = np.isposinf(samples.energy)
    assert (samples.log_weight[clash] == -np.inf).all()
    ratio = np.exp(samples.log_z - molecule.log_partition(beads))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(50)
    energy = samples.average(samples.energy)
    z = (energy.value - molecule.mean_energy(beads)) / energy.error
    assert abs(z.mean()) < 4 / np.sqrt(50)


def test_positions_that_are_not_finite_are_clashes_without_a_call():
    molecule = DoubleWell()
    flow = WideBackmapper(molecule)
    space, steps = NoiseSpace(flow, molecule, np.zeros((1, 1, 3))), np.full((1, 3), 1e200)
    noise = torch.zeros(1, 4, 3, dtype=torch.float64)
    noise[0, 1], noise[0, 2] = torch.inf, torch.nan
    points = space.at(noise)
    assert points.log_weight.isneginf().tolist() == [[False, True, True, False]]
    assert space.n_calls == molecule.n_calls == 2
    assert torch.isfinite(points.slope).all()
    moved, _ = hmc_move(space, space.at(noise[:, :1]), 1.0, steps, 2, np.random.default_rng(0))
    assert torch.equal(moved.noise, noise[:, :1])


def test_state_where_every_sample_clashes():
    molecule = DoubleWell(wall=-50.0)
    flow = WideBackmapper(molecule)
    path = AnnealingPath(np.array([0.5, 1.0]), np.full((2, 2, 3), 0.1))
    samples = anneal(flow, molecule, np.zeros((2, 1, 3)), 8, path, np.random.default_rng(0))
    assert (samples.log_z == -np.inf).all()
    assert (samples.log_partition.error == np.inf).all()
    assert np.isnan(samples.average(samples.labels).value).all()
    assert (samples.acceptance == 0).all()


# ------------------------------------------------------------- refusals


def test_paths_and_states_that_do_not_fit_are_refused(molecule, bad_flow, beads):
    for fractions in ([0.5, 0.5, 1.0], [0.2, 0.9], []):
        with pytest.raises(ValueError, match="rise to 1"):
            AnnealingPath(np.array(fractions), np.ones((len(fractions), 1, 1)))
    with pytest.raises(ValueError, match="for each stage"):
        AnnealingPath(np.array([0.5, 1.0]), np.ones((3, 1, 1)))
    path = AnnealingPath(np.array([1.0]), np.ones((1, 3, 12)))
    with pytest.raises(ValueError, match=r"made for \(3, 12\)"):
        anneal(bad_flow, molecule, beads[:2], 4, path, np.random.default_rng(0))
    with pytest.raises(ValueError, match="another mapping"):
        NoiseSpace(bad_flow, molecule, beads[:, :2])
    with pytest.raises(ValueError, match="after 2 stages"):
        tune_path(bad_flow, molecule, beads[:2], 8, np.random.default_rng(0), max_stages=2)
