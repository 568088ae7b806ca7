"""Stages that fit the flow: a fit to forces that leads away from the frames is undone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact_flows import CHAIN, flow_of, frames_of, structures

from ccg_training import flow_stages
from ccg_training.fit_flow import FlowLoss, mean_nll


@pytest.mark.parametrize(("scale", "undone"), [(1.0, False), (-3.0, True)])
def test_forces_that_lead_away_from_the_frames_are_undone(scale, undone):
    flow = flow_of(CHAIN)
    frames = frames_of(flow, flow.cg_map.apply(structures(CHAIN, 400, 6)), 7)
    held_out = SimpleNamespace(positions=frames.positions[300:])
    before, nll = (
        [p.detach().clone() for p in flow.parameters()],
        mean_nll(flow, held_out.positions),
    )
    workspace = SimpleNamespace(
        config=SimpleNamespace(flow=SimpleNamespace(batch_size=64, learning_rate=2e-3, patience=5)),
        data=(None, held_out),
        seed=lambda *what: 3,
    )
    train = replace(frames, forces=scale * frames.forces)[:300]
    terms = FlowLoss(likelihood=0.0, noise_force=0.0, label=0.0, energy=0.0, coordinate_force=1.0)
    found = flow_stages._fit(
        workspace, SimpleNamespace(update=lambda *a: None), flow, train, train[:50], terms, 60, 0
    )
    same = all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
    assert same == undone
    assert ("undone" in found["fit"]) == undone
    assert found["nll"] == pytest.approx(mean_nll(flow, held_out.positions))
    assert found["nll"] < nll + 0.2
    assert np.isfinite(found["nll"])
