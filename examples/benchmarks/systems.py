"""The benchmark systems of the backmapping flow: their maps, reference frames and potentials.

    export CCG_DATA=...            # public inputs: the folders pccg, chemtrain, openmmtools
    export CCG_RUNS=...            # simulated frames, written by simulate.py
    python systems.py              # what is there: atoms, beads, frames, energies

`load("ethane")` gives a `System`; `SYSTEMS` lists the names. Ethane needs nothing but its public
files, adenylate kinase the package MDAnalysisTests.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import openmm
import simulate
from ase import units
from MDAnalysis import Universe
from MDAnalysis.analysis.rms import rmsd
from openmm import app

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_mda.potential import OpenMMPotential
from ccg_mda.universe import cg_map, universe_from
from ccg_training.reference import ReferenceData, read_structure

ALANINE_BEADS = {
    "slices": {  # as in cycle.toml: the two torsions over these five atoms are φ and ψ
        "C1": "resname ACE and name C",
        "N2": "resname ALA and name N",
        "CA2": "resname ALA and name CA",
        "C2": "resname ALA and name C",
        "N3": "resname NME and name N",
    },
    "com": {
        "ACE": "resname ACE",
        "BB": "resname ALA and name N H CA HA C O",
        "CB": "resname ALA and name CB HB*",
        "NME": "resname NME",
    },
}
CHIGNOLIN_HELD_OUT = (6, 22)  # walkers: one starts folded, one unfolded; both run freely


@dataclass(frozen=True, eq=False)
class System:
    """One molecule or box, one map, and its frames.

    Attributes
    ----------
    data, held_out
        Frames to train on, and frames never to be trained on: whole walkers, time blocks, or the
        later part of a trajectory.
    potential
        Energies and forces as in the stored frames; None where there are none.
    universe
        The atoms as MDAnalysis sees them, with bonds.
    box
        Lengths of the periodic box in Å, shape (3,), the same for all frames, or None.
    """

    name: str
    cg_map: CGMap
    temperature_K: float
    data: ReferenceData
    held_out: ReferenceData
    universe: Universe
    potential: OpenMMPotential | None = None
    box: np.ndarray | None = None


# ------------------------------------------------------------------------------------ loading


def alanine(public: Path, runs: Path, beads: str) -> System:
    """Alanine dipeptide, ff96 and OBC1, 300 K; held out: an independent run of 80 ns."""
    universe = read_structure(simulate.ALANINE)
    return System(
        name=f"alanine_{beads}",
        cg_map=cg_map(universe, ALANINE_BEADS[beads]),
        temperature_K=300.0,
        data=ReferenceData.load(runs / "alanine.npz"),
        held_out=ReferenceData.load(runs / "alanine_held_out.npz"),
        universe=universe,
        potential=simulate.alanine_potential(),
    )


def ethane(public: Path, runs: Path) -> System:
    """Ethane in vacuum, two carbon beads, kT = 2.56 kJ/mol."""
    folder = public / "chemtrain"
    read = {key: np.load(folder / f"{key}_ethane.npy") for key in ("positions", "forces")}
    wrapped = read["positions"].astype(float)  # nm, in a box of 1 nm
    to_first = wrapped - wrapped[:, :1]
    frames = ReferenceData(
        positions=(wrapped[:, :1] + to_first - np.round(to_first)) * units.nm,
        forces=read["forces"].astype(float) * (simulate.KJ_PER_MOL / units.nm),
        energy=np.load(folder / "energies_ethane.npy").astype(float) * simulate.KJ_PER_MOL,
        time_ps=(np.arange(len(wrapped)) + 1) * 0.1,
    )
    train, held_out = frames.split(0.1)
    system = _ethane_system(folder / "ethane.toml")
    universe = read_structure(folder / "ethane.pdb")
    return System(
        name="ethane",
        cg_map=cg_map(universe, "name CH3"),
        temperature_K=2.56 * simulate.KJ_PER_MOL / units.kB,
        data=train,
        held_out=held_out,
        universe=universe,
        potential=OpenMMPotential(system),
    )


def chignolin(public: Path, runs: Path) -> System:
    """CLN025 with GBSA-OBC, Cα beads, 300 K; held out: two whole walkers."""
    frames = ReferenceData.load(runs / "chignolin.npz")
    held = np.isin(frames.walker, CHIGNOLIN_HELD_OUT)
    universe, potential = chignolin_start(public)
    return System(
        name="chignolin",
        cg_map=cg_map(universe, "ca"),
        temperature_K=300.0,
        data=frames[~held],
        held_out=frames[held],
        universe=universe,
        potential=potential,
    )


def chignolin_start(public: Path) -> tuple[Universe, OpenMMPotential]:
    """Return the folded structure of CLN025 and its energies."""
    system, topology = simulate.chignolin_system(public)
    start = simulate.start_nm(public / "pccg" / "cln025.prmcrd") * units.nm
    return universe_from(_topology(topology, system), start[None]), OpenMMPotential(system)


def adenylate_kinase(public: Path, runs: Path) -> System:
    """AdK, 3341 atoms, Cα beads: the DIMS transition of MDAnalysisTests, first and second half."""
    from MDAnalysisTests.datafiles import DCD, PSF

    universe = Universe(PSF, DCD)
    frames = ReferenceData(
        positions=np.array([ts.positions for ts in universe.trajectory], float),
        time_ps=[ts.time for ts in universe.trajectory],
    )
    half = len(frames) // 2
    return System(
        name="adenylate_kinase",
        cg_map=cg_map(universe, "ca"),
        temperature_K=300.0,
        data=frames[:half],
        held_out=frames[half:],
        universe=universe,
    )


def box(public: Path, runs: Path, name: str) -> System:
    """Return a box of methanol or water, one bead per molecule; held out: the last fifth."""
    frames = ReferenceData.load(runs / f"{name}.npz")
    system, topology = simulate.box_system(public, name)
    universe = universe_from(_topology(topology, system), frames.positions[:1])
    lengths = np.array(simulate.BOXES[name].lengths_nm) * units.nm
    universe.dimensions = [*lengths, 90.0, 90.0, 90.0]
    cut = len(frames) * 4 // 5
    return System(
        name=name,
        cg_map=cg_map(universe, "molecule-com"),
        temperature_K=300.0,
        data=frames[:cut],
        held_out=frames[cut:],
        universe=universe,
        box=lengths,
    )


SYSTEMS: dict[str, Callable[[Path, Path], System]] = {
    "alanine_slices": partial(alanine, beads="slices"),
    "alanine_com": partial(alanine, beads="com"),
    "ethane": ethane,
    "chignolin": chignolin,
    "adenylate_kinase": adenylate_kinase,
    **{name: partial(box, name=name) for name in simulate.BOXES},
}


def load(name: str, public: Path | None = None, runs: Path | None = None) -> System:
    """Load a system of `SYSTEMS`; folders default to $CCG_DATA and $CCG_RUNS."""
    return SYSTEMS[name](simulate.folder(public, "CCG_DATA"), simulate.folder(runs, "CCG_RUNS"))


# ----------------------------------------------------------------------- potentials and topology


def _topology(topology: app.Topology, system: openmm.System) -> Topology:
    """Convert an OpenMM topology; its bonds hold no H-H "bonds" of rigid water, unlike a prmtop."""
    atoms = list(topology.atoms())
    nonbonded = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    return Topology(
        names=tuple(atom.name for atom in atoms),
        masses=np.array([system.getParticleMass(atom.index)._value for atom in atoms]),
        elements=tuple(atom.element.symbol for atom in atoms),
        resnames=tuple(atom.residue.name for atom in atoms),
        resids=np.array([atom.residue.index + 1 for atom in atoms]),
        bonds=np.array([(a.index, b.index) for a, b in topology.bonds()]),
        charges=np.array([nonbonded.getParticleParameters(a.index)[0]._value for a in atoms]),
    )


def _ethane_system(file: Path) -> openmm.System:
    """Build the force field that the ethane frames were made with.

    The stored forces show what the file doesn't say: all harmonic terms carry a factor 1/2, and
    there are no non-bonded terms within the molecule.
    """
    tables = tomllib.loads(file.read_text())

    def row(section: str, table: str, *key: str) -> list[float]:
        lines = (line.split("#")[0].split(",") for line in tables[section][table].splitlines())
        cells = ([cell.strip() for cell in line] for line in lines)
        return next(list(map(float, c[len(key) :])) for c in cells if tuple(c[: len(key)]) == key)

    carbons, hydrogens = (0, 1), {0: (2, 3, 4), 1: (5, 6, 7)}
    system = openmm.System()
    for kind in ("CH3",) * 2 + ("HC",) * 6:
        system.addParticle(row("nonbonded", "atomtypes", kind)[1])
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    torsions = openmm.PeriodicTorsionForce()
    bonds.addBond(*carbons, *row("bonded", "bondtypes", "CH3", "CH3"))
    for c in carbons:
        for h in hydrogens[c]:
            bonds.addBond(c, h, *row("bonded", "bondtypes", "CH3", "HC"))
        pairs = [("HC", i, j) for i, j in combinations(hydrogens[c], 2)]
        pairs += [("CH3", h, 1 - c) for h in hydrogens[c]]
        for kind, i, j in pairs:
            degrees, per_degree2 = row("bonded", "angletypes", "HC", "CH3", kind)
            angles.addAngle(i, c, j, np.radians(degrees), per_degree2 * np.degrees(1) ** 2)
    phase, stiffness, fold = row("bonded", "dihedraltypes", "HC", "CH3", "CH3", "HC")
    for i, j in product(*hydrogens.values()):
        torsions.addTorsion(i, *carbons, j, int(fold), np.radians(phase), stiffness)
    for force in (bonds, angles, torsions):
        system.addForce(force)
    return system


# --------------------------------------------------------------------------------- command line


def show(name: str, public: Path, runs: Path) -> None:
    """Print what a system holds, and how well its potential reproduces the stored frames."""
    system = load(name, public, runs)
    m, data = system.cg_map, system.data
    print(f"{name}: {m.n_atoms} atoms, {len(m.atoms.bonds)} bonds, {m.n_beads} '{m.kind}' beads, "
          f"{system.temperature_K:.3f} K, {len(data)} + {len(system.held_out)} frames, "
          f"forces: {data.forces is not None}, box: {system.box}")  # fmt: skip
    bonds = m.atoms.bonds
    lengths = np.linalg.norm(np.diff(data.positions[:, bonds], axis=2), axis=-1)
    print(f"  bonds: {lengths.min():.3f} to {lengths.max():.3f} Å, "
          f"smallest sd {lengths.std(axis=0).min():.1e} Å")  # fmt: skip
    if system.potential is not None and data.forces is not None:
        some = data[np.linspace(0, len(data) - 1, 200).astype(int)]
        energy, forces = system.potential(some.positions)
        print(f"  potential against stored frames: {np.abs(energy - some.energy).max():.1e} eV, "
              f"{np.abs(forces - some.forces).max():.1e} eV/Å at most")  # fmt: skip
    if name == "chignolin":
        _show_walkers(system, simulate.start_nm(public / "pccg" / "cln025.prmcrd") * units.nm)


def _show_walkers(system: System, folded: np.ndarray) -> None:
    target = system.cg_map.apply(folded)
    for part, label in ((system.data, ""), (system.held_out, ", held out")):
        for w in np.unique(part.walker):
            alphas = system.cg_map.apply(part.positions[part.walker == w])
            radius = np.sqrt(alphas.var(axis=1).sum(axis=-1))
            far = np.array([rmsd(x, target, superposition=True) for x in alphas[::10]])
            kind = simulate.WALKERS[w]
            print(f"  walker {w:2d}: {'folded' if kind.folded else 'unfolded'} at first, "
                  f"{'Cα held' if kind.restrained else 'free'}, {len(alphas)} frames, Cα RMSD "
                  f"{far.min():.1f} to {far.max():.1f}, Rg {radius.min():.1f} to "
                  f"{radius.max():.1f} Å{label}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(SYSTEMS), help=" ".join(SYSTEMS))
    parser.add_argument("--public", help="folder of the public inputs; default $CCG_DATA")
    parser.add_argument("--runs", help="folder of the simulated frames; default $CCG_RUNS")
    args = parser.parse_args()
    for name in args.names:
        show(name, simulate.folder(args.public, "CCG_DATA"), simulate.folder(args.runs, "CCG_RUNS"))


if __name__ == "__main__":
    main()
