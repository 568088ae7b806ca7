"""What a model file or a configuration holds, as titled tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ccg_ase.checkpoint import ModelFile, load_model
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap
from ccg_mda.placement import Placement, atom_label

from .config import Config

if TYPE_CHECKING:
    from ccg_ase.topology import Topology

COORDINATES = ("bond", "angle", "dihedral")
Tables = list[tuple[str, list[dict[str, Any]]]]


def describe(path: Path, *, placement: bool) -> tuple[list[str], Tables]:
    """Return lines and tables about a model file, or about a configuration before training.

    Parameters
    ----------
    path
        Model file, or TOML file (by its ending).
    placement
        Whether to add how every atom is placed.
    """
    if path.suffix == ".toml":
        from .system import mapping_of, placement_of

        config = Config.load(path)
        cg_map = mapping_of(config)
        lines = [f"{path.name}: {config.system.temperature_K:g} K", _headline(cg_map)]
        tables = [_mapping_table(cg_map)]
        if placement:
            tables.append(("placement", placement_of(config, cg_map).table(cg_map)))
        return lines, tables
    return _describe_model(path.name, load_model(path), placement=placement)


def _describe_model(name: str, model: ModelFile, *, placement: bool) -> tuple[list[str], Tables]:
    cg_map = model.cg_map
    lines = [
        f"{name}: format {model.version}, {model.temperature_K:g} K",
        f"parts: {', '.join(sorted(model.configs)) or 'none'}",
        *(f"the {part} {why}" for part, why in model.retired.items()),
        _headline(cg_map),
    ]
    tables = [_mapping_table(cg_map)]
    if "force_field" in model.configs:
        from ccg_ase.forcefield import ForceField

        tables.append(("prior", ForceField.from_model(model).prior.table()))
    if "backmapper" in model.configs:
        config = model.configs["backmapper"]
        held = held_coordinates(config, cg_map)
        lines.append(f"held rigid: {', '.join(held) or 'nothing'}")
        if placement:
            tables.append(("placement", placement_rows(config, cg_map)))
    elif placement:
        from ccg_mda.flow import Backmapper

        Backmapper.from_model(model)  # raises: it says which parts there are
    for title, values in (("provenance", model.provenance), ("metrics", model.metrics)):
        if values:
            tables.append((title, [{"key": k, "value": v} for k, v in values.items()]))
    return lines, tables


def placement_rows(config: dict[str, Any], cg_map: CGMap | TorsionMap) -> list[dict[str, str]]:
    """Return one row per placed atom of a backmapper's config: references, rotor, what is held."""
    rows = Placement.from_dict(config["placement"]).table(cg_map)
    for row, rotor, rigid in zip(rows, config["rotor"], config["rigid"], strict=True):
        row["rotor"] = "yes" if rotor else ""
        row["held"] = " ".join(n for n, flag in zip(COORDINATES, rigid, strict=True) if flag)
    return rows


def held_coordinates(config: dict[str, Any], cg_map: CGMap | TorsionMap) -> list[str]:
    """Name the coordinates that a backmapper holds, e.g. ``bond ALA2:N-ALA2:H``.

    Parameters
    ----------
    config
        `Backmapper.config`.
    cg_map
        Its map.
    """
    placement = Placement.from_dict(config["placement"])
    names = []
    for row, rigid in zip(placement.table(cg_map), config["rigid"], strict=True):
        for k in np.flatnonzero(rigid):
            points = [row["atom"], *(row[name] for name in COORDINATES[: k + 1])]
            names.append(f"{COORDINATES[k]} {'-'.join(reversed(points))}")
    return names


def _headline(cg_map: CGMap | TorsionMap) -> str:
    coarse = (
        f"{len(cg_map.torsions)} torsions"
        if isinstance(cg_map, TorsionMap)
        else f"{cg_map.n_beads} beads"
    )
    return f"map {cg_map.fingerprint()}: {cg_map.n_atoms} atoms, {coarse}"


def _mapping_table(cg_map: CGMap | TorsionMap) -> tuple[str, list[dict[str, Any]]]:
    if isinstance(cg_map, TorsionMap):
        pairs = zip(cg_map.names, cg_map.torsions, strict=True)
        return "mapping", [{"torsion": n, "atoms": _labels(cg_map.atoms, row)} for n, row in pairs]
    return "mapping", [
        {
            "bead": f"{index} {name}",
            "mass (Da)": f"{cg_map.beads.masses[index]:.3f}",
            "made of": _labels(cg_map.atoms, cg_map.atom_index[cg_map.bead_index == index]),
            "owns": _labels(cg_map.atoms, (cg_map.owner == index).nonzero()[0]),
        }
        for index, name in enumerate(cg_map.beads.names)
    ]


def _labels(topology: Topology, atoms: Iterable[int]) -> str:
    return " ".join(atom_label(topology, i) for i in atoms)
