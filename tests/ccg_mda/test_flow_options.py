"""Backmapper: boxes, temperatures, model files, base noise, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from systems import TEMPERATURE_K, flow_of, randomised, system

from ccg_ase import load_model, save_model
from ccg_mda import Backmapper
from ccg_mda.conditioner import saturated


def noise_of(kind: str, *shape: int) -> torch.Tensor:
    return flow_of(kind).sample_noise(np.random.default_rng(3), shape)


@pytest.mark.parametrize("kind", ["methanols", "two dipeptides"])
def test_molecules_in_a_box_are_made_whole(kind):
    flow, s = flow_of(kind), system(kind).coarse
    box = torch.tensor([[13.0, 0, 0], [2.0, 14.0, 0], [-1.0, 3.0, 15.0]]).double()
    noise = noise_of(kind, 3)
    x, log_prob = flow(s, box=box).positions_and_log_prob_from(noise)
    wrapped = s - torch.floor(s @ torch.linalg.inv(box)) @ box
    assert (wrapped != s).any()
    y, log_prob_wrapped = flow(wrapped, box=box).positions_and_log_prob_from(noise)
    torch.testing.assert_close(log_prob_wrapped, log_prob, rtol=0, atol=1e-8)
    turns = (y - x) @ torch.linalg.inv(box)
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-9)
    for molecule in np.unique(flow.cg_map.atoms.molecules):
        own = turns[:, flow.cg_map.atoms.molecules == molecule]
        torch.testing.assert_close(own, own[:, :1].expand_as(own), rtol=0, atol=1e-9)
    back, log_prob_back = flow(wrapped, box=box).noise_and_log_prob_from(x)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_prob_back, log_prob, rtol=0, atol=1e-8)


def test_another_temperature_widens_the_density(ala2_map):
    frames = system("slices").frames
    flow = Backmapper.from_data(
        ala2_map, TEMPERATURE_K, frames, width=8, channels=2, temperatures_K=(250.0, 450.0)
    )
    s = ala2_map.apply(frames[0])
    noise = flow.sample_noise(np.random.default_rng(0), (200,))
    spread = [
        (x[:, 15] - x[:, 14]).norm(dim=-1).log().std().item()
        for x in (flow(s, temperature_K=t).positions_from(noise) for t in (300.0, 432.0))
    ]
    assert spread[1] / spread[0] == pytest.approx(1.2, abs=0.002)
    randomised(flow)
    warm = flow(s, temperature_K=432.0)
    back, _ = warm.noise_and_log_prob_from(warm.positions_from(noise))
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-9)
    at_own = flow(s, temperature_K=TEMPERATURE_K).positions_from(noise)
    assert torch.equal(at_own, flow(s).positions_from(noise))
    with pytest.raises(ValueError, match=r"from 250 to 450 K.*460 K"):
        flow(s, temperature_K=460.0)


def test_inputs_far_outside_the_data_are_bounded_smoothly():
    x = torch.linspace(-60.0, 60.0, 240_001, dtype=torch.float64)
    value, h = saturated(x), (x[1] - x[0]).item()
    inside = x.abs() <= 5.0
    torch.testing.assert_close(value[inside], x[inside], rtol=0, atol=0)
    assert value.abs().max() <= 8.0
    slope, curvature = value.diff() / h, value.diff(n=2) / h**2
    assert slope.min() > -1e-9  # rounding
    assert slope.diff().abs().max() < h
    assert curvature.diff().abs().max() < h


@pytest.mark.parametrize("kind", ["mass", "torsions", "rigid waters"])
def test_model_file_round_trip(kind, tmp_path):
    flow, s, noise = flow_of(kind), system(kind).coarse, noise_of(kind, 3)
    path = tmp_path / "model.ccg"
    save_model(path, cg_map=flow.cg_map, temperature_K=TEMPERATURE_K, parts={"backmapper": flow})
    loaded = Backmapper.load(path)
    assert torch.equal(loaded(s).positions_from(noise), flow(s).positions_from(noise))
    save_model(path, cg_map=flow.cg_map, temperature_K=TEMPERATURE_K, parts={})
    with pytest.raises(ValueError, match="backmapper"):
        Backmapper.from_model(load_model(path))


@pytest.mark.parametrize("defensive", [0.0, 0.2])
def test_noise_has_the_stated_base_distribution(defensive):
    flow = flow_of("mass", defensive)
    noise = flow.sample_noise(np.random.default_rng(0), (20_000,))
    circular = flow.rotor_dof[flow.active]
    variance = 1 - defensive + defensive * 1.5**2
    assert noise[:, ~circular].var().item() == pytest.approx(variance, rel=0.02)
    assert noise[:, circular].var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    assert noise[:, circular].abs().max() <= math.pi


def test_bad_input_is_refused_with_cause_and_cure(ala2_map):
    flow, s = flow_of("slices"), system("slices").coarse
    with pytest.raises(ValueError, match="another mapping"):
        flow(s[:, :4])
    with pytest.raises(ValueError, match="trained at 300 K"):
        flow(s, temperature_K=310.0)
    with pytest.raises(ValueError, match="NaN"):
        flow(s * math.nan)
    with pytest.raises(ValueError, match="other coarse variables"):
        flow(s).log_prob(system("slices").frames[6:9])
    with pytest.raises(ValueError, match=r"17 flags.*\(17, 3\)"):
        Backmapper(ala2_map, TEMPERATURE_K, rotor=[True])
    with pytest.raises(ValueError, match="no box"):
        flow_of("torsions")(system("torsions").coarse, box=torch.eye(3).double())
    rigid = flow_of("rigid waters")
    frames = system("waters").frames[:3]
    with pytest.raises(ValueError, match=r"H2O1:H1.*constraints"):
        rigid(rigid.cg_map.apply(frames)).log_prob(frames)
