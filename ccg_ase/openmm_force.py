"""OpenMM drives the beads: the force field as an `openmm.PythonForce`, and a System to run it in.

The border of units: OpenMM's nm and kJ/mol become Å and eV here. OpenMM is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import units

from ccg_ase.evaluator import Evaluator
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap

if TYPE_CHECKING:
    import openmm
    import openmm.app

_ANGSTROM_PER_NM = units.nm / units.Angstrom
_KJ_MOL_PER_EV = units.mol / units.kJ
_TEMPERATURE_TOLERANCE_K = 1e-6


class BeadEnergy:
    """What `bead_force` hands to OpenMM: positions of a State in, energy and forces out.

    It pickles, as OpenMM's XmlSerializer needs to save the force.

    Parameters
    ----------
    force_field
        The force field; a copy is kept.
    periodic
        Whether the beads are in the State's periodic box.
    **settings
        Keyword arguments of `Evaluator`.
    """

    def __init__(self, force_field: ForceField, periodic: bool, **settings: Any):
        self._evaluate, self._periodic = Evaluator(force_field, **settings), periodic

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Return energy in kJ/mol and forces in kJ/mol/nm, shape (replicas * n_beads, 3).

        Raises
        ------
        ValueError
            If the number of particles isn't the number of beads.
        FloatingPointError
            If the energy or a force is NaN or infinite.
        """
        positions = _angstrom(state.getPositions(asNumpy=True))
        replicas, n = self._evaluate.replicas, self._evaluate.cg_map.n_beads
        if len(positions) != replicas * n:
            raise ValueError(
                f"the bead force is of {replicas} x {n} beads, but acts on {len(positions)} "
                "particles; build the System with bead_system, or choose with force.setParticles"
            )
        beads = torch.from_numpy(positions).view(replicas, n, 3).to(self._evaluate.device)
        box = None
        if self._periodic:
            rows = _angstrom(state.getPeriodicBoxVectors(asNumpy=True))
            box = torch.from_numpy(rows).to(self._evaluate.device)
        result = self._evaluate(beads, box)
        energy = float(result.energies.sum()) * _KJ_MOL_PER_EV
        forces = result.forces.reshape(-1, 3).cpu().numpy() * (_KJ_MOL_PER_EV * _ANGSTROM_PER_NM)
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise FloatingPointError(
                "the energy or a force of the beads is NaN or infinite; beads may overlap, or the "
                "time step be too long"
            )
        return energy, forces


def bead_force(
    force_field: ForceField, *, periodic: bool = False, **settings: Any
) -> openmm.PythonForce:
    """Return the force field as a force that any OpenMM System of its beads can hold.

    The Reference platform is the fastest for few beads: others move the positions about first.

    Parameters
    ----------
    force_field
        The force field; the force keeps a copy.
    periodic
        Whether the beads are in the System's periodic box.
    **settings
        ``replicas`` (1): the particles are this many copies of the beads, one after another, that
        don't see each other. ``temperature_K``, ``device``, ``dtype``, ``compiled`` as for
        `Evaluator`.

    Returns
    -------
    openmm.PythonForce
        Saved by XmlSerializer with the whole model, as a pickle: load such files from sources
        that you trust only.

    Raises
    ------
    ImportError
        If OpenMM isn't installed, or older than 8.5.
    """
    openmm = _openmm()
    force = openmm.PythonForce(BeadEnergy(force_field, periodic, **settings))
    force.setName("beads")
    force.setUsesPeriodicBoundaryConditions(periodic)
    return force


def bead_system(
    force_field: ForceField, *, box_A: np.ndarray | None = None, **settings: Any
) -> tuple[openmm.System, openmm.app.Topology]:
    """Return a System with masses and `bead_force`, and the Topology that reporters write.

    >>> system, topology = bead_system(force_field)
    >>> integrator = LangevinMiddleIntegrator(300 * kelvin, 1 / picosecond, 4 * femtoseconds)
    >>> simulation = Simulation(topology, system, integrator)
    >>> check_temperature(simulation.context, force_field.temperature_K)
    >>> simulation.context.setPositions(force_field.reference_beads.numpy() * angstrom)
    >>> simulation.reporters.append(DCDReporter("beads.dcd", 100))
    >>> simulation.step(10_000)

    Parameters
    ----------
    force_field
        The force field; the System keeps a copy.
    box_A
        Cell rows of a periodic box in Å, shape (3, 3), in OpenMM's reduced lower triangular form.
    **settings
        As for `bead_force`.

    Raises
    ------
    ImportError
        If OpenMM isn't installed, or older than 8.5.
    """
    openmm = _openmm()
    replicas = settings.get("replicas", 1)
    system, topology = openmm.System(), _topology(force_field.cg_map, replicas)
    for mass in np.tile(force_field.cg_map.beads.masses, replicas):
        system.addParticle(mass)
    system.addForce(bead_force(force_field, periodic=box_A is not None, **settings))
    if box_A is not None:
        rows = [openmm.Vec3(*row) for row in np.asarray(box_A, float) / _ANGSTROM_PER_NM]
        system.setDefaultPeriodicBoxVectors(*rows)
        topology.setPeriodicBoxVectors(rows)
        # OpenMM reads off the bonded forces what a molecule is: what it keeps whole when it wraps,
        # and what a barostat moves as one.
        bonds = openmm.HarmonicBondForce()
        bonds.setName("bonds without strength, to mark molecules")
        for first, second in topology.bonds():
            bonds.addBond(first.index, second.index, 0.0, 0.0)
        system.addForce(bonds)
    return system, topology


def check_temperature(context: openmm.Context, temperature_K: float) -> None:
    """Refuse a Context whose thermostat or barostat is at another temperature than the model.

    Constant-energy integrators pass, and so do custom ones: OpenMM can't tell their temperature.

    Parameters
    ----------
    context
        The Context to be run, ``simulation.context``.
    temperature_K
        Temperature in K at which the force field is evaluated.

    Raises
    ------
    ValueError
        If a temperature found there isn't `temperature_K`.
    """
    for owner, found_K in _temperatures(context):
        if not abs(found_K - temperature_K) <= _TEMPERATURE_TOLERANCE_K:
            raise ValueError(
                f"the bead energy is a free energy at {temperature_K} K, but the {owner} is at "
                f"{found_K:g} K; set it to {temperature_K} K or train another model"
            )


def _temperatures(context: openmm.Context) -> Iterator[tuple[str, float]]:
    """Yield all temperatures in K that the parts of a Context are set to, with their owners."""
    openmm = _openmm()
    integrator = context.getIntegrator()
    parts = [integrator]
    if isinstance(integrator, openmm.CompoundIntegrator):
        parts = [integrator.getIntegrator(k) for k in range(integrator.getNumIntegrators())]
    for part in parts:
        owner = type(part).__name__
        if isinstance(part, openmm.NoseHooverIntegrator):
            for chain in range(part.getNumThermostats()):
                yield owner, _kelvin(part.getTemperature(chain))
        elif hasattr(part, "getTemperature"):
            yield owner, _kelvin(part.getTemperature())
    for force in context.getSystem().getForces():
        # Thermostats and barostats name the parameter that holds their temperature.
        if hasattr(force, "Temperature"):
            yield type(force).__name__, context.getParameter(force.Temperature())


def _topology(cg_map: CGMap, replicas: int) -> openmm.app.Topology:
    """Describe copies of the beads: a chain per segment, names, residues and bonds."""
    _openmm()
    from openmm import app

    beads, topology = cg_map.beads, app.Topology()
    for _ in range(replicas):
        sites, segment, residue = [], None, None
        for bead, name in enumerate(beads.names):
            if beads.segids[bead] != segment:
                segment, residue = beads.segids[bead], None
                chain = topology.addChain(segment)
            place = (beads.molecules[bead], beads.resids[bead], beads.resnames[bead])
            if place != residue:
                residue = place
                group = topology.addResidue(beads.resnames[bead], chain, str(beads.resids[bead]))
            sites.append(topology.addAtom(name, None, group))
        for first, second in beads.bonds:
            topology.addBond(sites[first], sites[second])
    return topology


def _angstrom(lengths: openmm.unit.Quantity) -> np.ndarray:
    from openmm.unit import nanometer

    return lengths.value_in_unit(nanometer) * _ANGSTROM_PER_NM


def _kelvin(temperature: openmm.unit.Quantity) -> float:
    from openmm.unit import kelvin

    return temperature.value_in_unit(kelvin)


def _openmm() -> Any:
    """Import OpenMM, or say how to get it."""
    try:
        import openmm
    except ImportError as error:
        raise ImportError(
            'OpenMM runs this force and isn\'t installed: pip install "ccg[openmm]"'
        ) from error
    if not hasattr(openmm, "PythonForce"):
        raise ImportError(
            f"PythonForce came with OpenMM 8.5, but {openmm.__version__} is installed: "
            'pip install -U "openmm>=8.5"'
        )
    return openmm
