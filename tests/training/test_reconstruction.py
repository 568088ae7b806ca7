"""Samples read back through the MDAnalysis Universe are the samples that the flow made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ccg_ase import CGMap, TorsionMap
from ccg_ase.units import thermal_energy
from ccg_mda import Backmapper, backmap, bead_universe
from ccg_mda.potential import OpenMMPotential
from ccg_training.estimators import label_variance
from ccg_training.labels import Labels
from ccg_training.reconstruction import (
    Samples,
    pull_back,
    pull_back_frames,
    read_samples,
    reconstruct,
)

PDB = Path(__file__).parent.parent / "data" / "alanine_dipeptide.pdb"


@pytest.fixture(scope="module")
def samples_of_both_ways(ala2_map, ala2_positions):
    """Four bead states, three samples each, through the Universe and directly."""
    rng = np.random.default_rng(0)
    frames = ala2_positions - ala2_positions.mean(0) + rng.normal(scale=0.02, size=(60, 22, 3))
    flow = Backmapper.from_data(ala2_map, 300.0, torch.from_numpy(frames), width=8, hops=3)
    potential = OpenMMPotential.from_pdb(PDB, ["amber96.xml", "amber96_obc.xml"])
    beads = ala2_map.apply(frames[:4]).astype(np.float32)
    atoms = backmap(bead_universe(beads, ala2_map), flow, n_samples=3, seed=5, potential=potential)
    read = read_samples(atoms, flow, 3)
    noise = torch.stack(
        [
            torch.stack([flow.sample_noise(np.random.default_rng([5, s, k])) for s in range(4)])
            for k in range(3)
        ]
    )
    return read, pull_back(flow, potential, beads, noise)


@pytest.mark.parametrize(
    ("name", "rtol", "atol"),
    [
        ("beads", 0, 1e-6),
        ("positions", 0, 1e-5),
        ("energy", 0, 1e-9),
        ("log_prob", 0, 1e-9),
        ("forces", 1e-6, 1e-5),
        ("labels", 1e-4, 1e-3),
        ("log_weight", 0, 1e-6),
    ],
)
def test_universe_and_direct_samples_agree(samples_of_both_ways, name, rtol, atol):
    read, direct = (getattr(samples, name) for samples in samples_of_both_ways)
    assert read.shape == direct.shape
    np.testing.assert_allclose(read, direct, rtol=rtol, atol=atol)


def test_samples_survive_their_file(samples_of_both_ways, tmp_path):
    read, _ = samples_of_both_ways
    read.save(tmp_path / "samples.npz")
    loaded = Samples.load(tmp_path / "samples.npz")
    for name in ("beads", "positions", "forces", "energy", "log_prob", "labels", "n_calls"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(read, name))
    assert loaded.cg_map == read.cg_map
    assert loaded.temperature_K == read.temperature_K


GROUPS = [range(6), (6, 7, 8, 9, 14, 15), (10, 11, 12, 13), range(16, 22)]
TORSIONS = [[4, 6, 8, 14], [6, 8, 14, 16]]


@pytest.fixture(scope="module")
def frames(ala2_positions) -> np.ndarray:
    """Forty frames near one structure, (40, 22, 3)."""
    noise = np.random.default_rng(0).normal(scale=0.02, size=(40, 22, 3))
    return ala2_positions - ala2_positions.mean(0) + noise


@pytest.fixture(scope="module")
def potential() -> OpenMMPotential:
    return OpenMMPotential.from_pdb(PDB, ["amber96.xml", "amber96_obc.xml"])


@pytest.fixture(scope="module", params=["mass", "geometry", "atoms of no bead", "torsions"])
def flow(request, ala2_topology, frames) -> Backmapper:
    cg_map = {
        "mass": lambda: CGMap.from_groups(ala2_topology, GROUPS),
        "geometry": lambda: CGMap.from_groups(ala2_topology, GROUPS, weighting="geometry"),
        "atoms of no bead": lambda: CGMap.from_groups(ala2_topology, [[1, 4], [8], [16, 18]]),
        "torsions": lambda: TorsionMap(ala2_topology, TORSIONS, ("phi", "psi")),
    }[request.param]()
    return Backmapper.from_data(cg_map, 300.0, torch.from_numpy(frames), width=8)


def test_labels_are_the_slope_of_the_log_weight_at_fixed_noise(flow, potential, frames):
    """Against central differences of -kT ln w = U + kT ln q, for every kind of map."""
    states, step, kt = flow.cg_map.apply(frames[:2]), 1e-4, thermal_energy(300.0)
    noise = flow.sample_noise(np.random.default_rng(1), (3, 2))
    samples = pull_back(flow, potential, states, noise, batch_size=4)
    assert samples.labels.shape == (2, 3, *flow.cg_map.coarse_shape)
    direction = np.random.default_rng(2).normal(size=states.shape)
    ahead, behind = (
        pull_back(flow, potential, states + sign * step * direction, noise).log_weight
        for sign in (1, -1)
    )
    axes = tuple(range(2, samples.labels.ndim))
    slope = (samples.labels * direction[:, None]).sum(axes)
    np.testing.assert_allclose(slope, kt * (ahead - behind) / (2 * step), rtol=2e-4, atol=2e-4)


def test_frames_are_labelled_wherever_they_lie_and_however_they_are_turned(flow, potential, frames):
    """Labels of beads turn with the molecule, labels of torsions don't change."""
    energy, forces = potential(frames[:5])
    turn = Rotation.random(random_state=0).as_matrix()
    plain = pull_back_frames(flow, frames[:5], energy, forces)
    turned = pull_back_frames(flow, frames[:5] @ turn.T + 3.0, energy, forces @ turn.T)
    by_torsions = isinstance(flow.cg_map, TorsionMap)
    expected = plain.labels if by_torsions else plain.labels @ turn.T
    np.testing.assert_allclose(turned.labels, expected, atol=1e-7)
    np.testing.assert_allclose(turned.log_weight, plain.log_weight, atol=1e-7)
    # The noise of a frame, with the potential called anew, gives the same label.
    x = torch.from_numpy(plain.positions[:, 0])
    noise = flow(flow.cg_map.apply(x)).noise_from(x)
    anew = pull_back(flow, potential, plain.beads, noise[None])
    np.testing.assert_allclose(anew.labels, plain.labels, atol=1e-6)
    np.testing.assert_allclose(anew.forces, plain.forces, atol=1e-6)


def test_labels_of_any_map_can_be_averaged_saved_and_joined(flow, potential, frames, tmp_path):
    states = flow.cg_map.apply(frames[:3])
    rng = np.random.default_rng(0)
    parts = [reconstruct(flow, potential, states[k : k + 1], 4, rng) for k in range(3)]
    whole = Samples.concatenate(*parts)
    assert whole.n_calls == 12
    twice = whole[np.array([2, 0])].with_more(parts[2].with_more(parts[2])[[0, 0]])
    assert twice.n_calls == twice.energy.size == 24
    np.testing.assert_array_equal(twice.energy[0], np.tile(parts[2].energy[0], 3))
    np.testing.assert_array_equal(twice.beads[0], states[2])
    whole.save(tmp_path / "samples.npz")
    assert Samples.load(tmp_path / "samples.npz").cg_map == flow.cg_map
    labels = Labels.from_samples(whole)
    assert labels.force.shape == (3, *flow.cg_map.coarse_shape)
    assert label_variance(whole.log_weight, whole.labels).shape == (3,)
    labels.save(tmp_path / "labels.npz")
    np.testing.assert_array_equal(Labels.load(tmp_path / "labels.npz").force, labels.force)


def test_states_must_fit_the_map(flow, potential):
    noise = flow.sample_noise(np.random.default_rng(1), (3, 2))
    with pytest.raises(ValueError, match="need states"):
        pull_back(flow, potential, np.zeros((2, 7, 3)), noise)
