"""Dihedrals of beads turned all round, without energy calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccg_ase import ForceField, load_model
from ccg_ase.torsion_map import dihedral_angles
from ccg_training.evaluation import dcd_frames
from ccg_training.turning import turn_dihedrals

MODEL = Path(__file__).parents[2] / "examples/alanine_dipeptide/alanine_dipeptide.ccg"


def test_every_dihedral_goes_all_round_from_one_state(tmp_path):
    model = load_model(MODEL)
    force_field = ForceField.from_model(model)
    bonds = [[0, 0, 0], [1.3, 0.5, 0], [1.2, -0.8, 0.3], [1.3, 0.7, 0.2], [1.2, -0.4, 0]]
    beads = np.cumsum(bonds, axis=0)
    path = tmp_path / "turned.dcd"
    options = {"n_replicas": 24, "n_steps": 1600, "save_every": 40, "timestep_fs": 2.0, "seed": 3}
    turn_dihedrals(force_field, beads[None], path, **options)
    frames = dcd_frames(path)
    assert frames.shape == (24 * 20, 5, 3)
    angles = dihedral_angles(frames, model.cg_map.beads.dihedrals()).reshape(24, 20, 2)
    # Half of the replicas hold one dihedral each, in arcs of 30°, and lead the other all round.
    spread = 1 - np.abs(np.exp(1j * angles).mean(1))
    assert ((spread.min(1) < 0.25) & (spread.max(1) > 0.7)).all()
    for held in (0, 1):
        mine = spread.argmin(1) == held
        assert mine.sum() == 12
        middle = np.sort(np.angle(np.exp(1j * angles[mine, :, held]).mean(1)))
        assert np.diff(middle, append=middle[0] + 2 * np.pi).max() < np.radians(75)
        every = np.sort(angles[mine, :, 1 - held], axis=1)
        assert np.diff(every, axis=1).max() < np.radians(90)
    assert np.linalg.norm(np.diff(frames, axis=1), axis=-1).max() < 1.9
    written = path.stat().st_mtime_ns
    turn_dihedrals(force_field, beads[None], path, **options)
    assert path.stat().st_mtime_ns == written
