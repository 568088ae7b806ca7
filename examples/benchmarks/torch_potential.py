"""Energies and forces of alanine dipeptide per second: OpenMM against torch, on one core.

    python torch_potential.py                     # eager
    python torch_potential.py --compiled          # beside it ahead-of-time builds, minutes each
    python torch_potential.py --device cuda       # beside it batches on a GPU

Calls take turns, and the least processor time of each counts, so that other work on the machine
matters little; on a GPU it is the least wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import simulate
import torch
from openmm import app

from ccg_ase.devices import available
from ccg_mda.potential import OpenMMPotential, Potential
from ccg_mda.torch_potential import TorchSystemPotential
from ccg_mda.torch_system import TorchSystem

BATCHES = (1, 64, 1024)
GPU_BATCHES = (1024, 65536)
ROUNDS, LEAST_S = 7, 0.1


def per_second(
    calls: list[tuple[Callable[[], object], int]], clock: Callable[[], float]
) -> list[float]:
    """Return the most frames per second that each call made; calls come with their frames."""
    repeats = []
    for call, _ in calls:
        call()
        start = clock()
        call()
        repeats.append(max(1, round(LEAST_S / max(clock() - start, 1e-6))))
    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for k, (call, _) in enumerate(calls):
            start = clock()
            for _ in range(repeats[k]):
                call()
            least[k] = min(least[k], (clock() - start) / repeats[k])
    return [frames / seconds for (_, frames), seconds in zip(calls, least, strict=True)]


def positions_A(frames: int) -> np.ndarray:
    """Return the molecule with noise of 0.02 Å, shape (frames, 22, 3)."""
    nm = np.array(app.PDBFile(str(simulate.ALANINE)).positions._value)
    return 10 * nm + 0.02 * np.random.default_rng(0).normal(size=(frames, *nm.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="build compiled code too")
    parser.add_argument("--device", default="cpu", help="a GPU to be measured too")
    arguments = parser.parse_args()
    device = available(arguments.device)
    reference = simulate.alanine_potential()
    system = TorchSystem.from_system(reference.system)
    rows: list[tuple[str, Potential, tuple[int, ...]]] = [
        ("OpenMM, Reference", reference, (BATCHES[-1],)),
        ("OpenMM, CPU", OpenMMPotential(reference.system, platform="CPU"), (BATCHES[-1],)),
        ("torch", TorchSystemPotential(system), BATCHES),
        ("torch, float32", TorchSystemPotential(system, dtype=torch.float32), BATCHES),
    ]
    if arguments.compiled:
        rows.append(("torch, compiled", TorchSystemPotential(system, compiled=True), BATCHES))
    cases = [(name, potential, batch) for name, potential, sizes in rows for batch in sizes]
    calls = [(partial(p, positions_A(b)), b) for _, p, b in cases]
    rates = per_second(calls, time.process_time)
    if device.type != "cpu":
        for dtype in (torch.float64, torch.float32):
            potential = TorchSystemPotential(system, device=device, dtype=dtype)
            own = [(f"torch, {device}, {dtype}", potential, b) for b in GPU_BATCHES]
            calls = [(partial(p, positions_A(b)), b) for _, p, b in own]
            rates += per_second(calls, time.perf_counter)
            cases += own
    print("| | frames in a call | frames per second | times OpenMM Reference |")
    print("|---|---|---|---|")
    for (name, _, batch), rate in zip(cases, rates, strict=True):
        print(f"| {name} | {batch} | {rate:.0f} | {rate / rates[0]:.2f} |")


if __name__ == "__main__":
    main()
