"""Plain forces take over where labels through the flow are noisier, and are as unbiased."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from exact_flows import CHAIN, TEMPERATURE_K, flow_of, frames_of, perturbed, structures

from ccg_ase import save_model
from ccg_training.force_field_stages import label_frames
from ccg_training.labels import FORCE, FRAME, Labels
from ccg_training.plain_forces import plain_forces
from ccg_training.reference import ReferenceData
from ccg_training.restrained_labels import label_run

N = 600


@pytest.fixture(scope="module")
def flow():
    return flow_of(CHAIN)


@pytest.fixture(scope="module")
def poor(flow):
    return perturbed(flow, 0.2, 8)


@pytest.fixture(scope="module")
def frames(flow):
    return frames_of(flow, flow.cg_map.apply(structures(CHAIN, N, 6)), 7)


def test_a_restrained_run_has_the_labels_of_less_noise(flow, poor, frames):
    one = np.repeat(flow.cg_map.apply(structures(CHAIN, 1, 2)), N, axis=0)
    run = frames_of(flow, one, 9)
    data = ReferenceData(run.positions, run.forces, run.energy)
    force_map = plain_forces(poor, frames.forces)
    (through, _), (plain, buffer) = (
        label_run(poor, data, np.zeros_like, 0, given) for given in (None, force_map)
    )
    assert plain.force_variance[0] < 0.5 * through.force_variance[0]
    error = plain.force.std(0) / np.sqrt(N)
    z = (plain.force.mean(0) - run.bead_force[0]) / error
    assert np.abs(z).max() < 4
    assert (z**2).mean() < 2.5
    np.testing.assert_allclose(buffer.bead_force[0], plain.force.mean(0), atol=1e-12)
    # The exact flow has labels without any noise.
    exact, _ = label_run(flow, data, np.zeros_like, 0, force_map)
    np.testing.assert_allclose(exact.force, run.bead_force, atol=1e-8)


@pytest.mark.parametrize("which", ["flow", "poor"])
def test_stored_frames_have_the_labels_of_less_noise(which, flow, poor, frames, tmp_path):
    model = {"flow": flow, "poor": poor}[which]
    parts = {"backmapper": model}
    save_model(tmp_path / "flow.ccg", cg_map=flow.cg_map, temperature_K=TEMPERATURE_K, parts=parts)
    walker = np.arange(N) * 25 // N
    workspace = SimpleNamespace(
        data=(ReferenceData(frames.positions, frames.forces, frames.energy, walker), None),
        config=SimpleNamespace(cycle=SimpleNamespace(n_frame_labels=200)),
        iteration=lambda k: tmp_path,
        by_torsions=False,
        device="cpu",
        temperature_K=TEMPERATURE_K,
        cg_map=flow.cg_map,
    )
    figures = label_frames(workspace, SimpleNamespace(update=lambda *a, **k: None), 0)
    labels = Labels.load(tmp_path / "frame_labels.npz")
    assert len(labels) == figures["labels"] == 200
    assert figures["plain_forces"] == (which == "poor")
    assert set(labels.origin) == {FORCE if which == "poor" else FRAME}
    assert np.isfinite(labels.free_energy).all() == (which == "flow")
    chosen = np.unique(np.linspace(0, N - 1, 200).astype(int))
    off = labels.force - frames.bead_force[chosen]
    assert np.abs(off.mean(0) / (off.std(0) / np.sqrt(len(off)) + 1e-9)).max() < 4
    np.testing.assert_array_equal(labels.run, walker[chosen])  # held out by whole walkers


def test_no_map_where_forces_are_not_known(flow, frames):
    assert plain_forces(flow, frames.forces[:1]) is None
