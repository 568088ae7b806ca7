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
) -> str:
    """Write the atoms of a bead trajectory.

    Parameters
    ----------
    model, beads
        Model file, and bead trajectory in a format of ASE or MDAnalysis.
    out
        Atomistic trajectory; its ending sets the format. Beside it, NAME.npz holds `cg_frame`,
        `sample`, `log_prob` and, with energies, `energy` (eV) and `log_weight`; NAME.pdb holds
        the first frame as a topology, unless `out` is a PDB file itself.
    n_samples, seed
        Reconstructions per bead frame, and the seed of their noise.
    config
        TOML file whose [potential] gives energies and weights; its temperature must be the model's.
    force
        Overwrite files that are there.

    Returns
    -------
    str
        What was written, in a sentence.
    """
    from MDAnalysis import Writer
    from MDAnalysis.coordinates.core import get_writer_for

    from ccg_mda.flow import Backmapper
    from ccg_mda.transformation import backmap
    from ccg_mda.universe import bead_universe
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
    backmapper, potential, temperature_K = Backmapper.load(model), None, None
    if config is not None:
        settings = Config.load(config)
        potential, temperature_K = potential_of(settings), settings.system.temperature_K
    names = ["cg_frame", "sample", "log_prob"] + ["energy", "log_weight"] * (potential is not None)
    rows: dict[str, list[float]] = {name: [] for name in names}
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
            temperature_K=temperature_K,
        )
        if structure != out:
            universe.atoms.write(str(structure), frames=universe.trajectory[:1])
        with Writer(str(out), len(universe.atoms), multiframe=True) as writer:
            for ts in universe.trajectory:
                writer.write(universe.atoms)
                for name in names:
                    rows[name].append(ts.data[name])
    arrays = {name: np.array(values) for name, values in rows.items()}
    write_npz(table, arrays)
    text = f"wrote {len(universe.trajectory)} frames to {out}, densities to {table}"
    if structure != out:
        text += f", a topology to {structure}"
    if potential is not None:
        share = effective_sample_size(arrays["log_weight"])
        text += f"; effective sample size {share:.3f} over all frames"
        if n_samples > 1:
            each = effective_sample_size(arrays["log_weight"].reshape(-1, n_samples))
            text += f", {each.mean():.3f} per bead frame"
    return text
