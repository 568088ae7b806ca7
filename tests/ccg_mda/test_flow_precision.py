"""Backmapper: a network in float32 leaves maps exact, and densities what they are to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from systems import flow_of, system

from ccg_mda import conditioner

ROTATION = torch.from_numpy(Rotation.from_rotvec([0.4, -1.1, 2.0]).as_matrix())
TO_ROUNDING = 1e-5  # of float32, per degree of freedom
KINDS = ("slices", "mass", "torsions", "methanols")


@pytest.mark.parametrize("kind", KINDS)
def test_network_in_float32_gives_the_same_flow_to_rounding(kind):
    exact, s = flow_of(kind), system(kind).coarse
    flow = exact.with_conditioner(torch.float32)
    assert {p.dtype for p in flow.parameters()} == {torch.float32}
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    noise = flow.sample_noise(np.random.default_rng(3), (2, len(s)))
    positions, log_prob = flow(s).positions_and_log_prob_from(noise)
    assert positions.dtype == log_prob.dtype == torch.float64
    off = flow.cg_map.difference(flow.cg_map.apply(positions), s.expand(2, *s.shape))
    assert off.abs().max() < 1e-10
    back, log_prob_back = flow(s).noise_and_log_prob_from(positions)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-4)
    within = {"rtol": 0, "atol": TO_ROUNDING * flow.n_dof}
    torch.testing.assert_close(log_prob_back, log_prob, **within)
    torch.testing.assert_close(exact(s).log_prob(positions), log_prob, **within)


@pytest.mark.parametrize("kind", ["slices", "mass"])
def test_float32_flow_turns_with_its_beads(kind):
    flow, s = flow_of(kind).with_conditioner(torch.float32), system(kind).coarse
    noise = flow.sample_noise(np.random.default_rng(3), (len(s),))
    positions, log_prob = flow(s).positions_and_log_prob_from(noise)
    turned, log_prob_turned = flow(s @ ROTATION.T + 3.0).positions_and_log_prob_from(noise)
    torch.testing.assert_close(turned, positions @ ROTATION.T + 3.0, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_prob_turned, log_prob, rtol=0, atol=TO_ROUNDING * flow.n_dof)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_worked_on_piecewise_give_the_same(kind, monkeypatch):
    flow, s = flow_of(kind), system(kind).coarse
    noise = flow.sample_noise(np.random.default_rng(3), (len(s),))
    whole = flow(s).positions_and_log_prob_from(noise)
    monkeypatch.setattr(conditioner, "_ROWS", 3 * len(s))
    pieces = flow(s).positions_and_log_prob_from(noise)
    for one, other in zip(pieces, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow(s).log_prob(whole[0]), whole[1], rtol=0, atol=1e-9)
