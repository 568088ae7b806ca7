"""What every reader of OpenMM Systems needs: units, checks, XML.

The border of units: where these two factors are used, OpenMM's nm and kJ/mol become Å and eV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ase import units

if TYPE_CHECKING:
    import openmm

NM_PER_A = 0.1
EV_PER_KJ_MOL = units.kJ / units.mol


def check_system(system: openmm.System) -> None:
    """Refuse an OpenMM System whose energy isn't a function of free atoms in open space.

    Raises
    ------
    ValueError
        If the System holds constraints or virtual sites: their atoms aren't free, so that the
        energy isn't a function of all coordinates and weights would be wrong.
    NotImplementedError
        If the System is periodic.
    """
    if system.getNumConstraints():
        raise ValueError(
            f"the OpenMM System holds {system.getNumConstraints()} constraints; build it with "
            "constraints=None and rigidWater=False"
        )
    if any(system.isVirtualSite(i) for i in range(system.getNumParticles())):
        raise ValueError("the OpenMM System holds virtual sites; use a model without them")
    if system.usesPeriodicBoundaryConditions():
        raise NotImplementedError(
            "periodic OpenMM Systems aren't supported yet; use nonbondedMethod=NoCutoff"
        )


def read_xml(text: str, origin: str) -> openmm.System:
    """Return the System of an XML text by `openmm.XmlSerializer`.

    Raises
    ------
    ValueError
        If it holds none; the message names the text by `origin`.
    """
    import openmm

    try:
        system = openmm.XmlSerializer.deserialize(text)
    except (ValueError, openmm.OpenMMException) as error:
        raise ValueError(f"{origin} isn't an OpenMM XML file ({error})") from error
    if not isinstance(system, openmm.System):
        raise ValueError(f"{origin} holds a {type(system).__name__}, not a System")
    return system
