"""Find what is wrong with reference data before hours of training show it.

The central test is generalised equipartition (`equipartition.py`): a wrong force unit, a sign, a
wrong temperature, constraints or forces of other frames all break it, whatever the potential.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from ase import units

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .constraint_check import check_constraints
from .equipartition import equipartition_ratio
from .findings import Finding, faulty
from .mapping_check import check_mapping
from .metrics import independent_samples
from .reference import ReferenceData

if TYPE_CHECKING:
    from ccg_mda.potential import Potential

_KJ, _KCAL = units.mol / units.kJ, units.mol / units.kcal
# What forces look like, relative to eV/Å, when they are written in another unit.
FORCE_UNITS = {
    "kJ/mol/Å": _KJ,
    "kcal/mol/Å": _KCAL,
    "kJ/mol/nm": 10 * _KJ,
    "kcal/mol/nm": 10 * _KCAL,
    "eV/nm": 10.0,
    "Hartree/bohr": units.Bohr / units.Hartree,
    "eV/Å, divided by 96.485 once too often": 1 / _KJ,
}


def check(
    data: ReferenceData,
    cg_map: CGMap | TorsionMap,
    temperature_K: float,
    potential: Potential | None = None,
) -> list[Finding]:
    """Check reference data against a mapping, a temperature and, where given, a potential.

    Parameters
    ----------
    data
        Reference frames.
    cg_map
        The mapping that will be trained.
    temperature_K
        Temperature that the data are said to have.
    potential
        Potential that the data are said to come from; it is called for five frames.

    Returns
    -------
    list of Finding
        In the order of the checks; takes seconds.
    """
    if data.n_atoms != cg_map.n_atoms:
        return [
            Finding(
                "error",
                "number of atoms",
                f"the data have {data.n_atoms} atoms, the mapping has {cg_map.n_atoms}",
                "use the topology that the data were made with",
            )
        ]
    # Each check presumes that the ones before found nothing: one fault, one error.
    findings = list(_geometry(data, cg_map))
    rigid = [] if faulty(findings) else list(check_constraints(_few(data), cg_map))
    findings += rigid
    if data.forces is None:
        findings.append(
            Finding(
                "warning",
                "no forces",
                "the data hold positions only: the potential has to compute the forces, one call a "
                "frame, and nothing shows whether it is the one that made the data",
                'write TRR or H5MD with forces, give forces_file, or use source = "generate"',
            )
        )
    if potential is not None and not faulty(findings):
        findings.append(_potential(data, potential))
    # A bias along s takes part in equipartition, and isn't in the forces.
    if data.forces is not None and not data.biased and not rigid and not faulty(findings):
        findings.append(_virial(data, cg_map, temperature_K))
    return [*check_mapping(cg_map), *findings, _sampling(data, cg_map)]


def _few(data: ReferenceData) -> np.ndarray:
    return data.positions[:: max(1, len(data) // 2000)]


def _geometry(data: ReferenceData, cg_map: CGMap | TorsionMap) -> Iterator[Finding]:
    bonds = cg_map.atoms.bonds
    if not len(bonds):
        return
    few = _few(data)
    lengths = np.linalg.norm(few[:, bonds[:, 0]] - few[:, bonds[:, 1]], axis=-1)
    typical = float(np.median(lengths))
    for unit, factor in (("nm", 10.0), ("pm", 0.01), ("bohr", units.Bohr)):
        if not 0.8 < typical < 1.95 and 0.8 < typical * factor < 1.95:
            yield Finding(
                "error",
                "unit of the positions",
                f"the median bond is {typical:.3g} Å; this is right if the positions are in {unit}",
                f"multiply the positions by {factor:.4g} to have Å",
            )
            return
    if lengths.max() > max(3.0, 2 * typical):
        bond = lengths.max(axis=0).argmax()
        i, j = (cg_map.atoms.names[k] for k in bonds[bond])
        yield Finding(
            "error",
            "broken molecule",
            f"bond {i}-{j} is up to {lengths.max():.1f} Å long: the molecule is split by a "
            "periodic box, or the bonds belong to another molecule",
            "make the molecule whole (gmx trjconv -pbc mol, or MDAnalysis unwrap)",
        )


def _nearest_unit(ratio: float) -> tuple[str, float]:
    """Return the unit whose forces look larger than in eV/Å by about `ratio`, and by how much."""
    return min(FORCE_UNITS.items(), key=lambda item: abs(np.log(ratio / item[1])))


def _virial(data: ReferenceData, cg_map: CGMap | TorsionMap, temperature_K: float) -> Finding:
    ratio, error = equipartition_ratio(data.positions, data.forces, cg_map.atoms, temperature_K)
    tolerance = max(4 * error, 0.02)
    seen = f"-<v.f> / kT<div v> = {ratio:.4g} ± {error:.1g}, expected 1"
    if abs(ratio - 1) <= tolerance:
        return Finding("ok", "forces fit the temperature", seen)
    if ratio < 0:
        sign = "they look like gradients" if abs(ratio + 1) <= tolerance else "sign or unit"
        return Finding(
            "error",
            "sign of the forces",
            f"{seen}; {sign}",
            "multiply the forces by -1" if "grad" in sign else "check how the forces were written",
        )
    unit, factor = _nearest_unit(ratio)
    if abs(np.log(ratio / factor)) < 0.3:
        return Finding(
            "error",
            "unit of the forces",
            f"{seen}; forces in {unit} would give {factor:.4g}",
            f"divide the forces by {factor:.6g} to have eV/Å",
        )
    if 0.5 < ratio < 2:
        implied = temperature_K * ratio
        return Finding(
            "error",
            "temperature",
            f"{seen}; the forces say {implied:.1f} ± {temperature_K * error:.1g} K, "
            f"not {temperature_K:g} K",
            f"set temperature_K = {implied:.0f}, or look for constraints, restraints and forces "
            "that were averaged or belong to other frames",
        )
    return Finding(
        "error",
        "forces don't belong to the positions",
        f"{seen}, and no usual unit explains it",
        "check that forces and positions are of the same frames, atoms and order of atoms",
    )


def _potential(data: ReferenceData, potential: Potential) -> Finding:
    picked = data[np.unique(np.linspace(0, len(data) - 1, 5).astype(int))]
    energy, forces = potential(picked.positions)
    if not np.isfinite(energy).all():
        return Finding(
            "error",
            "potential",
            "the potential isn't finite on the data",
            "check the order of the atoms in the topology of the potential and of the data",
        )
    parts = []
    if picked.forces is not None:
        factor = float((forces * picked.forces).sum() / (forces**2).sum())
        rest = picked.forces - factor * forces
        off = float(np.sqrt((rest**2).mean() / (forces**2).mean()))
        if off > 0.01 * abs(factor):
            return Finding(
                "error",
                "potential",
                f"recomputed forces of {len(picked)} frames differ from the stored ones (slope "
                f"{factor:.4g}, relative rest {off:.2g}): another force field, cut-off or order of "
                "atoms",
                "use the force field that made the data",
            )
        if abs(factor - 1) > 0.01:
            unit, usual = _nearest_unit(abs(factor))
            known = abs(abs(factor) / usual - 1) < 0.01
            return Finding(
                "error",
                "unit of the forces" if factor > 0 else "sign of the forces",
                f"all stored forces are {factor:.5g} times those of the potential"
                + (f"; forces in {unit} would be {usual:.5g} times" if known else ""),
                f"divide the forces by {factor:.6g} to have eV/Å",
            )
        parts.append(f"forces to {max(off, abs(factor - 1)):.1g}")
    if picked.energy is not None:
        shift = picked.energy - energy
        spread = float(np.ptp(shift))
        if spread > 0.02 * max(float(np.ptp(energy)), 0.1):
            return Finding(
                "error",
                "potential",
                f"recomputed energies of {len(picked)} frames differ from the stored ones by "
                f"{shift.min():.3g} to {shift.max():.3g} eV; only a constant shift is harmless",
                "use the force field that made the data, with energies in eV",
            )
        parts.append(f"energies to {spread:.1g} eV, shift {shift.mean():.3g} eV")
    if not parts:
        return Finding("ok", "potential", "evaluates the data; no stored values to compare with")
    return Finding("ok", "potential", f"reproduces {len(picked)} frames: {', '.join(parts)}")


def _sampling(data: ReferenceData, cg_map: CGMap | TorsionMap) -> Finding:
    """Say how many independent values the slowest coarse variable has."""
    if len(data) < 1000:
        return Finding(
            "warning",
            "few frames",
            f"{len(data)} frames; below some thousand the backmapper learns them by heart",
            "store more frames, or simulate longer",
        )
    independent, slowest = float(len(data)), ""
    for name, values in _slow_variables(data, cg_map):
        count = sum(
            independent_samples(values[data.walker == walker]) for walker in np.unique(data.walker)
        )
        if count < independent:
            independent, slowest = count, f" ({name})"
    detail = (
        f"{len(data)} frames of {len(np.unique(data.walker))} walkers; the slowest coarse "
        f"variable{slowest} has about {independent:.0f} independent values"
    )
    if independent < 100:
        cure = "simulate longer or with more walkers; frames stored more often don't help"
        return Finding("warning", "slow sampling", detail, cure)
    return Finding("ok", "sampling", detail)


def _slow_variables(
    data: ReferenceData, cg_map: CGMap | TorsionMap
) -> Iterator[tuple[str, np.ndarray]]:
    """Name distances between some beads, or cosines and sines of the torsions; (n_frames,) each."""
    coarse = cg_map.apply(data.positions)
    if isinstance(cg_map, TorsionMap):
        for name, angle in zip(cg_map.names, coarse.T, strict=True):
            yield f"cos {name}", np.cos(angle)
            yield f"sin {name}", np.sin(angle)
        return
    i, j = np.triu_indices(cg_map.n_beads, 2)
    if not len(i):
        i, j = np.triu_indices(cg_map.n_beads, 1)
    pick = np.unique(np.linspace(0, len(i) - 1, 12).astype(int)) if len(i) else []
    for a, b in zip(i[pick], j[pick], strict=True):
        distance = np.linalg.norm(coarse[:, a] - coarse[:, b], axis=-1)
        yield f"{cg_map.beads.names[a]}-{cg_map.beads.names[b]}", distance
