"""From a configuration to the things it names: the mapping, the potential, the check of both."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ccg_ase.devices import available
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .config import Config
from .data_check import check
from .distributed import processes_here
from .findings import Finding, faulty
from .mapping_check import check_mapping
from .reference import ReferenceData, ReferenceDataError, read_structure, trajectory_of

if TYPE_CHECKING:
    from MDAnalysis import Universe

    from ccg_mda.placement import Placement
    from ccg_mda.potential import CheckedPotential, OpenMMPotential


def universe_of(config: Config) -> Universe:
    """Return the Universe of the topology file, with its one frame."""
    return read_structure(config.system.topology)


def mapping_of(config: Config) -> CGMap | TorsionMap:
    """Return the map of the [mapping] section."""
    from ccg_mda.universe import cg_map, torsion_map

    mapping, universe = config.mapping, universe_of(config)
    if mapping.torsions:
        return torsion_map(universe, mapping.torsions)
    beads = mapping.beads or mapping.preset
    return cg_map(universe, beads, per=mapping.per, weighting=mapping.weighting)


def placement_of(config: Config, cg_map: CGMap | TorsionMap) -> Placement:
    """Return how `ccg train` will place atoms, as far as the structure file shows."""
    from ccg_mda.placement_order import build_placement
    from ccg_mda.surroundings import sight_A

    structure = universe_of(config).atoms.positions.astype(float)
    return build_placement(
        cg_map,
        hops=config.flow.hops,
        positions=structure[None],
        branches_last=sight_A(cg_map, config.flow.around_A) > 0.0,
    )


def potential_of(config: Config) -> CheckedPotential:
    """Return the potential of the [potential] section, to be evaluated where [run] says.

    On a GPU that is torch, or OpenMM with a warning where torch can't; on CPUs OpenMM in processes.

    Raises
    ------
    ValueError, NotImplementedError
        If there is no such device, or torch is asked for and can't.
    """
    from ccg_mda.parallel_potential import ParallelPotential, usable_cores
    from ccg_mda.torch_potential import TorchSystemPotential

    openmm = openmm_potential_of(config)
    device, evaluate = available(config.run.device), config.potential.evaluate
    if evaluate == "torch":
        return TorchSystemPotential.from_system(openmm.system, device=device)
    if evaluate == "auto" and device.type != "cpu":
        try:
            return TorchSystemPotential.from_system(openmm.system, device=device)
        except NotImplementedError as error:
            warnings.warn(f"energies come from OpenMM on the CPU: {error}", stacklevel=2)
    workers = config.run.workers or max(1, usable_cores() // processes_here())
    return ParallelPotential(openmm, workers)


def openmm_potential_of(config: Config) -> OpenMMPotential:
    """Return the OpenMM System of the [potential] section, for dynamics.

    Raises
    ------
    ReferenceDataError
        If a System from a file has another number of atoms than the topology.
    """
    from ccg_mda.potential import OpenMMPotential

    topology, settings = config.system.topology, config.potential
    if settings.system is None:
        return OpenMMPotential.from_pdb(topology, settings.forcefield)
    potential, n_atoms = OpenMMPotential.from_xml(settings.system), len(universe_of(config).atoms)
    if potential.n_atoms != n_atoms:
        raise ReferenceDataError(
            f"{settings.system} has {potential.n_atoms} atoms, the topology {topology} {n_atoms}: "
            "give the System of this molecule, its atoms in the same order"
        )
    return potential


def first_config(topology: Path, forcefield: list[str] | None, folder: Path) -> Config:
    """Return a configuration to begin with: backbone beads for a peptide, else heavy atoms.

    Parameters
    ----------
    topology
        PDB file.
    forcefield
        OpenMM force-field files; default: those of `Config`.
    folder
        Where the TOML file will lie; paths in it start from there.
    """
    atoms = read_structure(topology).atoms
    peptide = len(atoms.select_atoms("protein and name CA")) > 0
    sections = {
        "system": {"topology": topology.resolve()},
        "mapping": {"preset": "backbone" if peptide else "heavy"},
    }
    if forcefield:
        sections["potential"] = {"forcefield": forcefield}
    return Config.build(sections, folder)


def check_system(config: Config) -> list[Finding]:
    """Check what a configuration names, and the reference data as far as they exist."""
    cg_map, potential = mapping_of(config), potential_of(config)
    start = universe_of(config).atoms.positions.astype(float)
    energy, forces = potential(start)
    findings = []
    if np.isfinite(energy):
        strongest = float(np.linalg.norm(forces, axis=-1).max())
        detail = f"energy {float(energy):.3f} eV, strongest force {strongest:.2f} eV/Å"
        findings.append(Finding("ok", "starting structure", detail))
    else:
        findings.append(
            Finding(
                "error",
                "starting structure",
                "its energy isn't finite: atoms lie on each other",
                "minimise the structure first, or repair it",
            )
        )
    data = known_data(config)
    if data is None:
        detail = _to_be_made(config)
        findings += [*check_mapping(cg_map), Finding("ok", "reference data", detail)]
    else:
        findings += check(data, cg_map, config.system.temperature_K, potential)
    if not faulty(findings):
        placement = placement_of(config, cg_map)
        detail = (
            f"{len(placement.atoms)} atoms in {int(placement.generation.max(initial=-1)) + 1} "
            "generations; the table: ccg info CONFIG --placement"
        )
        findings.append(Finding("ok", "placement", detail))
    return findings


def _to_be_made(config: Config) -> str:
    """Say what reference data ccg train will make."""
    settings = config.reference
    if settings.source == "structure":
        return (
            f"ccg train will make {settings.restrained_ps:g} ps at each of {settings.n_states} "
            f"coarse states, found by {settings.hot_time_ps:g} ps at "
            f"{settings.hot_temperature_K:g} K"
        )
    return f"{settings.time_ns:g} ns will be generated by ccg train"


def known_data(config: Config) -> ReferenceData | None:
    """Return reference data that exist already: of this run, or of the files it names."""
    stored = config.run.directory / "reference.npz"
    if stored.is_file():
        return ReferenceData.load(stored)
    return trajectory_of(config) if config.reference.source == "trajectory" else None
