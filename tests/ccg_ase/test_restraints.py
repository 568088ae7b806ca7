import numpy as np
import pytest
import torch
from ase.geometry import get_angles, get_dihedrals
from wells import Wells

from ccg_ase import (
    AngleRestraint,
    BatchedLangevin,
    DihedralRestraint,
    DistanceRestraint,
    GyrationRestraint,
    PositionRestraint,
    thermal_energy,
)

MASSES = [12.0, 14.0, 15.0, 40.0, 1.0]
KT = thermal_energy(300.0)
SETTINGS = {
    "timestep_fs": 3.0,
    "friction_per_ps": 20.0,
    "dtype": torch.float64,
    "temperature_K": 300.0,
}


@pytest.fixture
def beads():
    return torch.from_numpy(np.random.default_rng(3).normal(scale=2.0, size=(4, 5, 3)))


def angle(frame):
    """Angle of the first three beads in rad by ASE."""
    return np.radians(get_angles(frame[:1] - frame[1], frame[2:3] - frame[1]).item())


def dihedral(frame):
    """Dihedral of the first four beads in rad by ASE."""
    return np.radians(get_dihedrals(*np.diff(frame[:4], axis=0)[:, None]).item())


VALUES = {
    "distance": (
        lambda *k: DistanceRestraint([0, 3], *k),
        lambda frame: np.linalg.norm(frame[3] - frame[0]),
    ),
    "angle": (
        lambda *k: AngleRestraint([0, 1, 2], *k),
        angle,
    ),
    "dihedral": (lambda *k: DihedralRestraint([0, 1, 2, 3], *k), dihedral),
    "gyration": (
        lambda *k: GyrationRestraint(range(5), MASSES, *k),
        lambda frame: np.sqrt(
            np.average(((frame - np.average(frame, 0, MASSES)) ** 2).sum(1), weights=MASSES)
        ),
    ),
    "position": (
        lambda centre, *k: PositionRestraint([2], [[centre, 0.0, 0.0]], *k),
        lambda frame: np.linalg.norm(frame[2] - [0.7, 0, 0]) + 0.7,
    ),
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("half_width", [0.0, 0.5])
def test_energy_and_forces(beads, kind, half_width):
    """½ k max(|ξ - ξ₀| - w, 0)² of a value calculated otherwise; forces by finite differences."""
    make, value = VALUES[kind]
    restraint = make(0.7, 3.0, half_width)
    deviation = np.array([value(frame) for frame in beads.numpy()]) - 0.7
    if kind == "dihedral":
        deviation = np.angle(np.exp(1j * deviation))
    expected = 1.5 * np.clip(np.abs(deviation) - half_width, 0, None) ** 2
    np.testing.assert_allclose(restraint(beads), expected, rtol=1e-10, atol=1e-12)
    assert expected.max() > 0
    assert torch.autograd.gradcheck(restraint, (beads.clone().requires_grad_(),))


def test_dihedral_is_periodic(beads):
    """Across the cut at π the energy is that of the shorter way."""
    value = dihedral(beads[0].numpy())
    for turns in (-1, 0, 1, 2):
        restraint = DihedralRestraint([0, 1, 2, 3], value + 0.1 + 2 * np.pi * turns, 2.0)
        assert restraint(beads)[0] == pytest.approx(0.01, rel=1e-9)


def test_several_values_and_windows(beads):
    """Values add up; a centre per replica is that replica's alone."""
    pairs = [[0, 1], [1, 2]]
    both = DistanceRestraint(pairs, [1.0, 2.0], [3.0, 4.0])(beads)
    alone = [
        DistanceRestraint(p, c, k)(beads) for p, c, k in zip(pairs, (1, 2), (3, 4), strict=True)
    ]
    torch.testing.assert_close(both, sum(alone))
    centres = np.arange(4.0)[:, None]
    windows = DistanceRestraint([0, 1], centres, 3.0)(beads)
    for k in range(4):
        assert windows[k] == DistanceRestraint([0, 1], k, 3.0)(beads)[k]


def test_umbrella_moments():
    """A spring between two beads and a restraint on their z positions: a Gaussian known in full."""
    wells = Wells(300)
    k, centre = 2.0, 1.5
    height = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

    def pull(beads):  # any callable will do
        return 0.5 * k * ((beads[:, 1] - beads[:, 0]) @ height - centre) ** 2

    sampler = BatchedLangevin(wells, **SETTINGS, seed=0, restraints=[pull])
    sampler.run(np.zeros((300, 2, 3)), 200, every=200)
    frames = sampler.run(None, 2000, every=10)
    z = (frames.beads[:, :, 1] - frames.beads[:, :, 0]) @ height.numpy()
    stiffness = wells.stiffness + k
    error = z.mean(0).std() / np.sqrt(z.shape[1])
    assert abs(z.mean() - k * centre / stiffness) < 4 * error
    assert error < 0.002
    assert z.var() == pytest.approx(KT / stiffness, rel=0.02)
    np.testing.assert_allclose(frames.restraint_energies, 0.5 * k * (z - centre) ** 2, rtol=1e-9)
    bonds = np.linalg.norm(frames.beads[:, :, 1] - frames.beads[:, :, 0], axis=-1)
    np.testing.assert_allclose(frames.energies, 0.5 * wells.stiffness * bonds**2, rtol=1e-9)


def test_printed():
    restraint = DistanceRestraint([0, 9], centre=10.0, stiffness=0.1)
    text = "DistanceRestraint(centre=10.0, stiffness=0.1, half_width=0.0, sites=[[0, 9]])"
    assert repr(restraint) == text


def test_refuses(beads):
    for make, reason in (
        (lambda: DistanceRestraint([0, 1, 2], 1.0, 1.0), "takes 2 beads"),
        (lambda: DistanceRestraint([0, 0], 1.0, 1.0), "different beads"),
        (lambda: DistanceRestraint([0, -1], 1.0, 1.0), "different beads"),
        (lambda: DistanceRestraint([0, 1], np.nan, 1.0), "centre of a restraint must be finite"),
        (lambda: DistanceRestraint([0, 1], 1.0, -1.0), "stiffness of a restraint can't be neg"),
        (lambda: PositionRestraint([0, 1], np.zeros((1, 3)), 1.0), "reference must have shape"),
        (lambda: GyrationRestraint([0, 1], [1.0], 1.0, 1.0), "each with a positive mass"),
        (lambda: DistanceRestraint([0, 7], 1.0, 1.0)(beads), "holds bead 7, but there are 5"),
    ):
        with pytest.raises(ValueError, match=reason):
            make()
    total = BatchedLangevin(Wells(2), **SETTINGS, seed=0, restraints=[lambda x: x.sum()])
    with pytest.raises(ValueError, match="one energy per replica"):
        total.run(np.zeros((2, 2, 3)), 1)
