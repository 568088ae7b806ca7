"""Bead systems to test on: liquids of chains and of single beads, with force fields that act."""

from itertools import product

import numpy as np
import torch

from ccg_ase import CGCalculator, CGMap, ForceField, Topology
from ccg_ase.prior import TERMS

CUBE = np.diag([13.0, 14.0, 15.0])
SKEWED = np.array([[13.0, 0, 0], [4, 14, 0], [-3, 5, 12]])
SMALL = np.array([[5.5, 0, 0], [1, 6, 0], [-1, 2, 5]])  # faces closer than the cut-off
CUTOFF_A = 6.0


def eager(force_field, dtype=torch.float64, **options):
    """Calculator without a build: the compiled path has its own tests."""
    return CGCalculator(force_field, dtype=dtype, compiled=False, **options)


def map_of(*molecules):
    """Beads of molecules given as (length, count): beads are called 4a, 4b, 4c, 4d, 1a."""
    types, bonds = [], []
    for length, count in molecules:
        for _ in range(count):
            bonds += [(len(types) + i, len(types) + i + 1) for i in range(length - 1)]
            types += [f"{length}{'abcd'[i]}" for i in range(length)]
    masses = [10 + len(types[0]) + i % 3 for i in range(len(types))]
    topology = Topology(names=types, masses=masses, bonds=bonds)
    return CGMap.from_slices(topology, range(len(types)))


def beads_of(molecules, cell, frames, seed=0):
    """Frames (frames, n, 3) of molecules at jittered places of a grid in a cell."""
    rng = np.random.default_rng(seed)
    total = sum(count for _, count in molecules)
    side = int(np.ceil(np.cbrt(total)))
    grid = np.array(list(product(range(side), repeat=3)))[:total] / side
    starts = (grid + rng.uniform(0, 0.4 / side, (frames, total, 3))) @ cell
    parts, first = [], 0
    for length, count in molecules:
        start = starts[:, first : first + count, None]
        first += count
        steps = rng.normal(size=(frames, count, length - 1, 3))
        steps /= np.linalg.norm(steps, axis=-1, keepdims=True)
        steps *= rng.normal(1.5, 0.06, (frames, count, length - 1, 1))
        chain = np.concatenate([start, start + steps.cumsum(2)], axis=2)
        parts.append(chain.reshape(frames, -1, 3))
    return np.concatenate(parts, axis=1)


def system(*molecules, cell=None, frames=40, seed=0, cutoff_A=CUTOFF_A, **options):
    """Return a force field whose prior terms and network all act, and its frames (N, n, 3)."""
    cg_map = map_of(*molecules)
    beads = beads_of(molecules, CUBE if cell is None else cell, frames, seed)
    boxes = None if cell is None else np.tile(cell, (frames, 1, 1))
    options = {"channels": 4, "n_radial": 4, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ForceField.from_data(
            cg_map, 300.0, beads, boxes=boxes, terms=TERMS, cutoff_A=cutoff_A, **options
        ).double()
        # Fitted volumes hardly act in the frames that they were fitted to.
        volumes = [[*key, 1.5 * d, energy] for *key, d, energy in made.config["prior"]["volumes"]]
        prior = {**made.config["prior"], "volumes": volumes}
        wide = ForceField.from_config(cg_map, 300.0, {**made.config, "prior": prior}).double()
        wide.load_state_dict(made.state_dict())
        return speaking(wide, torch.from_numpy(beads[:8]), cell), torch.from_numpy(beads)


def speaking(force_field, frames, cell=None):
    """Give networks random readouts, of 0.1 eV for their whole energy, and thermal parameters."""
    box = None if cell is None else torch.from_numpy(cell)
    with torch.no_grad():
        for member in force_field.members:
            torch.nn.init.normal_(member.out.weight)
            if member.thermal is not None:
                torch.nn.init.normal_(member.thermal, std=0.5)
        network = force_field.member_energies(frames, box=box).sum(-1)
        network -= force_field.prior(frames, box=box)
        for member, scale in zip(force_field.members, 0.1 / network.std(1), strict=True):
            member.out.weight *= scale
    return force_field


def rotation(seed=5):
    """Return a random proper rotation (3, 3), float64."""
    matrix, _ = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )
    return matrix * torch.linalg.det(matrix)
