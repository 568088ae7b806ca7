"""How the flow's cost grows with the number of atoms, and what a protein of 3341 atoms costs.

    export CCG_DATA=... CCG_RUNS=...           # see systems.py
    python scaling.py                          # table of sizes and exponents, then AdK; 15 minutes
    python scaling.py --systems methanol       # boxes alone
    python scaling.py --systems adk --profile  # frames per second, and the costliest operations

Boxes are replicas of a box of 125 methanols, one centre-of-mass bead each, periodic. Proteins are
residues of adenylate kinase (AdK), or several AdK 100 Å apart, Cα beads. Every size runs in a
process of its own on one thread; times are processor times per frame of a batch; memory is the
peak of the whole process, less what it held before the flow was built.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import systems
import torch
from torch.profiler import ProfilerActivity, profile

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_mda import Backmapper
from ccg_mda.universe import cg_map

SIZES = {  # replicas of the box along each axis; AdK residues (of 214) and AdK copies
    "methanol": [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 3, 2), (4, 3, 3), (4, 4, 4)],
    "protein": [(32, 1), (64, 1), (128, 1), (214, 1), (214, 2), (214, 4), (214, 8), (214, 15)],
}
APART_A = 100.0
N_FRAMES = 8  # to standardise by, and per batch
FASTEST_OF = 3


class Case(NamedTuple):
    """A map with some frames, (n, n_atoms, 3) in Å, and their box (3, 3) or None."""

    cg_map: CGMap
    positions: torch.Tensor
    box: torch.Tensor | None


def copies(topology: Topology, n: int) -> Topology:
    """Return n copies of all molecules, one after another, each copy with a segment of its own."""
    values = {f.name: getattr(topology, f.name) for f in fields(topology)}
    values["bonds"] = np.concatenate([topology.bonds + k * len(topology) for k in range(n)])
    values["segids"] = tuple(f"{segid}{k}" for k in range(n) for segid in topology.segids)
    for name in set(values) - {"bonds", "segids"}:
        value = values[name]
        values[name] = np.tile(value, n) if isinstance(value, np.ndarray) else value and value * n
    return Topology(**values)


def replicate(one: CGMap, positions: np.ndarray, shifts: np.ndarray) -> tuple[CGMap, torch.Tensor]:
    """Return the map and frames (n, n_atoms, 3) of copies that are moved by shifts (copies, 3)."""
    n, nnz = len(shifts), len(one.weights)
    which = np.repeat(np.arange(n), nnz)
    many = CGMap(
        copies(one.atoms, n),
        copies(one.beads, n),
        np.tile(one.bead_index, n) + which * one.n_beads,
        np.tile(one.atom_index, n) + which * one.n_atoms,
        np.tile(one.weights, n),
    )
    moved = positions[:, None] + shifts[:, None]
    return many, torch.from_numpy(moved.reshape(len(positions), -1, 3))


def methanol(along: tuple[int, ...]) -> Case:
    """Return replicas of the box of methanol."""
    system = systems.load("methanol")
    few = np.linspace(0, len(system.data) - 1, N_FRAMES).astype(int)
    cells = np.stack(np.meshgrid(*map(np.arange, along), indexing="ij"), -1).reshape(-1, 3)
    many, frames = replicate(system.cg_map, system.data.positions[few], cells * system.box)
    return Case(many, frames, torch.from_numpy(np.diag(system.box * along)))


def protein(size: tuple[int, ...]) -> Case:
    """Return the first residues of AdK, or several AdK in a row."""
    n_residues, n_copies = size
    system = systems.load("adenylate_kinase")
    part = system.universe.residues[:n_residues].atoms
    few = np.linspace(0, len(system.data) - 1, N_FRAMES).astype(int)
    shifts = np.arange(n_copies)[:, None] * [APART_A, 0.0, 0.0]
    positions = system.data.positions[few][:, part.indices]
    return Case(*replicate(cg_map(part, "ca"), positions, shifts), None)


SYSTEMS: dict[str, Callable[[tuple[int, ...]], Case]] = {"methanol": methanol, "protein": protein}


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of some work: the fastest of several turns after one for nothing.

    What takes longer than ten seconds isn't repeated: nothing is left to warm up.
    """
    taken: list[float] = []
    while len(taken) <= FASTEST_OF and sum(taken) < 10.0:
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken[1:] or taken)


def peak_MiB() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(case: Case, width: int, dtype: torch.dtype = torch.float64) -> Backmapper:
    """Return a flow with some weights, as no training leaves them at zero."""
    torch.manual_seed(0)
    options = {"width": width, "bead_hops": 4, "channels": 2}  # as AdK in backmapping.py
    flow = Backmapper.from_data(case.cg_map, 300.0, case.positions, box=case.box, **options)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow.with_conditioner(dtype).eval()


def measure(name: str, size: tuple[int, ...], width: int) -> dict[str, float]:
    """Return the figures of one size, measured in this process."""
    case = SYSTEMS[name](size)
    before, start = peak_MiB(), time.process_time()
    flow = build(case, width)
    built = time.process_time() - start
    distribution = flow(case.cg_map.apply(case.positions), box=case.box)
    with torch.inference_mode():
        log_prob = seconds(lambda: distribution.log_prob(case.positions)) / N_FRAMES
        rng = np.random.default_rng(0)
        sampling = seconds(lambda: distribution.rsample(rng=rng)) / N_FRAMES
    return {
        "atoms": case.cg_map.n_atoms,
        "beads": case.cg_map.n_beads,
        "build_s": built,
        "log_prob_ms": 1e3 * log_prob,
        "sample_ms": 1e3 * sampling,
        "peak_MiB": peak_MiB() - before,
    }


def throughput(dtype: torch.dtype, batch: int, width: int, rows: int) -> None:
    """Print how many AdK are reconstructed, and judged, per second; with the costliest operations.

    Parameters
    ----------
    dtype
        Of the conditioner.
    batch, width
        Frames per call; width of the network.
    rows
        How many operations of the profile to print, 0 for no profile.
    """
    case = protein((214, 1))
    flow = build(case, width, dtype)
    frames = case.positions[torch.arange(batch) % N_FRAMES]
    distribution = flow(case.cg_map.apply(frames))
    noise = flow.sample_noise(np.random.default_rng(0), (batch,))
    with torch.inference_mode():
        placed = seconds(lambda: distribution.positions_and_log_prob_from(noise))
        judged = seconds(lambda: distribution.log_prob(frames))
        print(f"AdK, {case.cg_map.n_atoms} atoms, batch of {batch}, width {width}, conditioner in "
              f"{str(dtype).removeprefix('torch.')}: {batch / placed:.1f} reconstructions with "
              f"their ln q per second, {batch / judged:.1f} log_prob per second")  # fmt: skip
        if rows:
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                distribution.positions_and_log_prob_from(noise)
            print(profiled.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=30
            ))  # fmt: skip


def table(name: str, width: int) -> None:
    """Print all sizes of one system, and the exponents fitted to them."""
    rows = []
    for size in SIZES[name]:
        command = [sys.executable, __file__, "--one", name, *map(str, size), "--width", str(width)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} {size} failed:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if len(rows) == 1:
            print(f"\n{name}, width {width}\n" + "".join(f"{key:>13}" for key in rows[0]))
        print("".join(f"{value:>13.6g}" for value in rows[-1].values()), flush=True)
    atoms = np.log([row["atoms"] for row in rows])
    exponents = (np.polyfit(atoms, np.log([r[key] for r in rows]), 1)[0] for key in rows[0])
    print("exponent".rjust(13) + "".join(f"{value:>13.2f}" for value in list(exponents)[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--systems", nargs="*", default=[*SIZES, "adk"], help="methanol protein adk"
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32, help="AdK frames per call")
    parser.add_argument("--profile", action="store_true", help="the costliest operations of AdK")
    parser.add_argument("--one", nargs="+", metavar="SYSTEM SIZE", help="one size, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of MDAnalysis' DCD reader
    if args.one:
        name, *size = args.one
        print(json.dumps(measure(name, tuple(map(int, size)), args.width)))
        return
    for name in args.systems:
        if name == "adk":
            for dtype in (torch.float64, torch.float32):
                throughput(dtype, args.batch, args.width, 12 * args.profile)
        else:
            table(name, args.width)


if __name__ == "__main__":
    main()
