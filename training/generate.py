"""Generate reference data with OpenMM: independent walkers, in chunks that are pure functions.

Chunk k of a walker starts from the positions and velocities that chunk k-1 ended with, in a new
context whose random seed depends on (seed, walker, k) only. An interrupted run therefore continues
to the same bits as an uninterrupted one, and no hidden state of OpenMM has to be stored.

Each walker is one process with one thread: on molecules of up to some hundred atoms that gives
more frames than any threading inside OpenMM.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .openmm_dynamics import NM, fingerprint, new_context, positive_seed, read_frame
from .reference import (
    ReferenceData,
    ReferenceDataError,
    Tick,
    read_npz,
    read_structure,
    write_npz,
)
from .workers import Report, run_workers

if TYPE_CHECKING:
    from ccg_mda.potential import OpenMMPotential

    from .config import Config

CHUNKS = 12  # per walker; more would spend time on contexts, fewer lose more on interruption


@dataclass(frozen=True)
class Plan:
    """What one run of walkers is asked to do; two equal plans give equal bits.

    Times in fs and ps and rates in 1/ps as named; `positions_nm` is the starting structure.
    """

    system_xml: str
    positions_nm: tuple[tuple[float, float, float], ...]
    temperature_K: float
    timestep_fs: float
    friction_per_ps: float
    steps_per_frame: int
    frames: int  # per walker
    equilibration_steps: int
    walkers: int
    seed: int
    platform: str

    @property
    def fingerprint(self) -> str:
        """Name of this plan in the chunk files: chunks of another plan are never reused."""
        return fingerprint(CHUNKS, sorted(asdict(self).items()))

    def chunk_file(self, directory: Path, walker: int, chunk: int) -> Path:
        """File of a chunk; chunk 0 is the equilibration."""
        return directory / f"walker{walker}_chunk{chunk:02d}_{self.fingerprint}.npz"

    def chunk_frames(self, chunk: int) -> int:
        """Frames stored by a chunk (1 ... CHUNKS)."""
        return self.frames * chunk // CHUNKS - self.frames * (chunk - 1) // CHUNKS

    def chunk_seed(self, walker: int, chunk: int) -> int:
        """Seed of a chunk's integrator."""
        return positive_seed(self.seed, walker, chunk)


def generate(
    potential: OpenMMPotential,
    positions: np.ndarray,
    temperature_K: float,
    directory: Path,
    *,
    time_ns: float,
    timestep_fs: float = 1.0,
    friction_per_ps: float = 1.0,
    save_every_fs: float = 100.0,
    walkers: int = 2,
    equilibration_ps: float = 50.0,
    seed: int = 0,
    tick: Tick | None = None,
) -> ReferenceData:
    """Run Langevin dynamics (LangevinMiddleIntegrator, flexible bonds) and store what it visits.

    Parameters
    ----------
    potential
        The molecule's OpenMM System, flexible, and the platform to run on.
    positions
        (n, 3) starting structure, in Å; it is minimised first.
    directory
        Holds the chunks; run again with the same arguments to continue after an interruption.
    time_ns
        Stored time of all walkers together.
    tick
        Called with (frames done, frames in all).

    Returns
    -------
    ReferenceData
        Positions, forces and energies, walker after walker.

    Raises
    ------
    ReferenceDataError
        Times that don't divide, too few frames, or a simulation that blew up.
    """
    import openmm

    steps_per_frame = round(save_every_fs / timestep_fs)
    if steps_per_frame < 1 or abs(steps_per_frame * timestep_fs - save_every_fs) > 1e-6:
        raise ReferenceDataError(
            f"save_every_fs = {save_every_fs:g} is not a multiple of timestep_fs = {timestep_fs:g}"
        )
    frames = round(time_ns * 1e6 / save_every_fs / walkers)
    if frames < CHUNKS:
        raise ReferenceDataError(
            f"time_ns = {time_ns:g} gives {frames} frames per walker, at least {CHUNKS} are needed:"
            " raise time_ns or lower save_every_fs"
        )
    plan = Plan(
        system_xml=openmm.XmlSerializer.serialize(potential.system),
        positions_nm=tuple(map(tuple, (np.asarray(positions, float) / NM).tolist())),
        temperature_K=temperature_K,
        timestep_fs=timestep_fs,
        friction_per_ps=friction_per_ps,
        steps_per_frame=steps_per_frame,
        frames=frames,
        equilibration_steps=round(equilibration_ps * 1e3 / timestep_fs),
        walkers=walkers,
        seed=seed,
        platform=potential.platform,
    )
    directory.mkdir(parents=True, exist_ok=True)
    run_workers(partial(_walk, plan, directory), walkers, frames * walkers, tick)
    parts = [
        read_npz(plan.chunk_file(directory, walker, chunk))
        for walker in range(walkers)
        for chunk in range(1, CHUNKS + 1)
    ]
    positions, forces, energy = (
        np.concatenate([part[name] for part in parts]) for name in ("positions", "forces", "energy")
    )
    time_ps = (np.arange(frames) + 1) * save_every_fs / 1e3
    return ReferenceData(
        positions, forces, energy, np.repeat(np.arange(walkers), frames), np.tile(time_ps, walkers)
    )


def generate_from_config(
    config: Config, directory: Path, tick: Tick | None
) -> tuple[ReferenceData, int]:
    """Generate what the [reference] section asks for; data, and steps as energy calls."""
    from .system import openmm_potential_of

    settings = config.reference
    data = generate(
        openmm_potential_of(config),
        read_structure(config.system.topology).atoms.positions,
        config.system.temperature_K,
        directory,
        time_ns=settings.time_ns,
        timestep_fs=settings.timestep_fs,
        friction_per_ps=settings.friction_per_ps,
        save_every_fs=settings.save_every_fs,
        walkers=settings.walkers,
        equilibration_ps=settings.equilibration_ps,
        seed=config.run.seed,
        tick=tick,
    )
    stored_fs = settings.time_ns * 1e6 + settings.walkers * settings.equilibration_ps * 1e3
    return data, round(stored_fs / settings.timestep_fs)


def _walk(plan: Plan, directory: Path, walker: int, report: Report) -> None:
    """Run the chunks of a walker that are not there yet, in order."""
    done = 0
    for chunk in range(CHUNKS + 1):
        report(done)
        if not plan.chunk_file(directory, walker, chunk).is_file():
            _run_chunk(plan, directory, walker, chunk, lambda i, start=done: report(start + i))
        done += plan.chunk_frames(chunk) if chunk else 0
    report(done)


def _run_chunk(plan: Plan, directory: Path, walker: int, chunk: int, report: Report) -> None:
    import openmm

    seed = plan.chunk_seed(walker, chunk)
    context = new_context(
        openmm.XmlSerializer.deserialize(plan.system_xml),
        platform=plan.platform,
        temperature_K=plan.temperature_K,
        friction_per_ps=plan.friction_per_ps,
        timestep_fs=plan.timestep_fs,
        seed=seed,
    )
    integrator = context.getIntegrator()
    frames: dict[str, list[Any]] = {"positions": [], "forces": [], "energy": []}
    if chunk == 0:
        context.setPositions(np.array(plan.positions_nm))
        openmm.LocalEnergyMinimizer.minimize(context)
        context.setVelocitiesToTemperature(plan.temperature_K, seed)
        integrator.step(plan.equilibration_steps)
    else:
        start = read_npz(plan.chunk_file(directory, walker, chunk - 1))
        context.setPositions(start["last_positions_nm"])
        context.setVelocities(start["last_velocities"])
    for frame in range(plan.chunk_frames(chunk) if chunk else 0):
        integrator.step(plan.steps_per_frame)
        positions, forces, energy = read_frame(context)
        if not np.isfinite(energy):
            raise ReferenceDataError(
                f"the energy is not finite at {plan.timestep_fs:g} fs in chunk {chunk}: "
                "lower timestep_fs, or repair the starting structure"
            )
        frames["positions"].append(positions)
        frames["forces"].append(forces)
        frames["energy"].append(energy)
        if frame % 50 == 49:
            report(frame + 1)
    last = context.getState(positions=True, velocities=True)
    arrays = {name: np.array(values) for name, values in frames.items()}
    arrays["last_positions_nm"] = np.array(last.getPositions(asNumpy=True)._value)
    arrays["last_velocities"] = np.array(last.getVelocities(asNumpy=True)._value)
    write_npz(plan.chunk_file(directory, walker, chunk), arrays)
