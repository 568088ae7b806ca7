"""Bead trajectory file to atomistic trajectory file, with densities and weights beside it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from .config import Config
from .reference import write_npz


def backmap_file(
    model: Path,
    beads: Path,
    out: Path,
    *,
    n_samples: int = 1,
    seed: int = 0,
    config: Path | None = None,
    force: bool = False,
    device: str = "cpu",
) -> str:
    """Write the atoms of a bead trajectory.

    Parameters
    ----------
    model, beads
        Model file, and bead trajectory in a format of ASE or MDAnalysis.
    out
        Atomistic trajectory; its ending sets the format. Beside it, NAME.npz holds `cg_frame`,
        `sample`, `log_prob` and, with energies, `energy` (eV), `log_weight` (given the beads) and
        `ensemble_log_weight` (for beads sampled with the model's force field); NAME.pdb holds
        the first frame as a topology, unless `out` is a PDB file itself.
    n_samples, seed
        Reconstructions per bead frame, and the seed of their noise.
    config
        TOML file whose [potential] gives energies and weights; its temperature must be the model's.
    force
        Overwrite files that are there.
    device
        Where the model, and energies in torch, are evaluated.

    Returns
    -------
    str
        What was written, in a sentence.
    """
    from MDAnalysis import Writer
    from MDAnalysis.coordinates.core import get_writer_for

    from ccg_ase.checkpoint import load_model
    from ccg_ase.devices import available
    from ccg_ase.energies import bead_energies
    from ccg_ase.forcefield import ForceField
    from ccg_ase.units import thermal_energy
    from ccg_mda.bead_sources import bead_universe
    from ccg_mda.flow import Backmapper
    from ccg_mda.transformation import backmap
    from ccg_mda.weights import effective_sample_size

    from .system import potential_of

    table = out.with_suffix(".npz")
    structure = out.with_suffix(".pdb")
    for path in dict.fromkeys((out, table, structure)):
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; --force overwrites it")
    try:
        get_writer_for(str(out), multiframe=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"can't write {out}: {error}; try the ending .xtc or .pdb") from error
    loaded = load_model(model, device=available(device))
    backmapper, potential = Backmapper.from_model(loaded), None
    if config is not None:
        settings = Config.load(config).on_device(device)
        potential, temperature_K = potential_of(settings), settings.system.temperature_K
        if abs(temperature_K - loaded.temperature_K) > 1e-6:
            raise ValueError(
                f"the model is for {loaded.temperature_K} K, asked for {temperature_K} K; train a "
                "model at that temperature"
            )
    names = ["cg_frame", "sample", "log_prob"] + ["energy", "log_weight"] * (potential is not None)
    rows: dict[str, list] = {name: [] for name in ("beads", *names)}
    with warnings.catch_warnings():
        # MDAnalysis warns of what neither model nor bead file has: times, boxes, chain names ...
        warnings.filterwarnings("ignore", module="MDAnalysis")
        warnings.filterwarnings("ignore", message="Reader has no dt")
        universe = backmap(
            bead_universe(beads, backmapper),
            backmapper,
            n_samples=n_samples,
            seed=seed,
            potential=potential,
        )
        if structure != out:
            universe.atoms.write(str(structure), frames=universe.trajectory[:1])
        with Writer(str(out), len(universe.atoms), multiframe=True) as writer:
            for ts in universe.trajectory:
                writer.write(universe.atoms)
                for name, values in rows.items():
                    values.append(ts.data[name])
    arrays = {name: np.array(values) for name, values in rows.items()}
    visited = arrays.pop("beads")
    if potential is not None and "force_field" in loaded.configs:
        free_energy, _ = bead_energies(ForceField.from_model(loaded), visited)
        kt = thermal_energy(loaded.temperature_K)
        arrays["ensemble_log_weight"] = arrays["log_weight"] + free_energy / kt
    write_npz(table, arrays)
    text = f"wrote {len(universe.trajectory)} frames to {out}, densities to {table}"
    if structure != out:
        text += f", a topology to {structure}"
    if potential is not None:
        each = effective_sample_size(arrays["log_weight"].reshape(-1, n_samples))
        text += f"; effective sample size per bead frame {each.mean():.3f}"
        if "ensemble_log_weight" in arrays:
            share = effective_sample_size(arrays["ensemble_log_weight"])
            text += f", of all frames as an ensemble of the bead force field {share:.3f}"
    return text
