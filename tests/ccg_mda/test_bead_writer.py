import MDAnalysis as mda
import numpy as np
import pytest

from ccg_ase.bead_frames import BeadFrames
from ccg_mda.bead_sources import bead_universe
from ccg_mda.bead_writer import BeadWriter


def frames_of(beads, steps, box):
    shape = beads.shape[:2]
    return BeadFrames(
        beads=beads,
        steps=np.array(steps),
        energies=np.zeros(shape),
        restraint_energies=np.zeros(shape),
        walkers=np.tile(np.arange(shape[1]), (shape[0], 1)),
        temperatures_K=np.full(shape[1], 300.0),
        timestep_fs=4.0,
        box=box,
    )


@pytest.mark.parametrize("suffix", ["xtc", "trr", "xyz"])
def test_round_trip(ala2_map, ala2_beads, tmp_path, suffix):
    """Two blocks of frames, of a second replica, read back by MDAnalysis."""
    path = str(tmp_path / f"run.{suffix}")
    box = np.array([[30.0, 0, 0], [5.0, 31.0, 0], [3.0, 2.0, 32.0]])
    beads = ala2_beads[:10].reshape(5, 2, 5, 3)
    with mda.Writer(path, n_atoms=5) as target:
        writer = BeadWriter(target, ala2_map, replica=1)
        writer.write(frames_of(beads[:3], [500, 1000, 1500], box))
        writer.write(frames_of(beads[3:], [2000, 2500], box))
    read = bead_universe(path, ala2_map)
    np.testing.assert_allclose(
        read.trajectory.timeseries(order="fac"),
        beads[:, 1],
        atol=0.006 if suffix == "xtc" else 1e-5,
    )
    if suffix == "xtc":
        assert [ts.time for ts in read.trajectory] == pytest.approx([2, 4, 6, 8, 10])
        np.testing.assert_allclose(read.trajectory[0].triclinic_dimensions, box, atol=1e-4)
    read.trajectory.close()  # else its open file is reported when it's collected


def test_no_box(ala2_map, ala2_beads):
    """A writer sees beads with names, a time in ps, the step, and no box."""
    seen = []

    class Target:
        def write(self, group):
            ts = group.universe.trajectory.ts
            seen.append((group.names.tolist(), ts.time, ts.data["step"], ts.dimensions))

    BeadWriter(Target(), ala2_map).write(frames_of(ala2_beads[None, :1], [250], None))
    assert seen == [(["C", "N", "CA", "C", "N"], 1.0, 250, None)]
