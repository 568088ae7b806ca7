"""Small systems for the flow's contract: every kind of map, with frames that move thermally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import ase.build
import numpy as np
import torch
from ase.neighborlist import natural_cutoffs, neighbor_list

from ccg_ase import CGMap, Topology
from ccg_ase.torsion_map import TorsionMap
from ccg_mda import Backmapper

N_FRAMES = 60
TEMPERATURE_K = 300.0
BOX_A = 12.0


def molecule(name: str) -> tuple[Topology, np.ndarray]:
    """Return a molecule of ASE's G2 set, every atom with a name of its own, in Å."""
    atoms = ase.build.molecule(name)
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.1))
    symbols = atoms.get_chemical_symbols()
    topology = Topology(
        names=[f"{symbol}{k}" for k, symbol in enumerate(symbols)],
        elements=symbols,
        masses=atoms.get_masses(),
        resnames=(name,) * len(atoms),
        bonds=np.stack([i, j], 1)[i < j],
    )
    return topology, atoms.positions


def joined(*parts: tuple[Topology, np.ndarray]) -> tuple[Topology, np.ndarray]:
    """Return several molecules as one topology, residues numbered, 4 Å apart along x and y."""
    offsets = np.cumsum([0] + [len(topology) for topology, _ in parts])
    topologies = [topology for topology, _ in parts]
    resids, shift = [], 0
    for topology in topologies:
        resids.append(topology.resids + shift)
        shift += int(topology.resids.max())
    whole = Topology(
        names=[name for t in topologies for name in t.names],
        elements=[e for t in topologies for e in t.elements],
        masses=np.concatenate([t.masses for t in topologies]),
        resnames=[r for t in topologies for r in t.resnames],
        resids=np.concatenate(resids),
        bonds=np.concatenate([t.bonds + o for t, o in zip(topologies, offsets, strict=False)]),
    )
    places = np.array([[4.0 * k, 3.0 * (k % 2), 0.5 * k] for k in range(len(parts))])
    positions = [x + place for (_, x), place in zip(parts, places, strict=True)]
    return whole, np.concatenate(positions)


def spun(
    topology: Topology, positions: np.ndarray, axes: Sequence[tuple[int, int]], seed: int = 0
) -> np.ndarray:
    """Return frames with random torsions about bonds, random orientations, and 0.03 Å of noise."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(positions[None], N_FRAMES, axis=0)
    around = topology.neighbours()
    for j, k in axes:
        moved, queue = {k}, [k]
        while queue:
            fresh = [a for a in around[queue.pop()] if a != j and a not in moved]
            moved.update(fresh)
            queue += fresh
        part = sorted(moved)
        axis = frames[:, k] - frames[:, j]
        axis = (axis / np.linalg.norm(axis, axis=-1, keepdims=True))[:, None]
        angle = rng.uniform(-np.pi, np.pi, (N_FRAMES, 1, 1))
        arm, origin = frames[:, part] - frames[:, k, None], frames[:, k, None]
        along = axis * (axis * arm).sum(-1, keepdims=True)
        turned = arm * np.cos(angle) + np.cross(axis, arm) * np.sin(angle)
        frames[:, part] = origin + turned + along * (1 - np.cos(angle))
    return frames + 0.03 * rng.normal(size=frames.shape)


def water(rigid: bool = False) -> tuple[Topology, np.ndarray, np.ndarray]:
    """Return one water and its frames: vibrating, or rigid and tumbling."""
    topology, x = molecule("H2O")
    if not rigid:
        return topology, x, spun(topology, x, ())
    turns = np.linalg.qr(np.random.default_rng(0).normal(size=(N_FRAMES, 3, 3)))[0]
    return topology, x, x @ turns


@dataclass(frozen=True)
class System:
    """A map and frames (n, n_atoms, 3) of its atoms."""

    map: CGMap | TorsionMap
    frames: torch.Tensor

    @property
    def coarse(self) -> torch.Tensor:
        """What the first three frames map to."""
        return self.map.apply(self.frames[:3])


ACE, ALA, NME = range(6), range(6, 16), range(16, 22)
BACKBONE_GROUP, SIDE_CHAIN = (6, 7, 8, 9, 14, 15), (10, 11, 12, 13)
AXES = ((4, 1), (8, 10), (16, 18), (6, 8), (8, 14))  # three methyls, φ and ψ


def dipeptide_map(kind: str, topology: Topology) -> CGMap | TorsionMap:
    """Return a map of alanine dipeptide."""
    groups = [ACE, BACKBONE_GROUP, SIDE_CHAIN, NME]
    if kind == "slices":
        return CGMap.from_slices(topology, [4, 6, 8, 14, 16])
    if kind == "heavy":
        return CGMap.from_slices(topology, [i for i, e in enumerate(topology.elements) if e != "H"])
    if kind == "one slice":
        return CGMap.from_slices(topology, [8])
    if kind == "two slices":
        return CGMap.from_slices(topology, [8, 14])
    if kind == "mass":
        return CGMap.from_groups(topology, groups, ["A", "B", "S", "M"])
    if kind == "geometry":
        return CGMap.from_groups(topology, groups, ["A", "B", "S", "M"], "geometry")
    if kind == "residues":
        return CGMap.from_groups(topology, [ACE, ALA, NME])
    if kind == "molecule":
        return CGMap.from_groups(topology, [range(22)])
    if kind == "loose atoms":  # hydrogens, and the first O, in no bead
        return CGMap.from_groups(topology, [[1, 4], [6, 8, 14, 15], [10], [16, 18]])
    if kind == "mixed":  # a slice bead between groups
        return CGMap.from_groups(topology, [ACE, [8], [14, 15], NME])
    if kind == "shared atoms":
        matrix = np.zeros((3, 22))
        matrix[0, [1, 4, 5, 6]] = 0.3, 0.4, 0.2, 0.1
        matrix[1, [6, 8, 10, 14]] = 0.25
        matrix[2, [14, 15, 16, 18]] = 0.3, 0.1, 0.3, 0.3
        return CGMap.from_matrix(topology, matrix)
    assert kind == "torsions"
    return TorsionMap(topology, [[4, 6, 8, 14], [6, 8, 14, 16]], ("phi", "psi"))


DIPEPTIDE = (
    "slices", "heavy", "one slice", "two slices", "mass", "geometry", "residues", "molecule",
    "loose atoms", "mixed", "shared atoms", "torsions",
)  # fmt: skip
OTHERS = (
    "two dipeptides", "waters", "water pairs", "rigid waters", "methanols", "ions", "acetonitrile",
    "CO2", "acetylene", "butyne", "united atoms", "benzene", "benzene by three", "rigid benzene",
    "disilane", "oxirane", "nitrile torsion",
)  # fmt: skip


def other(kind: str, dipeptide: tuple[Topology, np.ndarray]) -> tuple:
    """Return map and frames of a system that is not one alanine dipeptide."""
    if kind == "two dipeptides":
        topology, x = joined(dipeptide, dipeptide)
        groups = [[a + 22 * k for a in g] for k in (0, 1) for g in (ACE, ALA, NME)]
        axes = [(i + 22 * k, j + 22 * k) for k in (0, 1) for i, j in AXES]
        return CGMap.from_groups(topology, groups), spun(topology, x, axes)
    if kind in ("waters", "rigid waters"):
        one, x, frames = water(kind == "rigid waters")
        topology, base = joined(*[(one, x)] * 4)
        frames = np.concatenate([np.roll(frames, k, 0) for k in range(4)], 1)
        frames = frames + np.repeat(base[::3] - x[0], 3, axis=0)
        return CGMap.from_groups(topology, np.arange(12).reshape(4, 3)), frames
    if kind == "water pairs":  # beads of two molecules each, as in Martini
        topology, x = joined(*[molecule("H2O")] * 4)
        return CGMap.from_groups(topology, np.arange(12).reshape(2, 6)), spun(topology, x, ())
    if kind == "methanols":
        topology, x = joined(*[molecule("CH3OH")] * 3)
        axes = [(1 + 6 * k, 0 + 6 * k) for k in range(3)]
        return CGMap.from_groups(topology, np.arange(18).reshape(3, 6)), spun(topology, x, axes)
    if kind == "ions":
        topology, x = joined(molecule("Na"), molecule("Cl"), molecule("H2O"))
        return CGMap.from_groups(topology, [[0], [1], [2, 3, 4]]), spun(topology, x, ())
    if kind == "united atoms":  # butane without hydrogens: bent groups, free to turn
        topology, x = without_hydrogens(*molecule("trans-butane"))
        return CGMap.from_groups(topology, [range(4)]), spun(topology, x, topology.bonds.tolist())
    if kind == "nitrile torsion":  # a torsion that begins at a linear group
        topology, x = molecule("H2CCHCN")
        return TorsionMap(topology, [nitrile_torsion(topology)]), spun(topology, x, ())
    name = {
        "acetonitrile": "CH3CN", "CO2": "CO2", "acetylene": "C2H2", "butyne": "2-butyne",
        "benzene": "C6H6", "benzene by three": "C6H6", "rigid benzene": "C6H6",
        "disilane": "Si2H6", "oxirane": "CH2OCH2",
    }[kind]  # fmt: skip
    topology, x = molecule(name)
    frames = spun(topology, x, [(0, 1)] if kind in ("butyne", "disilane") else ())
    if kind == "rigid benzene":
        frames = np.repeat(x[None], N_FRAMES, 0)
    if kind == "benzene by three":
        return CGMap.from_groups(topology, [[k, k + 1, k + 6, k + 7] for k in (0, 2, 4)]), frames
    if kind == "disilane":
        return CGMap.from_slices(topology, [0, 1]), frames
    return CGMap.from_groups(topology, [range(len(topology))]), frames


def without_hydrogens(topology: Topology, positions: np.ndarray) -> tuple[Topology, np.ndarray]:
    """Return the heavy atoms alone."""
    kept = [k for k, element in enumerate(topology.elements) if element != "H"]
    bonds = [[kept.index(a) for a in pair] for pair in topology.bonds if set(pair) <= set(kept)]
    heavy = Topology(
        names=[topology.names[k] for k in kept],
        elements=[topology.elements[k] for k in kept],
        masses=topology.masses[kept],
        bonds=bonds,
    )
    return heavy, positions[kept]


def nitrile_torsion(topology: Topology) -> list[int]:
    """Return the torsion that begins at the carbon of a nitrile: C(N)-C-C-H."""
    around, elements = topology.neighbours(), topology.elements
    first = around[elements.index("N")][0]
    second = next(a for a in around[first] if elements[a] == "C")
    third = next(a for a in around[second] if elements[a] == "C" and a != first)
    return [first, second, third, next(a for a in around[third] if elements[a] == "H")]


@cache
def system(kind: str) -> System:
    """Return one of the systems by name."""
    from conftest import _ALA2, _ALA2_BONDS

    names, resnames, resids, elements, x = zip(*_ALA2, strict=True)
    topology = Topology(
        names=names,
        elements=elements,
        masses=[ase.data.atomic_masses[ase.data.atomic_numbers[e]] for e in elements],
        resnames=resnames,
        resids=resids,
        bonds=_ALA2_BONDS,
    )
    dipeptide = topology, np.array(x)
    if kind in DIPEPTIDE:
        the_map, frames = dipeptide_map(kind, topology), spun(topology, dipeptide[1], AXES)
    else:
        the_map, frames = other(kind, dipeptide)
    return System(the_map, torch.from_numpy(frames))


def randomised(flow: Backmapper, seed: int = 0, size: float = 0.01) -> Backmapper:
    """Give every parameter a random part: fresh ones would leave the conditioner unused."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise.to(parameter)
    return flow.requires_grad_(False)


@cache
def flow_of(kind: str, defensive: float = 0.0) -> Backmapper:
    """Return a flow with random parameters for a system."""
    case = system(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Backmapper.from_data(
            case.map,
            TEMPERATURE_K,
            case.frames,
            width=8,
            channels=2,
            around_A=5.0,
            defensive=defensive,
        )
    return randomised(flow)
