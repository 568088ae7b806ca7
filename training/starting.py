"""Reference data from one structure: hot dynamics find coarse states, short ones fill them.

Hot, unbiased dynamics from the structure cross barriers that would take long at the temperature of
interest. Their frames aren't data, since p(x|s) is that of another temperature, but the coarse
states that they visit are worth having: dynamics restrained at some of these, at the temperature of
interest, give frames of p(x|s). How often a state is visited says nothing: the data are biased.
Fine coordinates slower than the restrained dynamics keep the populations of the hot ones.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .generate import generate
from .isomers import isomerised
from .reference import ReferenceData, ReferenceDataError, Tick, read_structure
from .restrained import restrained_frames
from .states import choose_states

if TYPE_CHECKING:
    from ccg_mda.potential import OpenMMPotential

    from .config import Config


def data_from_structure(
    potential: OpenMMPotential,
    cg_map: CGMap | TorsionMap,
    structure: np.ndarray,
    temperature_K: float,
    directory: Path,
    *,
    hot_temperature_K: float = 600.0,
    hot_time_ps: float = 200.0,
    n_states: int = 300,
    restrained_ps: float = 2.0,
    relaxation_ps: float = 1.0,
    timestep_fs: float = 1.0,
    friction_per_ps: float = 1.0,
    save_every_fs: float = 100.0,
    walkers: int = 2,
    seed: int = 0,
    tick: Tick | None = None,
) -> tuple[ReferenceData, int]:
    """Make reference data from one structure.

    Parameters
    ----------
    potential
        The molecule's OpenMM System, flexible.
    cg_map
        The coarse variables that states are chosen in.
    structure
        (n_atoms, 3) in Å; it is minimised first. Its chirality and its cis and trans bonds are
        kept: hot frames that lost them are left out.
    temperature_K
        Of the data.
    directory
        Holds the chunks; run again with the same arguments to continue after an interruption.
    hot_temperature_K, hot_time_ps, friction_per_ps
        Of the hot dynamics; the time is that of all walkers together.
    n_states
        Coarse states chosen among the hot frames, half of them as diverse as possible.
    restrained_ps, relaxation_ps
        Stored time at each state, and time before that.
    timestep_fs, save_every_fs
        Of both dynamics.
    walkers
        Hot runs, and processes of the restrained ones.
    tick
        Called with (picoseconds done, picoseconds in all).

    Returns
    -------
    data, n_calls
        Frames at `temperature_K`, biased along s, `walker` the state; energy calls of both
        dynamics, failed states included. The minimisation of the structure, some hundred calls per
        walker that OpenMM doesn't count, is left out.

    Raises
    ------
    ReferenceDataError
        By `generate` and `restrained_frames`, or if no state is left.

    Warns
    -----
    UserWarning
        If hot frames are left out, or states fail; it says how many.
    """
    all_ps = round(hot_time_ps + n_states * (relaxation_ps + restrained_ps))

    def show(done_ps: float) -> None:
        if tick:
            tick(round(done_ps), all_ps)

    hot = generate(
        potential,
        structure,
        hot_temperature_K,
        directory / "hot",
        time_ns=hot_time_ps / 1e3,
        timestep_fs=timestep_fs,
        friction_per_ps=friction_per_ps,
        save_every_fs=save_every_fs,
        walkers=walkers,
        equilibration_ps=0.0,
        seed=seed,
        tick=lambda done, total: show(hot_time_ps * done / total),
    )
    steps_per_frame = round(save_every_fs / timestep_fs)
    changed = isomerised(
        cg_map.atoms,
        np.asarray(structure, float),
        hot.positions,
        hot.walker,
        interval_ps=save_every_fs / 1e3,
        hot_K=hot_temperature_K,
        temperature_K=temperature_K,
    )
    if changed.all():
        raise ReferenceDataError(
            "all frames of the hot dynamics are other isomers than the structure: lower "
            "hot_temperature_K, or repair the structure"
        )
    if changed.any():
        warnings.warn(
            f"{changed.sum()} of {len(hot)} frames at {hot_temperature_K:g} K have another "
            "chirality, or turned a stiff bond from cis to trans: they are left out; lower "
            "hot_temperature_K if there are many",
            stacklevel=2,
        )
    usable = hot.positions[~changed]
    coarse = cg_map.apply(usable)
    topology = None if isinstance(cg_map, TorsionMap) else cg_map.beads
    chosen = choose_states(coarse, min(n_states, len(usable)), topology, seed=seed)
    found = restrained_frames(
        potential,
        cg_map,
        coarse[chosen],
        usable[chosen],
        temperature_K,
        directory / "restrained",
        n_steps=max(1, round(restrained_ps * 1e3 / save_every_fs)) * steps_per_frame,
        save_every=steps_per_frame,
        steering_steps=0,
        equilibration_steps=round(relaxation_ps * 1e3 / timestep_fs),
        timestep_fs=timestep_fs,
        workers=walkers,
        seed=seed,
        tick=lambda done, total: show(hot_time_ps + (all_ps - hot_time_ps) * done / total),
    )
    if found.data is None:
        raise ReferenceDataError(
            f"none of {len(chosen)} coarse states could be held: lower timestep_fs or "
            "hot_temperature_K"
        )
    if found.failed.any():
        warnings.warn(
            f"{found.failed.sum()} of {len(chosen)} coarse states exploded or were not reached: "
            "they are left out",
            stacklevel=2,
        )
    return found.data, len(hot) * (steps_per_frame + 1) + found.n_calls


def data_from_config(
    config: Config, directory: Path, tick: Tick | None
) -> tuple[ReferenceData, int]:
    """Make what the [reference] section asks for; data and energy calls."""
    from .system import mapping_of, openmm_potential_of

    settings = config.reference
    return data_from_structure(
        openmm_potential_of(config),
        mapping_of(config),
        read_structure(config.system.topology).atoms.positions,
        config.system.temperature_K,
        directory,
        hot_temperature_K=settings.hot_temperature_K,
        hot_time_ps=settings.hot_time_ps,
        n_states=settings.n_states,
        restrained_ps=settings.restrained_ps,
        relaxation_ps=settings.relaxation_ps,
        timestep_fs=settings.timestep_fs,
        friction_per_ps=settings.friction_per_ps,
        save_every_fs=settings.save_every_fs,
        walkers=settings.walkers,
        seed=config.run.seed,
        tick=tick,
    )
