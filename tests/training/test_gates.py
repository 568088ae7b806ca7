"""Gates: verdicts on weights, and the check on frames that weights alone can't stand in for."""

import numpy as np
import pytest
from double_well import DoubleWell, WideBackmapper
from linear_gaussian import GaussianBackmapper, LinearGaussian

from ccg_mda.weights import effective_sample_size
from ccg_training.config_loop import Cycle
from ccg_training.estimators import label_variance
from ccg_training.forward_check import ForwardCheck
from ccg_training.gates import cautious_ess, inflation, needed_samples, trusted, verdicts
from ccg_training.reconstruction import reconstruct
from ccg_training.reference import ReferenceData
from ccg_training.thresholds import Gates

GATES = Gates()
NONE = np.zeros(1)


def log_normal(ess, n_states, n_samples, rng):
    """Log-weights of a given effective sample size."""
    return np.sqrt(-np.log(ess)) * rng.normal(size=(n_states, n_samples))


# ---------------------------------------------------------------- verdicts


def test_verdicts_go_by_what_is_cheapest():
    rng = np.random.default_rng(0)
    for ess, n_samples, expected in (
        (0.9, 64, "accept"),
        (0.1, 64, "more"),
        (0.2, 512, "accept"),
        (1e-4, 64, "anneal"),
    ):
        log_weight = log_normal(ess, 100, n_samples, rng)
        found = verdicts(log_weight, np.zeros(100), GATES)
        assert (found == expected).mean() > 0.7, (ess, n_samples, found)
    assert verdicts(np.full((1, 64), -np.inf), NONE, GATES) == "restrain"
    even = np.zeros((1, 64))
    assert verdicts(even, NONE, GATES, np.array([True])) == "restrain"
    assert verdicts(even, NONE, GATES) == "accept"
    # A wanted error of the force asks for more; beyond the cap a right error bar is taken as it is.
    assert verdicts(even, np.array([0.05**2 * 100]), GATES) == "more"
    assert verdicts(even, np.array([0.05**2 * 5000]), GATES) == "accept"
    poor = log_normal(1e-4, 1, 512, rng)
    assert verdicts(poor, NONE, Gates(max_stages=0)) == "restrain"


def test_few_samples_don_t_hide_a_poor_flow():
    """64 of log-normal weights show 20 times their effective sample size; the gate sees through."""
    rng = np.random.default_rng(2)
    log_weight = log_normal(0.003, 400, 64, rng)
    assert effective_sample_size(log_weight).mean() > 0.06
    cautious = cautious_ess(log_weight)
    assert np.median(cautious) < 0.01
    assert not trusted(log_weight, Gates(max_pareto_k=np.inf)).any()
    np.testing.assert_allclose(inflation(log_weight) * cautious, effective_sample_size(log_weight))
    many = log_normal(0.5, 20, 4000, rng)
    assert cautious_ess(many).mean() == pytest.approx(0.5, rel=0.05)
    clash = np.where(rng.random(many.shape) < 0.3, -np.inf, many)
    assert cautious_ess(clash).mean() == pytest.approx(0.35, rel=0.05)
    assert inflation(np.full((1, 8), -np.inf)) == 1


def test_heavy_tails_aren_t_trusted_whatever_the_effective_sample_size():
    rng = np.random.default_rng(11)
    heavy = -1.5 * np.log(rng.random((1, 400)))  # a power law, k = 1.5
    assert not trusted(heavy, Gates(min_effective=1.0))
    assert trusted(heavy, Gates(min_effective=1.0, max_pareto_k=np.inf))
    assert verdicts(heavy, NONE, Gates(min_effective=1.0, log_z_error=9.0)) == "more"
    assert trusted(0.1 * rng.normal(size=(1, 20)), GATES)  # too few samples to know the tail
    with pytest.raises(ValueError, match="max_samples must be positive"):
        Gates(max_samples=0)


def test_needed_samples_give_the_wanted_errors():
    """Of ln Z and of the mean force, in repetitions with as many samples."""
    molecule = LinearGaussian()
    flow = GaussianBackmapper(molecule, shift=0.3, bend=0.1)
    rng = np.random.default_rng(1)
    beads = np.repeat(molecule.sample_beads(1, rng), 200, axis=0)
    gates = Gates(min_effective=1.0, log_z_error=0.1, force_error=1e9)
    pilot = reconstruct(flow, molecule, beads[:20], 2000, rng, batch_size=8192)
    variance = label_variance(pilot.log_weight, pilot.labels)
    need = int(np.median(needed_samples(pilot.log_weight, variance, gates)))
    assert 100 < need < 500
    drawn = reconstruct(flow, molecule, beads, need, rng, batch_size=8192)
    log_z = np.log(np.exp(drawn.log_weight - molecule.log_partition(beads)[:, None]).mean(1))
    assert log_z.std() == pytest.approx(0.1, rel=0.2)
    by_force = Gates(min_effective=1.0, log_z_error=9.0, force_error=0.001)
    need = np.median(needed_samples(pilot.log_weight, variance, by_force))
    ess = np.median(cautious_ess(pilot.log_weight))
    assert need == pytest.approx(np.median(variance) / ess / 0.001**2, rel=0.2)


def test_the_configuration_has_the_same_thresholds():
    assert Cycle().gates == GATES
    assert Cycle(min_effective=7.0, max_stages=0).gates == Gates(min_effective=7.0, max_stages=0)


# ------------------------------------------------------------- forward check


def check_of(flow, molecule, frames, n_samples=64, seed=3):
    energy, _ = molecule(frames)
    data = ReferenceData(frames, energy=energy)
    return ForwardCheck.from_frames(
        flow, molecule, data, n_samples, np.random.default_rng(seed), batch_size=8192
    )


def test_a_dropped_mode_is_caught_though_weights_are_even():
    molecule, rng = DoubleWell(), np.random.default_rng(0)
    beads = rng.normal(size=(40, 1, 3))
    flow = WideBackmapper.one_well(molecule)
    samples = reconstruct(flow, molecule, beads, 64, rng)
    variance = label_variance(samples.log_weight, samples.labels)
    assert effective_sample_size(samples.log_weight).mean() > 0.8
    assert set(verdicts(samples.log_weight, variance, GATES)) == {"accept", "more"}
    frames = molecule.sample(beads, rng)
    check = check_of(flow, molecule, frames)
    assert check.n_calls == 40 * 64
    near = check.near(beads, molecule.cg_map.beads, GATES)
    # Frames of the other well, and no others, outweigh all samples together.
    other = frames[:, 1, 0] > frames[:, 0, 0]
    assert 0.1 < other.mean() < 0.9
    np.testing.assert_allclose(near.missed, other.mean())
    assert near.failed(GATES).all()
    failed = near.failed(GATES)
    assert (verdicts(samples.log_weight, variance, GATES, failed) == "restrain").all()
    # Each of the three figures tells alone.
    for gates in (
        Gates(min_forward_ess=0.0, max_surplus=np.inf),
        Gates(max_missed=0.99, max_surplus=np.inf),
        Gates(max_missed=0.99, min_forward_ess=0.0),
    ):
        assert near.failed(gates).all()


@pytest.mark.parametrize(("shift", "bend"), [(0.0, 0.0), (0.2, 0.05), (0.35, 0.1)])
def test_false_alarms_of_a_flow_that_drops_nothing(shift, bend):
    """Effective sample sizes of 1, 0.6 and 0.2."""
    molecule, rng = LinearGaussian(), np.random.default_rng(4)
    flow = GaussianBackmapper(molecule, shift=shift, bend=bend)
    frames = molecule.sample(300, rng)
    check = check_of(flow, molecule, frames)
    alone = [
        ForwardCheck(**{k: v[i : i + 1] if np.ndim(v) else v for k, v in vars(check).items()})
        for i in range(300)
    ]
    topology = molecule.cg_map.beads
    single = [one.near(one.beads, topology, GATES).failed(GATES)[0] for one in alone]
    assert np.mean(single) < 0.02
    together = check.near(check.beads, topology, GATES)
    assert together.n_frames.min() >= 1
    assert not together.failed(GATES).any()
    # The log-weights of frames are those expected: no surplus, whatever the flow.
    surplus = (check.excess - check.expected).mean()
    assert abs(surplus) < 4 * np.sqrt(check.variance.mean() / 300) + 0.05


def test_each_state_is_judged_by_the_frames_near_it(ala2_beads, ala2_map):
    """Frames of one half of the torsions are missed; far from all, nothing is known."""
    from ccg_ase.torsion_map import dihedral_angles

    topology = ala2_map.beads
    phi, psi = dihedral_angles(ala2_beads, topology.dihedrals()).T
    frames, states = np.arange(400) < 300, np.arange(400) >= 300
    there = (phi > 0.3) & (phi < 2.8)
    frames &= np.abs(psi) < 2.0
    n = frames.sum()
    check = ForwardCheck(
        ala2_beads[frames], np.where(there[frames], 9.0, 0.1), np.zeros(n), np.full(n, 0.1), 64, 0
    )
    found = check.near(ala2_beads[states], topology, GATES)
    failed, unchecked = found.failed(GATES), found.unchecked
    assert 0.1 < unchecked.mean() < 0.6
    far = np.abs(psi[states]) > 2.7
    assert unchecked[far].all()
    assert not failed[unchecked].any()
    inside = (phi[states] > 0.9) & (phi[states] < 2.2) & ~unchecked
    outside = (phi[states] < -0.4) & (phi[states] > -2.8) & ~unchecked
    assert failed[inside].all()
    assert not failed[outside].any()
    assert inside.sum() > 5
    assert outside.sum() > 5


def test_weights_that_are_nearly_all_zero_overflow_without_a_warning():
    log_weight = np.concatenate([[0.0], np.full(63, -212.0)])[None]
    assert 0 < cautious_ess(log_weight)[0] < 1e-300
    assert needed_samples(log_weight, np.array([100.0]), Gates())[0] == np.inf
    assert verdicts(log_weight, np.array([100.0]), Gates())[0] == "restrain"
    assert inflation(log_weight)[0] > 1e200
