"""Labels of every origin against closed forms; budgets; interruption."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from double_well import DoubleWell, WideBackmapper
from linear_gaussian import GaussianBackmapper, LinearGaussian

from ccg_ase.torsion_map import dihedral_angles
from ccg_training.labelling import LabelSettings, label
from ccg_training.labels import Labels
from ccg_training.portions import annealing_calls
from ccg_training.reference import ReferenceData
from ccg_training.restrained_labels import Restraint, correlated_variance
from ccg_training.thresholds import Gates

KINDS = ("plain", "annealed", "restrained", "refused", "skipped")


@pytest.fixture(scope="module")
def molecule():
    return LinearGaussian()


@pytest.fixture(scope="module")
def beads(molecule):
    return molecule.sample_beads(150, np.random.default_rng(1))


class Restrained:
    """Exact draws of p(x|s) at s near the target, one after another alike: what dynamics give."""

    def __init__(self, molecule, n_frames=40, memory=0.0):
        self.molecule, self.n_frames, self.memory, self.targets = molecule, n_frames, memory, []

    def __call__(self, targets, starts, directory, seed):
        molecule, rng = self.molecule, np.random.default_rng(seed)
        self.targets.append((targets, starts))
        root = np.linalg.cholesky(molecule.kT() * np.linalg.inv(molecule.K_rr))
        frames = []
        for target in targets:
            noise = rng.normal(size=len(root))
            for _ in range(self.n_frames):
                fresh = rng.normal(size=len(root))
                noise = self.memory * noise + np.sqrt(1 - self.memory**2) * fresh
                s = target + 0.03 * rng.normal(size=target.shape)
                x = molecule.x0.ravel().copy()
                delta = s.ravel() - x[molecule.bead_dof]
                x[molecule.rest_dof] += molecule.response @ delta + root @ noise
                x[molecule.bead_dof] = s.ravel()
                frames.append(x.reshape(-1, 3))
        energy, forces = molecule(np.array(frames))
        walker = np.repeat(np.arange(len(targets)), self.n_frames)
        return ReferenceData(np.array(frames), forces, energy, walker), 7 * len(targets)


def restraint(molecule, **options):
    frames = molecule.sample(50, np.random.default_rng(3))
    return Restraint(Restrained(molecule, **options), 7, frames)


def run(molecule, flow, beads, folder, *, restraint=None, held_out=None, guess=None, **settings):
    return label(
        flow,
        molecule,
        beads,
        folder,
        LabelSettings(**settings),
        restraint=restraint,
        held_out=held_out,
        guess=guess,
    )


def force_scale(molecule, labels):
    """Root mean square error of mean forces over that of their error bars, components pooled."""
    off = labels.force - molecule.mean_force(labels.beads)
    return np.sqrt((off**2).mean() / labels.force_variance.mean())


def z_scores(molecule, labels):
    """Of F."""
    energy = labels.free_energy - molecule.free_energy(labels.beads)
    return energy / labels.free_energy_variance**0.5


def by_origin(labels, origin):
    return labels[labels.origin == origin]


def assert_calibrated(z, bias=0.1):
    """Intervals of 68 and 95 %, and a bias, in error bars, of at most so much beyond chance."""
    n = len(z)
    assert abs(z.mean()) < bias + 3 / np.sqrt(n)
    for width, level in ((1.0, 0.6827), (1.96, 0.95)):
        covered = (np.abs(z) < width).mean()
        assert abs(covered - level) < 4 * np.sqrt(level * (1 - level) / n) + 0.02


# --------------------------------------------------------------- one origin each


def test_plain_labels_of_good_and_poor_flows_are_calibrated(molecule, beads, tmp_path):
    """Effective sample sizes of 0.8, and of 0.12, where the gate asks for more samples."""
    # From 16 to 32 effective samples ln Z is skew, and stopping where weights look even adds to it:
    # a quarter to a third of an error bar, which the cover of the intervals includes.
    for shift, bend, calls, bias in ((0.1, 0.05, (64, 75), 0.1), (0.4, 0.1, (120, 400), 0.3)):
        flow = GaussianBackmapper(molecule, shift=shift, bend=bend)
        molecule.n_calls = 0
        found = run(molecule, flow, beads, tmp_path / str(shift), gates=Gates(max_stages=0))
        assert found.calls["plain"] == sum(found.calls.values()) == molecule.n_calls
        assert calls[0] <= molecule.n_calls / len(beads) < calls[1]
        assert (found.table["verdict"] == "plain").sum() > 140
        assert set(found.labels.origin) == {"plain"}
        assert_calibrated(z_scores(molecule, found.labels), bias)
        assert force_scale(molecule, found.labels) == pytest.approx(1.0, abs=0.15)
        assert (found.table["n_frames"] == 0).all()  # no held-out frames: unchecked
        energy = found.table["energy"] - molecule.mean_energy(found.table["beads"])
        plain = found.table["verdict"] == "plain"
        assert_calibrated((energy / found.table["energy_error"])[plain], bias)


def test_states_that_plain_weights_can_t_label_are_annealed(molecule, beads, tmp_path):
    flow = GaussianBackmapper(molecule, shift=0.8, scale=1.2, bend=0.1)
    molecule.n_calls = 0
    found = run(molecule, flow, beads[:32], tmp_path)
    assert found.count["annealed"] > 24
    assert found.count["refused"] + found.count["plain"] < 8
    assert sum(found.calls.values()) == molecule.n_calls
    annealed = by_origin(found.labels, "annealed")
    assert_calibrated(z_scores(molecule, annealed))
    assert force_scale(molecule, annealed) == pytest.approx(1.0, abs=0.25)
    assert annealed.free_energy_variance.max() <= molecule.kT() ** 2 / 16
    assert found.calls["annealed"] <= 32 * annealing_calls(64, Gates())
    # The buffer stands for p(x|s): E[U|s] over its frames.
    buffer, table = found.buffer, found.table
    sums = np.bincount(buffer.state, buffer.weight, minlength=32)
    mean = np.bincount(buffer.state, buffer.weight * buffer.energy, minlength=32)[sums > 0]
    truth = molecule.mean_energy(table["beads"])[sums > 0]
    off = mean / sums[sums > 0] - truth
    assert abs(off.mean()) < 4 * off.std() / np.sqrt(len(off))


@pytest.mark.parametrize(("calls_per_state", "kind"), [(2000, "restrained"), (10**6, "annealed")])
def test_the_cheaper_of_annealing_and_dynamics_is_taken(
    molecule, beads, tmp_path, calls_per_state, kind
):
    flow = GaussianBackmapper(molecule, shift=0.8, scale=1.2, bend=0.1)
    tool = replace(restraint(molecule), calls_per_state=calls_per_state)
    found = run(molecule, flow, beads[:4], tmp_path, restraint=tool)
    assert found.count[kind] >= 3
    assert found.calls["annealed" if kind == "restrained" else "restrained"] == 0


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_restrained_frames_give_forces_with_errors_that_know_of_correlation(
    molecule, beads, tmp_path, memory
):
    flow = GaussianBackmapper(molecule, shift=0.8, bend=0.2)
    tool = restraint(molecule, n_frames=80, memory=memory)
    found = run(
        molecule,
        flow,
        beads[:60],
        tmp_path,
        restraint=tool,
        guess=molecule.mean_force,
        gates=Gates(max_stages=0),
    )
    assert found.count["restrained"] > 50
    assert found.calls["restrained"] == 7 * found.count["restrained"]
    labels = by_origin(found.labels, "restrained")
    assert len(labels) == 80 * found.count["restrained"]
    assert np.isnan(labels.free_energy).all()
    # The mean over a run, with what the labels' variances say of it.
    off = (labels.force - molecule.mean_force(labels.beads)).reshape(
        -1, 80, *labels.beads.shape[1:]
    )
    error = np.sqrt(labels.force_variance.reshape(-1, 80).mean(1) / 80)
    z = off.mean(1) / error[:, None, None]
    scale = np.sqrt((off.mean(1) ** 2).mean() / (error**2).mean())
    assert 0.85 < scale < 1.15
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    # Every run starts from the known frame that is nearest.
    targets, starts = tool.run.targets[0]
    known, quads = molecule.cg_map.apply(tool.frames), molecule.cg_map.beads.dihedrals()
    apart = dihedral_angles(known, quads)[:, 0] - dihedral_angles(targets, quads)
    nearest = known[np.argmax(np.cos(apart), axis=1)]
    np.testing.assert_array_equal(molecule.cg_map.apply(starts), nearest)
    frames = found.buffer
    restrained = np.isnan(frames.free_energy)
    assert (frames.weight[restrained] == 1).all()
    energy, forces = molecule(frames.positions)
    np.testing.assert_allclose(frames.energy, energy, atol=1e-9)
    np.testing.assert_allclose(frames.forces, forces, atol=1e-9)
    np.testing.assert_allclose(molecule.cg_map.apply(frames.positions), frames.beads, atol=1e-9)


def test_variance_of_correlated_series():
    """First-order autoregression: the statistical inefficiency is (1 + c)/(1 - c)."""
    rng, c, n = np.random.default_rng(0), 0.8, 2000
    x = np.empty((n, 40))
    x[0] = rng.normal(size=40)
    for i in range(1, n):
        x[i] = c * x[i - 1] + np.sqrt(1 - c**2) * rng.normal(size=40)
    assert correlated_variance(x) == pytest.approx((1 + c) / (1 - c), rel=0.3)
    assert correlated_variance(rng.normal(size=(n, 40))) == pytest.approx(1.0, rel=0.3)


# --------------------------------------------------------------- dropped modes


def test_a_dropped_mode_is_refused_or_restrained_whatever_its_weights_say(tmp_path):
    molecule, rng = DoubleWell(), np.random.default_rng(0)
    beads = rng.normal(size=(40, 1, 3))
    flow = WideBackmapper.one_well(molecule)
    frames = molecule.sample(beads, rng)
    energy, forces = molecule(frames)
    held_out = ReferenceData(frames, forces, energy)
    trusting = run(molecule, flow, beads, tmp_path)
    assert trusting.count["plain"] > 30  # and wrong:
    off = trusting.labels.free_energy - -0.0258520 * molecule.log_partition(trusting.labels.beads)
    assert np.median(np.abs(off) / trusting.labels.free_energy_variance**0.5) > 5
    found = run(molecule, flow, beads, tmp_path, held_out=held_out)
    assert found.count["refused"] == 40
    assert len(found.labels) == len(found.buffer) == 0
    assert found.calls == {"check": 40 * 64, "plain": 40 * 64, "annealed": 0, "restrained": 0}
    assert "refused" in found.told()

    def dynamics(targets, starts, directory, seed):
        x = molecule.sample(np.repeat(targets, 20, axis=0), np.random.default_rng(seed))
        energy, forces = molecule(x)
        return ReferenceData(x, forces, energy, np.repeat(np.arange(len(targets)), 20)), 100

    found = run(
        molecule, flow, beads, tmp_path, held_out=held_out, restraint=Restraint(dynamics, 9, frames)
    )
    assert found.count["restrained"] == 40
    truth = molecule.mean_force_x(beads).mean()
    mean = found.labels.force[:, 0, 0]
    assert abs(mean.mean() - truth) < 4 * mean.std() / np.sqrt(len(mean))


def test_states_whose_restrained_runs_fail_are_refused(molecule, beads, tmp_path):
    """Some of them, or all."""
    flow, gates = GaussianBackmapper(molecule, shift=0.8, bend=0.2), Gates(max_stages=0)
    whole = restraint(molecule)

    def half(targets, starts, directory, seed):
        data, n_calls = whole.run(targets, starts, directory, seed)
        return data[data.walker % 2 == 0], n_calls, np.arange(len(targets)) % 2 == 1

    def nothing(targets, starts, directory, seed):
        return None, 11, np.ones(len(targets), bool)

    for work, restrained in ((half, 4), (nothing, 0)):
        tool = Restraint(work, 7, whole.frames)
        found = run(
            molecule, flow, beads[:8], tmp_path / work.__name__, restraint=tool, gates=gates
        )
        assert found.count["restrained"] == restrained
        assert found.count["refused"] == 8 - restrained
        assert found.calls["restrained"] == (11 if work is nothing else 56)
        assert len(found.labels) == len(found.buffer) == 40 * restrained


# ------------------------------------------------- budgets, interruption, same bits


def mixed(molecule, beads, folder, **options):
    """A flow that is good at some states and poor at others."""
    flow = GaussianBackmapper(molecule, shift=0.15, stretch=0.6, bend=0.05)
    return run(molecule, flow, beads[:40], folder, restraint=restraint(molecule), **options)


def assert_same(one, other):
    assert one.calls == other.calls
    for mine, theirs in (
        (vars(one.labels), vars(other.labels)),
        (vars(one.buffer), vars(other.buffer)),
        (one.table, other.table),
    ):
        assert set(mine) == set(theirs)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_a_rerun_takes_up_where_it_was_killed(molecule, beads, tmp_path):
    held_out = molecule.sample(30, np.random.default_rng(9))
    energy, forces = molecule(held_out)
    options = {"held_out": ReferenceData(held_out, forces, energy), "n_checked": 20, "portion": 8}
    whole = mixed(molecule, beads, tmp_path / "whole", **options)
    assert sum(whole.count[kind] for kind in KINDS) == 40
    assert whole.count["plain"] > 10
    assert whole.calls["check"] == 20 * 64
    files = sorted(p for p in (tmp_path / "whole").iterdir() if p.is_file())
    assert len(files) == 6
    (tmp_path / "broken").mkdir()
    for file in (files[1], files[3], files[5]):
        shutil.copy(file, tmp_path / "broken")
    molecule.n_calls = 0
    again = mixed(molecule, beads, tmp_path / "broken", **options)
    assert 0 < molecule.n_calls < sum(whole.calls.values())
    assert_same(whole, again)
    molecule.n_calls = 0
    assert_same(whole, mixed(molecule, beads, tmp_path / "broken", **options))
    assert molecule.n_calls == 0
    other = mixed(molecule, beads, tmp_path / "broken", seed=1, **options)
    assert molecule.n_calls > 0
    assert not np.array_equal(other.table["free_energy"], whole.table["free_energy"])
    # States and the buffer keep the numbers that they were given.
    np.testing.assert_array_equal(whole.table["beads"], beads[:40])
    weighted = np.isfinite(whole.buffer.free_energy)
    np.testing.assert_array_equal(whole.buffer.beads[weighted], beads[whole.buffer.state[weighted]])


@pytest.mark.parametrize("max_calls", [0, 100, 1500, 6000])
def test_a_budget_ends_labelling_early_and_in_order(molecule, beads, tmp_path, max_calls):
    found = mixed(molecule, beads, tmp_path, max_calls=max_calls, portion=8)
    spent = sum(found.calls.values())
    assert spent <= max_calls
    assert spent > max_calls - 1100 * (max_calls > 1100) - 64
    tried = found.table["verdict"] != "skipped"
    assert tried.sum() <= max_calls // 64
    assert tried.any() == (max_calls >= 64)
    assert (found.table["n_samples"][~tried] == 0).all()
    assert found.figures()["calls"] == spent
    assert ("skipped" in found.told()) == (not tried.all())
    found.labels.save(tmp_path / "labels.npz")
    assert len(Labels.concatenate(found.labels, Labels.load(tmp_path / "labels.npz"))) == 2 * len(
        found.labels
    )


def test_states_are_needed(molecule, tmp_path):
    with pytest.raises(ValueError, match="no state to label"):
        run(molecule, GaussianBackmapper(molecule), np.zeros((0, 4, 3)), tmp_path)
