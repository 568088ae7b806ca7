"""Which states a turn labels: of torsions, and of beads."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from known_torsions import KT, labels, true_F

from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import dihedral_angles
from ccg_training import new_labels
from ccg_training.config_loop import Cycle
from ccg_training.sampling import write_dcd
from ccg_training.torsion_surface import TorsionSurface


@pytest.fixture(autouse=True)
def _fewer_candidates(monkeypatch):
    monkeypatch.setattr(new_labels, "_CANDIDATES", 800)


@pytest.fixture(scope="module")
def frames():
    """Torsions of one basin, and one in a hundred of another."""
    rng = np.random.default_rng(0)
    frames = np.array([-1.5, 1.0]) + 0.3 * rng.normal(size=(2000, 2))
    frames[::100] = np.array([1.2, -2.0]) + 0.1 * rng.normal(size=(20, 2))
    return frames


@pytest.fixture(scope="module")
def known():
    """A surface of which nothing is known around φ = 0."""
    some = labels(60, 2)
    return TorsionSurface(some[np.abs(some.beads[:, 0]) > 1.0], 300.0)


def chosen(frames, known, k=1, **settings):
    workspace = SimpleNamespace(
        config=SimpleNamespace(cycle=Cycle(**{"n_states": 24} | settings)),
        cg_map=SimpleNamespace(apply=lambda positions: positions),
        data=(SimpleNamespace(positions=frames), None),
        seed=lambda *what: int("".join(map(str, what))),
    )
    return new_labels._torsion_states(workspace, k, known)


def are_frames(states, frames):
    return (states[:, None] == frames).all(-1).any(1)


def test_a_surface_sends_its_share_to_where_least_is_known(frames, known):
    states = chosen(frames, known, diverse=0.2, uncertain=0.3, highest_kT=100.0)
    assert states.shape == (24, 2)
    np.testing.assert_array_equal(are_frames(states, frames), np.arange(24) < 12)
    assert len(np.unique(states, axis=0)) == 24
    assert np.abs(states[12:17, 0]).max() < 1.0  # and then the rest is known no better
    assert np.abs(states).max() <= np.pi
    np.testing.assert_array_equal(
        states, chosen(frames, known, diverse=0.2, uncertain=0.3, highest_kT=100.0)
    )
    other = chosen(frames, known, k=2, diverse=0.2, uncertain=0.3, highest_kT=100.0)
    assert not are_frames(other, states).any()


def test_new_states_lie_below_the_limit(frames, known):
    states = chosen(frames, known, uncertain=1.0, diverse=0.0, highest_kT=3.0)
    assert not are_frames(states, frames).any()
    F, deviation = known.free_energy(states)
    grid = np.random.default_rng(1).uniform(-np.pi, np.pi, (2000, 2))
    lowest = known.free_energy(grid)[0].min()
    assert ((F - 2 * deviation - lowest) / KT).max() < 3.2  # the lowest candidate is a bit higher
    assert true_F(states).max() < true_F(grid).min() + 5 * KT < true_F(grid).max()


def test_frames_serve_by_population_where_nothing_else_is_wanted(frames, known):
    states = chosen(frames, known, uncertain=0.0, diverse=0.0, n_states=200)
    assert are_frames(states, frames).all()
    assert np.mean(states[:, 0] > 0.5) < 0.04


def test_without_a_surface_they_are_frames_and_some_of_them_far_from_all_others(frames):
    states = chosen(frames, None, n_states=40)
    assert states.shape == (40, 2)
    assert are_frames(states, frames).all()
    assert np.mean(states[:, 0] > 0.5) > 0.05
    np.testing.assert_array_equal(states, chosen(frames, None, n_states=40))
    assert len(chosen(frames[:10], None)) == 10


@pytest.fixture
def visited(tmp_path):
    """Four beads: an ensemble around φ = 0, and turned all round; some of these fell apart."""
    rng = np.random.default_rng(0)

    def frames(phi):
        x = np.zeros((len(phi), 4, 3))
        x[:, 0], x[:, 2] = [0, 3.0, 0], [4.0, 0, 0]
        x[:, 3] = np.stack([4 + 0 * phi, 3 * np.cos(phi), 3 * np.sin(phi)], 1)
        return x + 0.05 * rng.normal(size=x.shape)

    known, ensemble = frames(0.3 * rng.normal(size=500)), frames(0.3 * rng.normal(size=400))
    turned = frames(np.linspace(-np.pi, np.pi, 300))
    turned[::10, 3] += 3.0
    folder = tmp_path / "iteration_1" / "dynamics"
    folder.mkdir(parents=True)
    for name, part in {"beads": ensemble, "turned": turned}.items():
        write_dcd(folder / f"{name}.dcd", part[:, None], 1.0)
    topology = Topology(names="ABCD", masses=[40.0] * 4, bonds=[(0, 1), (1, 2), (2, 3)])
    return known, CGMap.from_slices(topology, range(4)), tmp_path


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_hill_that_was_never_seen_is_tried(visited, share, monkeypatch):
    """A force field that has states beyond 90° high up: only the unknown share goes there."""
    known, cg_map, folder = visited
    force_field = ForceField.from_data(cg_map, 300.0, known, channels=2, l_max=0, n_layers=1)
    bonds, dihedral = cg_map.beads.bonds.T, cg_map.beads.dihedrals()

    def phi(beads):
        return np.abs(dihedral_angles(beads, dihedral)[:, 0])

    monkeypatch.setattr(
        new_labels, "bead_energies", lambda _, x: (np.where(phi(x) > 1.57, 9, 0), 0)
    )
    workspace = SimpleNamespace(
        config=SimpleNamespace(cycle=Cycle(n_states=40, unknown=share)),
        cg_map=SimpleNamespace(beads=cg_map.beads, apply=lambda positions: positions),
        data=(SimpleNamespace(positions=known), None),
        temperature_K=300.0,
        iteration=lambda k: folder / f"iteration_{k}",
        seed=lambda *what: 1,
    )
    stage = SimpleNamespace(note="", update=lambda **_: None)
    states = new_labels._states(workspace, stage, 1, force_field)
    high = np.sort(dihedral_angles(states, dihedral)[phi(states) > 1.57, 0] % (2 * np.pi))
    assert (len(states), len(high)) == (40, 40 * share)
    if share:
        assert np.diff(high).max() < 0.7  # evenly, of half the circle
        lengths = np.linalg.norm(states[:, bonds[0]] - states[:, bonds[1]], axis=-1)
        assert lengths[phi(states) > 1.57].max() < 4.6
