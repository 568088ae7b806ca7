"""Bring what older model files hold up to the current format, one version at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Header, Tensors = dict[str, Any], dict[str, Tensor]


def upgrade(header: Header, tensors: Tensors) -> tuple[Header, Tensors]:
    """Return header and tensors of a file as the current format would have them."""
    for step in _STEPS[header["version"] - 1 :]:
        header, tensors = step(header, tensors)
    return header, tensors


def _from_1(header: Header, tensors: Tensors) -> tuple[Header, Tensors]:
    """Version 1 knew maps to beads only, and its backmappers were another network."""
    configs = dict(header["configs"])
    retired = {}
    if configs.pop("backmapper", None) is not None:
        retired["backmapper"] = (
            "was trained by a version of ccg before model format 2, whose network no longer "
            "exists: retrain it (ccg train); the file's other parts still work"
        )
    cg_map = {"kind": "beads", **header["cg_map"]}
    return {**header, "configs": configs, "cg_map": cg_map, "retired": retired}, tensors


def _from_2(header: Header, tensors: Tensors) -> tuple[Header, Tensors]:
    """Version 2 had one network per force field, and priors by the index of every bead."""
    configs = dict(header["configs"])
    if "force_field" not in configs:
        return header, tensors
    config = dict(configs["force_field"])
    old, beads = config["prior"], header["cg_map"]["beads"]
    types = beads["types"]
    # The contact distance of a pair of beads was that of their types.
    volumes = {tuple(sorted((types[i], types[j]))): [d, a] for i, j, d, a in old["volumes"]}
    config["prior"] = {
        "temperature_K": old["temperature_K"],
        "molecules": [
            {"types": types, "links": sorted(map(sorted, beads["bonds"]))}
            | {kind: old[kind] for kind in ("bonds", "angles", "dihedrals")}
        ],
        "volumes": [[*pair, *values] for pair, values in sorted(volumes.items())],
    }
    configs["force_field"] = config
    renamed = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if part == "force_field" and name.partition(".")[0] in ("encoder", "hidden", "out"):
            key = f"{part}/members.0.{name}"
        renamed[key] = tensor
    renamed["force_field/reference_box"] = torch.zeros(3, 3).to(renamed["force_field/scale"])
    return {**header, "configs": configs}, renamed


def _from_3(header: Header, tensors: Tensors) -> tuple[Header, Tensors]:
    """Version 3 had volumes of beads more than 3 bonds apart only."""
    configs = dict(header["configs"])
    if "force_field" in configs:
        prior = configs["force_field"]["prior"]
        volumes = [[a, b, 0, d, energy] for a, b, d, energy in prior["volumes"]]
        config = {**configs["force_field"], "prior": {**prior, "volumes": volumes}}
        configs["force_field"] = config
    return {**header, "configs": configs}, tensors


_STEPS: tuple[Callable[[Header, Tensors], tuple[Header, Tensors]], ...] = (
    _from_1,
    _from_2,
    _from_3,
)
