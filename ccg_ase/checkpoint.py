"""The model file ``*.ccg``: safetensors with a versioned JSON header. Loading runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ccg_ase.files import replaced
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy
from ccg_ase.upgrades import upgrade

FORMAT, VERSION = "ccg", 4
_MAPS = {"beads": CGMap, "torsions": TorsionMap}
_HEADER = "ccg"  # the one metadata key that holds the JSON text
Part = TypeVar("Part", bound=nn.Module)


class ModelFileError(ValueError):
    """A model file can't be read: truncated, foreign, too new, or without the part asked for."""


@dataclass
class ModelFile:
    """Content of a model file.

    Parameters
    ----------
    cg_map
        The map: beads, with both topologies, or torsions.
    temperature_K
        Temperature in K that all parts were made for.
    configs, states
        Constructor arguments and state dictionary of each part, by part name.
    provenance, metrics
        JSON-able records of how the model was made and how good it is.
    version
        Format version that the file was written in.
    retired
        Parts of an older file that no longer exist in that form, each with what to do about it.
    device
        Where parts are put.
    """

    cg_map: CGMap | TorsionMap
    temperature_K: float
    configs: dict[str, dict[str, Any]]
    states: dict[str, dict[str, Tensor]]
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION
    retired: dict[str, str] = field(default_factory=dict)
    device: str | torch.device = "cpu"

    def restore(self, name: str, kind: type[Part]) -> Part:
        """Rebuild a part: `kind.from_config`, then its state, strictly, in stored precision.

        Raises
        ------
        ModelFileError
            If there is no such part, it is of an older kind, or its tensors don't fit.
        """
        if name in self.retired:
            raise ModelFileError(f"the '{name}' of this model file {self.retired[name]}")
        if name not in self.configs:
            held = ", ".join(sorted(self.configs)) or "no parts"
            raise ModelFileError(f"the model file holds no '{name}', it holds: {held}")
        part = kind.from_config(self.cg_map, self.temperature_K, self.configs[name])
        state = self.states[name]
        floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        if len(floating) == 1:
            part = part.to(floating.pop())
        try:
            part.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ModelFileError(
                f"the tensors of '{name}' don't fit its config: {error}"
            ) from error
        return part.to(self.device)


def save_model(
    path: str | os.PathLike[str],
    *,
    cg_map: CGMap | TorsionMap,
    temperature_K: float,
    parts: Mapping[str, nn.Module],
    provenance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a model file in one step: readers see the old file or the new one, never half of it.

    Parameters
    ----------
    path
        Where to write, usually ``*.ccg``.
    cg_map, temperature_K
        What the parts are about.
    parts
        Modules by name, ``force_field`` and ``backmapper``, each with a JSON-able ``config``.
    provenance, metrics
        JSON-able records.

    Raises
    ------
    ValueError
        If a part lacks a ``config``, a name is unusable, or a record isn't JSON-able.
    """
    thermal_energy(temperature_K)
    tensors: dict[str, Tensor] = {}
    configs = {}
    for name, part in parts.items():
        if not name.isidentifier():
            raise ValueError(f"part name {name!r} must be a plain identifier")
        if not isinstance(getattr(part, "config", None), dict):
            raise ValueError(f"part '{name}' ({type(part).__name__}) has no `config` dictionary")
        configs[name] = part.config
        for key, tensor in part.state_dict().items():
            # safetensors refuses shared and strided memory.
            tensors[f"{name}/{key}"] = tensor.detach().cpu().clone().contiguous()
    header = {
        "format": FORMAT,
        "version": VERSION,
        "temperature_K": float(temperature_K),
        "cg_map": map_to_dict(cg_map),
        "configs": configs,
        "provenance": dict(provenance or {}),
        "metrics": dict(metrics or {}),
    }
    try:
        text = json.dumps(header)
    except TypeError as error:
        raise ValueError(f"configs, provenance and metrics must be JSON-able: {error}") from error
    with replaced(path) as file:  # with the user's usual permissions, unlike save_file
        file.write(save(tensors, metadata={_HEADER: text}))


def content_digest(text: str, module: nn.Module) -> str:
    """Return the SHA-256 of a text and of all numbers that a module holds."""
    digest = hashlib.sha256(text.encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_model(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> ModelFile:
    """Read a model file; its parts will be put on a device, whichever they were written on.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ModelFileError
        If it is truncated, not a ccg model, or of a newer version than this ccg knows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelFileError(
            f"{path} isn't a readable model file; it is truncated or of another format ({error})"
        ) from error
    try:
        header = json.loads(metadata[_HEADER])
        if header["format"] != FORMAT:
            raise KeyError("format")
        version = int(header["version"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} is a safetensors file, but not a ccg model") from error
    if version > VERSION:
        raise ModelFileError(
            f"{path} has format version {version}; this ccg reads up to {VERSION}: upgrade ccg"
        )
    if version < 1:
        raise ModelFileError(f"{path} has format version {version}; the first is 1")
    header, tensors = upgrade(header, tensors)
    retired = header.get("retired", {})
    states: dict[str, dict[str, Tensor]] = {name: {} for name in header["configs"]}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("/")
        if name in retired:
            continue
        if name not in states:
            raise ModelFileError(f"{path} holds tensors of an unknown part '{name}'")
        states[name][entry] = tensor
    return ModelFile(
        cg_map=map_from_dict(header["cg_map"]),
        temperature_K=header["temperature_K"],
        configs=header["configs"],
        states=states,
        provenance=header["provenance"],
        metrics=header["metrics"],
        version=version,
        retired=retired,
        device=device,
    )


def map_to_dict(cg_map: CGMap | TorsionMap) -> dict[str, Any]:
    """Return a JSON-able dictionary of a map of any kind; `map_from_dict` reads it back."""
    (kind,) = (kind for kind, of_kind in _MAPS.items() if isinstance(cg_map, of_kind))
    return {"kind": kind, **cg_map.to_dict()}


def map_from_dict(values: dict[str, Any]) -> CGMap | TorsionMap:
    """Build the map that `map_to_dict` described."""
    values = dict(values)
    return _MAPS[values.pop("kind")].from_dict(values)
