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
        config=SimpleNamespace(
            flow=SimpleNamespace(batch_size=64, learning_rate=2e-3, patience=5),
            stop=SimpleNamespace(max_hours=None),
        ),
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


def test_a_fit_takes_a_tenth_of_the_wall_time_at_most(monkeypatch):
    """A step takes an eighth of a second here, and every fit 7 s to begin with."""
    clock, notes = [0.0], []

    def fit(flow, frames, *, steps, **how):
        clock[0] += 7.0 + 0.125 * steps

    monkeypatch.setattr(flow_stages, "fit_flow", fit)
    monkeypatch.setattr(flow_stages.time, "perf_counter", lambda: clock[0])
    stage = SimpleNamespace(update=lambda note: notes.append(note))

    def allowed(hours):
        config = SimpleNamespace(stop=SimpleNamespace(max_hours=hours))
        return flow_stages._in_time(SimpleNamespace(config=config), stage, None, None, 500, {})

    assert allowed(None) == 500
    assert allowed(0.01) == 28
    assert notes == ["28 of 500 steps: a tenth of max_hours"]
    assert allowed(1.0) == 500
