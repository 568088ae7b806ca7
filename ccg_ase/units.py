"""Units used inside ccg: eV, Å, Da, K and ASE time (Å·√(Da/eV))."""

from __future__ import annotations

from ase import units

KB_eV: float = units.kB
"""Boltzmann's constant in eV/K."""


def thermal_energy(temperature_K: float) -> float:
    """Return kT in eV.

    Parameters
    ----------
    temperature_K
        Temperature in K, positive and finite.

    Raises
    ------
    ValueError
        If the temperature isn't a positive finite number.
    """
    if not 0.0 < temperature_K < float("inf"):
        raise ValueError(f"temperature_K must be positive and finite, got {temperature_K!r}")
    return KB_eV * float(temperature_K)
