"""Samples read back through the MDAnalysis Universe are the samples that the flow made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ccg_mda import Backmapper, backmap, bead_universe
from ccg_mda.potential import OpenMMPotential
from ccg_training.reconstruction import Samples, pull_back, read_samples

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
