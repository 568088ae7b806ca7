"""The force field learns a free energy that is known in closed form, from noisy labels."""

import numpy as np
import pytest
import torch
from linear_gaussian import GaussianBackmapper, LinearGaussian

from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.labels import Labels
from ccg_training.reconstruction import pull_back_frames, reconstruct

KT = thermal_energy(300.0)
ZERO = -12345.6  # eV, as large as absolute energies are
QUICK = {"batch_size": 64, "learning_rate": 2e-2, "evaluate_every": 50}


def chains(n, rng):
    """Four beads with fluctuating bonds and angles and any dihedral, (n, 4, 3)."""
    r, theta = rng.normal(3.8, 0.05, (n, 3, 1)), rng.normal(1.9, 0.06, (n, 2, 1))
    phi = rng.uniform(-np.pi, np.pi, (n, 1))
    x = np.zeros((n, 4, 3))
    x[:, 1] = r[:, 0] * [1, 0, 0]
    in_plane = np.concatenate([-np.cos(theta[:, 0]), np.sin(theta[:, 0])], 1)
    x[:, 2, :2] = x[:, 1, :2] + r[:, 1] * in_plane
    along = (x[:, 2] - x[:, 1]) / r[:, 1]
    up = np.array([0.0, 0, 1])
    across = np.cross(up, along)
    turn = np.cos(phi) * across + np.sin(phi) * up
    x[:, 3] = x[:, 2] + r[:, 2] * (-np.cos(theta[:, 1]) * along + np.sin(theta[:, 1]) * turn)
    return x


def exact(x):
    """F(s) in eV: stiff bonds and angles, and a chiral double well in the dihedral."""
    b = x[..., 1:, :] - x[..., :-1, :]
    r = b.norm(dim=-1)
    cosine = -(b[..., 1:, :] * b[..., :-1, :]).sum(-1) / (r[..., 1:] * r[..., :-1])
    n = torch.linalg.cross(b[..., :-1, :], b[..., 1:, :])
    sine = r[..., 1] * (b[..., 0, :] * n[..., 1, :]).sum(-1)
    phi = torch.atan2(sine, (n[..., 0, :] * n[..., 1, :]).sum(-1))
    torsion = 2 * torch.cos(2 * phi) + torch.sin(phi) - 0.7 * torch.cos(phi)
    stretch = ((r - 3.8) / 0.05).square().sum(-1) / 2
    bend = ((cosine - np.cos(1.9)) / 0.06).square().sum(-1) / 2
    return KT * (stretch + bend + torsion)


def truth(n, seed):
    x = torch.tensor(chains(n, np.random.default_rng(seed)), requires_grad=True)
    energy = exact(x)
    force = -torch.autograd.grad(energy.sum(), x)[0]
    return x.detach().numpy(), force.numpy(), energy.detach().numpy() + ZERO


def noisy(n, seed, force_sd=0.05, energy_sd=0.2 * KT):
    """Labels of known noise, `force_sd` in eV/Å, one number or one per state."""
    x, force, energy = truth(n, seed)
    rng = np.random.default_rng((seed, 1))
    force_sd = np.broadcast_to(force_sd, n)
    force = force + force_sd[:, None, None] * rng.normal(size=force.shape)
    energy = energy + energy_sd * rng.normal(size=n)
    return Labels(x, force, force_sd**2, energy, np.full(n, energy_sd**2))


def fresh(**sizes):
    atoms = Topology(
        names=("A", "B", "C", "D"), masses=np.full(4, 40.0), bonds=[(0, 1), (1, 2), (2, 3)]
    )
    cg_map = CGMap.from_slices(atoms, range(4))
    beads = chains(500, np.random.default_rng(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ForceField.from_data(cg_map, 300.0, beads, channels=4, **sizes)


def errors(force_field):
    """Root-mean-square errors of force (eV/Å) and of F up to a constant (kT) at new states."""
    x, force, energy = truth(400, 99)
    F, f = force_field.energy_and_forces(torch.from_numpy(x))
    return np.sqrt(((f.numpy() - force) ** 2).mean()), (F.numpy() - energy).std() / KT


def test_recovers_a_known_free_energy():
    force_field = fresh()
    before = errors(force_field)
    seen = []
    result = fit_force_field(
        force_field,
        *noisy(1000, 1).split(0.2, seed=0),
        FitSettings(steps=300, **QUICK),
        progress=lambda *call: seen.append(call),
    )
    force_error, energy_error = errors(force_field)
    assert force_error < 0.012 < 0.3 * before[0]
    assert energy_error < 0.1 < 0.1 * before[1]
    # What it reports about itself is true.
    assert result["loss_noise"] < result["loss"] < 1.08 * result["loss_noise"]
    assert result["force_noise"] == pytest.approx(0.05, rel=1e-4)
    assert result["force_error"] < max(2 * force_error, result["force_resolution"])
    assert result["free_energy_rmse_kT"] == pytest.approx(0.2, abs=0.06)
    assert 0.9 < result["prior_explains"] < result["model_explains"]
    assert result["model_explains"] == pytest.approx(1, abs=2e-3)
    x, _, energy = truth(400, 98)
    F = force_field(torch.from_numpy(x)).detach().numpy() + result["shift_eV"]
    assert np.mean(F - energy) == pytest.approx(0, abs=0.05 * KT)
    assert [(step, total) for step, total, _ in seen] == [(k, 300) for k in range(50, 301, 50)]
    assert seen[-1][2]["loss"] == result["loss"]


def test_same_seed_same_result_and_nothing_global():
    before = torch.random.get_rng_state(), torch.get_default_dtype()
    runs = []
    for seed in (0, 0, 1):
        force_field = fresh().double()
        result = fit_force_field(
            force_field,
            *noisy(200, 2).split(0.2, seed=0),
            FitSettings(steps=20, seed=seed, batch_size=32, evaluate_every=5),
        )
        runs.append((result, force_field.state_dict()))
        assert all(p.dtype == torch.float64 for p in force_field.parameters())
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][key], runs[1][1][key]) for key in runs[0][1])
    assert runs[0][0] != runs[2][0]
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == torch.get_default_dtype()


def test_inverse_variance_pays():
    """Half the labels are precise, half nearly useless; it helps to know which."""
    odd = np.arange(600) % 2
    force_sd, energy_sd = np.where(odd, 0.03, 1.5), np.where(odd, 0.05, 3.0) * KT
    told = noisy(600, 3, force_sd, energy_sd)
    untold = Labels(
        told.beads,
        told.force,
        np.full(600, (force_sd**2).mean()),
        told.free_energy,
        np.full(600, (energy_sd**2).mean()),
    )
    found = []
    for labels in (told, untold):
        force_field = fresh()
        fit_force_field(force_field, labels, noisy(100, 4), FitSettings(steps=100, **QUICK))
        found.append(errors(force_field))
    assert found[0][0] < 0.5 * found[1][0]
    assert found[0][1] < 0.5 * found[1][1]


def test_free_energies_are_optional():
    labels = noisy(100, 5)
    bare = Labels(labels.beads, labels.force, labels.force_variance)
    mixed = Labels.concatenate(bare, labels)
    assert np.isnan(mixed.free_energy).sum() == 100
    settings = FitSettings(steps=3, batch_size=16, evaluate_every=1)
    result = fit_force_field(fresh(), bare, bare, settings)
    assert np.isfinite(result["loss"])
    assert np.isnan(result["free_energy_rmse_kT"])
    assert np.isnan(result["shift_eV"])
    assert np.isfinite(list(fit_force_field(fresh(), mixed, labels, settings).values())).all()


def test_stops_early_and_keeps_the_best():
    labels = noisy(100, 6)
    against = Labels(labels.beads, -labels.force, labels.force_variance)
    force_field = fresh()
    start = {key: value.clone() for key, value in force_field.state_dict().items()}
    settings = FitSettings(steps=100, batch_size=16, evaluate_every=2, patience=3)
    # Labels of opposite sign: whatever is learned makes the held-out loss worse.
    only_prior = force_field.prior(torch.from_numpy(labels.beads).float()).detach()
    result = fit_force_field(force_field, labels, against, settings)
    assert result["steps"] < 100
    assert result["best_step"] <= result["steps"] - 6
    if result["best_step"] == 0:
        assert all(torch.equal(start[key], v) for key, v in force_field.state_dict().items())
        energy = force_field(torch.from_numpy(labels.beads).float()).detach()
        torch.testing.assert_close(energy, only_prior)


def test_zero_steps_only_evaluate():
    labels = noisy(60, 7)
    result = fit_force_field(fresh(), labels, labels, FitSettings(steps=0))
    assert result["steps"] == result["best_step"] == 0
    assert result["model_explains"] == pytest.approx(result["prior_explains"])


def test_bad_labels_are_refused():
    labels = noisy(20, 8)
    with pytest.raises(ValueError, match="4 beads"):
        fit_force_field(fresh(), labels[:0], labels)
    with pytest.raises(ValueError, match="4 beads"):
        fit_force_field(fresh(), labels, Labels(np.zeros((2, 3, 3)), np.zeros((2, 3, 3)), [1, 1]))
    far_off = Labels(labels.beads, labels.force + 1e30, labels.force_variance)
    with pytest.raises(FloatingPointError, match="learning rate"):
        fit_force_field(fresh(), far_off, labels, FitSettings(steps=2))
    beads, force, variance = labels.beads, labels.force, labels.force_variance
    for arguments, message in (
        ((beads, force[:, :3], variance), "both be"),
        ((beads, force, variance[:3]), "shape"),
        ((beads, force * np.nan, variance), "finite"),
        ((beads, force, -variance), "negative"),
        ((beads, force, variance, variance), "needs its variance"),
    ):
        with pytest.raises(ValueError, match=message):
            Labels(*arguments)


# ---------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def molecule():
    return LinearGaussian()


def test_labels_from_samples_and_frames(molecule):
    flow = GaussianBackmapper(molecule, shift=0.1, scale=1.05, bend=0.05)
    rng = np.random.default_rng(9)
    samples = reconstruct(flow, molecule, molecule.sample_beads(150, rng), 48, rng)
    labels = Labels.from_samples(samples)
    assert set(labels.origin) == {"plain"}
    sd = np.sqrt(labels.force_variance)[:, None, None]
    z = (labels.force - molecule.mean_force(labels.beads)) / sd
    assert z.std() == pytest.approx(1, abs=0.1)
    z = labels.free_energy - molecule.free_energy(labels.beads)
    assert (z / labels.free_energy_variance**0.5).std() == pytest.approx(1, abs=0.2)
    assert len(Labels.from_samples(samples[np.arange(150) < 7])) == 7

    frames = molecule.sample(40, rng)
    single = Labels.from_frames(pull_back_frames(flow, frames, *molecule(frames)), 0.01)
    np.testing.assert_allclose(single.force_variance, 0.01)
    assert np.isnan(single.free_energy).all()
    together = Labels.concatenate(labels, single)
    assert list(together.origin) == ["plain"] * 150 + ["frame"] * 40


def test_labels_on_disk_and_split(tmp_path):
    labels = noisy(30, 10)
    labels.save(tmp_path / "labels.npz")
    again = Labels.load(tmp_path / "labels.npz")
    np.testing.assert_array_equal(again.beads, labels.beads)
    np.testing.assert_array_equal(again.free_energy_variance, labels.free_energy_variance)
    np.testing.assert_array_equal(again.origin, labels.origin)
    train, held_out = labels.split(0.2, seed=3)
    assert (len(train), len(held_out)) == (24, 6)
    together = np.concatenate([train.free_energy, held_out.free_energy])
    np.testing.assert_array_equal(np.sort(together), np.sort(labels.free_energy))
