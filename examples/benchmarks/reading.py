"""What reading a backmapped trajectory costs beside the model: overhead, look-ahead, memory.

    python reading.py [--atoms 3000] [--frames 100000]

CPU times of one run on one core. The overhead is measured with a model of so many atoms that
only copies noise, and whose own time is taken off; look-ahead with the flow of alanine dipeptide;
memory over a pass through all frames. Figures of the last release: README.md.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import MDAnalysis as mda
import numpy as np
import torch

from ccg_ase import CGMap, Topology
from ccg_mda import Backmapper, backmap, bead_universe

MODEL = Path(__file__).parents[1] / "alanine_dipeptide" / "alanine_dipeptide.ccg"


class CopiesNoise(torch.nn.Module):
    """Atoms at their beads plus noise, and a clock of its own time."""

    def __init__(self, cg_map: CGMap) -> None:
        super().__init__()
        self.cg_map, self.temperature_K, self.seconds = cg_map, 300.0, 0.0
        self.owner = torch.from_numpy(cg_map.owner)

    def sample_noise(self, rng: np.random.Generator) -> torch.Tensor:
        start = time.process_time()
        noise = torch.from_numpy(rng.normal(size=(self.cg_map.n_atoms, 3)))
        self.seconds += time.process_time() - start
        return noise

    def forward(
        self, beads: torch.Tensor, *, temperature_K: float, box: torch.Tensor | None
    ) -> CopiesNoise:
        self.beads = beads
        return self

    def positions_and_log_prob_from(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.process_time()
        placed = self.beads[:, self.owner] + 0.1 * noise, noise.square().sum((-2, -1))
        self.seconds += time.process_time() - start
        return placed


def chain(n_atoms: int, per_bead: int = 15) -> CGMap:
    """A chain of atoms with a bead on every fifteenth."""
    k = np.arange(n_atoms)
    bonds = np.stack([k[:-1], k[1:]], axis=1)
    atoms = Topology(names=("C",) * n_atoms, masses=np.full(n_atoms, 12.0), bonds=bonds)
    return CGMap.from_slices(atoms, range(0, n_atoms, per_bead))


def walk(cg_map: CGMap, n_frames: int) -> np.ndarray:
    steps = np.random.default_rng(0).normal(scale=1.5, size=(n_frames, cg_map.n_beads, 3))
    return steps.cumsum(axis=1).astype(np.float32)


def seconds_of_a_pass(beads: mda.Universe, model: torch.nn.Module, prefetch: int) -> float:
    """Return the CPU time of making and reading the atomistic Universe."""
    start = time.process_time()
    for _ in backmap(beads, model, prefetch=prefetch).trajectory:
        pass
    return time.process_time() - start


def overhead(n_atoms: int) -> None:
    model, n_frames = CopiesNoise(chain(n_atoms)), 5000
    beads = bead_universe(walk(model.cg_map, n_frames), model)
    print("| atoms | prefetch | ms per frame | of which the model | overhead |")
    print("| --- | --- | --- | --- | --- |")
    for prefetch in (1, 16, 64):
        model.seconds = 0.0
        total = seconds_of_a_pass(beads, model, prefetch) / n_frames * 1e3
        own = model.seconds / n_frames * 1e3
        print(f"| {n_atoms} | {prefetch} | {total:.3f} | {own:.3f} | {total - own:.3f} |")


def look_ahead() -> None:
    model, n_frames = Backmapper.load(MODEL), 512
    rng = np.random.default_rng(0)
    beads = model.cg_map.apply(mda.Universe(MODEL.with_suffix(".pdb")).atoms.positions)
    frames = beads + rng.normal(scale=0.03, size=(n_frames, *beads.shape))
    universe = bead_universe(frames.astype(np.float32), model)
    times = {}
    print("| prefetch | ms per frame | times as fast as frame by frame |")
    print("| --- | --- | --- |")
    for prefetch in (1, 4, 16, 64, 256):
        times[prefetch] = seconds_of_a_pass(universe, model, prefetch) / n_frames
        print(f"| {prefetch} | {times[prefetch] * 1e3:.2f} | {times[1] / times[prefetch]:.1f} |")


def memory(n_frames: int) -> None:
    model = CopiesNoise(chain(22, 4))
    universe = backmap(bead_universe(walk(model.cg_map, n_frames), model), model)
    peaks = []
    for ts in universe.trajectory:
        if ts.frame in (n_frames // 100, n_frames - 1):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"memory: {peaks[0]:.0f} MB after 1 % of {n_frames} frames, {peaks[1]:.0f} MB at the end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atoms", type=int, default=3000)
    parser.add_argument("--frames", type=int, default=100_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Reader has no dt")
    overhead(args.atoms)
    look_ahead()
    memory(args.frames)


if __name__ == "__main__":
    main()
