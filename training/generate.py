"""Generate reference data with OpenMM: independent walkers, in chunks that are pure functions.

Chunk k of a walker starts from the positions and velocities that chunk k-1 ended with, in a new
context whose random seed depends on (seed, walker, k) only. An interrupted run therefore continues
to the same bits as an uninterrupted one, and no hidden state of OpenMM has to be stored.

Each walker is one process with one thread: on molecules of up to some hundred atoms that gives
more frames than any threading inside OpenMM.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import queue
import signal
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import units

from .reference import (
    ReferenceData,
    ReferenceDataError,
    Tick,
    read_npz,
    read_structure,
    write_npz,
)

if TYPE_CHECKING:
    from ccg_mda.potential import OpenMMPotential

    from .config import Config

KJ_PER_MOL = units.kJ / units.mol  # eV
NM = units.nm  # Å
CHUNKS = 12  # per walker; more would spend time on contexts, fewer lose more on interruption
RUNNING, FINISHED = "running", "finished"


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
        import openmm

        text = repr((openmm.__version__, CHUNKS, sorted(asdict(self).items())))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def chunk_file(self, directory: Path, walker: int, chunk: int) -> Path:
        """File of a chunk; chunk 0 is the equilibration."""
        return directory / f"walker{walker}_chunk{chunk:02d}_{self.fingerprint}.npz"

    def chunk_frames(self, chunk: int) -> int:
        """Frames stored by a chunk (1 ... CHUNKS)."""
        return self.frames * chunk // CHUNKS - self.frames * (chunk - 1) // CHUNKS

    def chunk_seed(self, walker: int, chunk: int) -> int:
        """Seed of a chunk's integrator: positive, since 0 means "random" to OpenMM."""
        words = np.random.SeedSequence([self.seed, walker, chunk]).generate_state(1)
        return int(words[0] % (2**31 - 1)) + 1


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
    _run_walkers(plan, directory, tick)
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


def generate_from_config(config: Config, directory: Path, tick: Tick | None) -> ReferenceData:
    """Generate what the [reference] section asks for."""
    from ccg_mda.potential import OpenMMPotential

    potential = OpenMMPotential.from_pdb(config.system.topology, config.potential.forcefield)
    settings = config.reference
    return generate(
        potential,
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


def _run_walkers(plan: Plan, directory: Path, tick: Tick | None) -> None:
    """Run all walkers to their end, each in its own process; stop all when one fails."""
    context = multiprocessing.get_context("spawn")  # fork would copy a threaded parent
    reports = context.Queue()
    processes = [
        context.Process(target=_walk, args=(plan, directory, walker, reports), daemon=True)
        for walker in range(plan.walkers)
    ]
    done = [0] * plan.walkers
    finished: set[int] = set()
    try:
        for process in processes:
            process.start()
        while len(finished) < plan.walkers:
            try:
                walker, frames, finish = reports.get(timeout=1.0)
            except queue.Empty:
                _check_alive(processes, finished)
                continue
            if finish not in (RUNNING, FINISHED):
                raise ReferenceDataError(f"walker {walker} stopped: {finish}")
            done[walker] = frames
            if finish == FINISHED:  # only now is the last chunk's file complete
                finished.add(walker)
            if tick:
                tick(sum(done), plan.frames * plan.walkers)
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _check_alive(processes: list[Any], finished: set[int]) -> None:
    for walker, process in enumerate(processes):
        if process.exitcode not in (None, 0) and walker not in finished:
            raise ReferenceDataError(
                f"the process of walker {walker} ended with code {process.exitcode} (out of "
                "memory?): run again to continue from its last chunk"
            )


def _walk(plan: Plan, directory: Path, walker: int, reports: Any) -> None:
    """Body of a walker's process: run the chunks that are not there yet, in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    parent = os.getppid()
    done = 0

    def report(frames: int) -> None:
        if os.getppid() != parent:  # the parent was killed: nobody waits for these frames
            os._exit(1)
        reports.put((walker, frames, RUNNING))

    try:
        for chunk in range(CHUNKS + 1):
            report(done)
            if not plan.chunk_file(directory, walker, chunk).is_file():
                _run_chunk(plan, directory, walker, chunk, lambda i, start=done: report(start + i))
            done += plan.chunk_frames(chunk) if chunk else 0
        reports.put((walker, done, FINISHED))
    except ReferenceDataError as error:
        reports.put((walker, done, str(error)))
    except Exception:
        reports.put((walker, done, traceback.format_exc()))


def _run_chunk(plan: Plan, directory: Path, walker: int, chunk: int, report: Any) -> None:
    import openmm
    from openmm import unit

    integrator = openmm.LangevinMiddleIntegrator(
        plan.temperature_K, plan.friction_per_ps, plan.timestep_fs * 1e-3
    )
    seed = plan.chunk_seed(walker, chunk)
    integrator.setRandomNumberSeed(seed)
    properties = {"Threads": "1", "DeterministicForces": "true"} if plan.platform == "CPU" else {}
    context = openmm.Context(
        openmm.XmlSerializer.deserialize(plan.system_xml),
        integrator,
        openmm.Platform.getPlatformByName(plan.platform),
        properties,
    )
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
        state = context.getState(positions=True, forces=True, energy=True)
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        if not np.isfinite(energy):
            raise ReferenceDataError(
                f"the energy is not finite at {plan.timestep_fs:g} fs in chunk {chunk}: "
                "lower timestep_fs, or repair the starting structure"
            )
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        forces = state.getForces(asNumpy=True).value_in_unit(
            unit.kilojoule_per_mole / unit.nanometer
        )
        frames["positions"].append(positions * NM)
        frames["forces"].append(forces * (KJ_PER_MOL / NM))
        frames["energy"].append(energy * KJ_PER_MOL)
        if frame % 50 == 49:
            report(frame + 1)
    last = context.getState(positions=True, velocities=True)
    arrays = {name: np.array(values) for name, values in frames.items()}
    arrays["last_positions_nm"] = np.array(last.getPositions(asNumpy=True)._value)
    arrays["last_velocities"] = np.array(last.getVelocities(asNumpy=True)._value)
    write_npz(plan.chunk_file(directory, walker, chunk), arrays)
