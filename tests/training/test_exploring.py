"""Bead dynamics of a turn: one that explodes is repeated more gently, and says so."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ccg_ase import ExplodedError
from ccg_training import exploring


def explosion(step: int) -> ExplodedError:
    return ExplodedError(
        replica=0,
        step=step,
        temperature_K=600.0,
        move_A=9.0,
        force_eV_A=100.0,
        bead=1,
        name="CA",
        last_good=np.zeros((2, 5, 3)),
    )


@pytest.fixture
def tried(monkeypatch):
    """What was tried: time steps and temperatures; runs with more than 2 fs explode."""
    calls = []

    def dynamics(force_field, beads, directory, *, timestep_fs, hot_temperature_K, **how):
        calls.append((timestep_fs, hot_temperature_K))
        directory.mkdir(parents=True)
        if timestep_fs > dynamics.stable_fs:
            raise explosion(7)
        (directory / "beads.dcd").write_text(f"{timestep_fs} fs")
        return np.repeat(beads[None, :1], 3, axis=0), np.array([0.3])

    dynamics.stable_fs = 2.0
    monkeypatch.setattr(exploring, "exchange_bead_dynamics", dynamics)
    return calls, dynamics


def sampled(ala2_map, ala2_beads, folder):
    settings = SimpleNamespace(
        driver="replica-exchange", replicas=2, rungs=2, save_every=10, timestep_fs=4.0,
        friction_per_ps=1.0, hot_temperature_K=600.0, exchange_every=50,
    )  # fmt: skip
    workspace = SimpleNamespace(
        config=SimpleNamespace(dynamics=settings), cg_map=ala2_map, seed=lambda *what: 1
    )
    stage, force_field = SimpleNamespace(update=None), SimpleNamespace(temperature_K=300.0)
    return exploring._dynamics(workspace, stage, force_field, ala2_beads, folder, 30, 1)


def test_an_explosion_is_followed_by_a_gentler_run(ala2_map, ala2_beads, tmp_path, tried):
    calls, _ = tried
    with pytest.warns(UserWarning, match=r"less heat: replica 0 exploded in step 7 \(600 K\)"):
        figures = sampled(ala2_map, ala2_beads, tmp_path)
    assert calls == [(4.0, 600.0), (2.0, 450.0)]
    assert figures["exploded"] == 1
    assert figures["frames"] == 3
    assert (tmp_path / "dynamics" / "beads.dcd").read_text() == "2.0 fs"


def test_what_explodes_in_any_case_ends_the_run(ala2_map, ala2_beads, tmp_path, tried):
    calls, dynamics = tried
    dynamics.stable_fs = 0.1
    with pytest.warns(UserWarning, match="less heat"), pytest.raises(ExplodedError):
        sampled(ala2_map, ala2_beads, tmp_path)
    assert [timestep for timestep, _ in calls] == pytest.approx([4.0, 2.0, 0.8])
