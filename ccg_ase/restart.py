"""Restart files: the state of a run, and the settings without which it means nothing."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ccg_ase.checkpoint import content_digest
from ccg_ase.files import replaced
from ccg_ase.forcefield import ForceField

_FORMAT = "ccg restart 1"


def force_field_digest(force_field: ForceField) -> str:
    """Return a hash of what a force field computes: map, temperature, terms, all numbers."""
    config = json.dumps(force_field.config, sort_keys=True)
    text = f"{force_field.cg_map.fingerprint()} {force_field.temperature_K} {config}"
    return content_digest(text, force_field)[:16]


def restraint_digest(restraint: Callable[..., Any]) -> str:
    """Return a hash of a restraint: of a module its numbers, of a function its name only."""
    if isinstance(restraint, nn.Module):
        return content_digest(type(restraint).__qualname__, restraint)[:16]
    return getattr(restraint, "__qualname__", type(restraint).__qualname__)


def write_restart(
    path: str | os.PathLike[str], settings: dict[str, Any], state: dict[str, Any]
) -> None:
    """Write plain numbers and tensors in one step: a crash leaves the old file."""
    with replaced(path) as file:
        torch.save({"format": _FORMAT, "settings": settings, "state": state}, file)


def read_restart(path: str | os.PathLike[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a restart file; runs no code from the file.

    Parameters
    ----------
    path
        The file.
    settings
        Those of the run that continues.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no restart file, or was written under other settings; these are named.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no restart file at {os.fspath(path)}")
    try:
        if not zipfile.is_zipfile(path):  # torch.load would take it for an ancient format
            raise EOFError
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise KeyError("format")
    except (KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{os.fspath(path)} isn't a restart file of this version of ccg, or is truncated: "
            "start the run anew"
        ) from error
    written = content["settings"]
    differing = [key for key in settings if written.get(key) != settings[key]]
    if differing:
        found = "; ".join(
            f"{key}: {written.get(key)} there, {settings[key]} here" for key in differing
        )
        raise ValueError(
            f"{os.fspath(path)} was written by another run ({found}): continue with what it was "
            "started with, or start anew from its positions"
        )
    return content["state"]
