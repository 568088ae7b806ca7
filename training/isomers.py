"""Has a molecule become another isomer: mirrored centres, and stiff bonds turned from cis to trans.

Hot dynamics can do what dynamics at the temperature of interest would not do, nor undo, in any
affordable time.
"""

from __future__ import annotations

import numpy as np

from ccg_ase.topology import Topology
from ccg_mda.contacts import small_rings
from ccg_mda.internals import (
    measured,
    proper_torsions,
    signed_volumes,
    site_classes,
    stereo_centres,
    wrapped,
)

_ATTEMPTS_PER_PS = 10.0  # kT/h at 500 K: the prefactor of transition-state theory
_PATIENCE_PS = 1000.0


def mirrored(topology: Topology, structure: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Tell which frames have a stereocentre of another handedness than a structure, (N,) bool.

    Parameters
    ----------
    topology
        Of the n atoms, with bonds.
    structure, positions
        (n, 3) and (N, n, 3), Å.
    """
    centres = stereo_centres(topology, site_classes(topology))
    sign = np.sign(signed_volumes(structure[None], centres))
    return (np.sign(signed_volumes(positions, centres)) != sign).any(axis=1)


def isomerised(
    topology: Topology,
    structure: np.ndarray,
    positions: np.ndarray,
    walker: np.ndarray,
    *,
    interval_ps: float,
    hot_K: float,
    temperature_K: float,
) -> np.ndarray:
    """Tell which frames of hot dynamics are another isomer than the structure they came from.

    Bonds that may have cis and trans isomers (neither end tetrahedral) are judged by how often
    they turn over in the hot frames: the rate k gives the barrier, k = A exp(-E/kT) with A = 10/ps,
    and so the rate at `temperature_K`. Bonds that would turn over less than once in a nanosecond
    there are stiff, and frames in which they lie on the other side (more than 90° away) are another
    isomer. Bonds that turn freely don't count.

    Parameters
    ----------
    topology, structure, positions
        As in `mirrored`; all frames of all walkers, each in order of time.
    walker
        Walker of each frame, (N,); each starts from `structure`.
    interval_ps
        Time between frames.
    hot_K, temperature_K
        Temperature of the frames, and the one of interest.

    Returns
    -------
    ndarray
        (N,) bool, mirrored frames included.
    """
    kind = site_classes(topology)
    torsions, isomers, _, _ = proper_torsions(topology, small_rings(topology), kind)
    torsions = torsions[isomers]
    apart = wrapped(measured(positions, torsions) - measured(structure[None], torsions))
    over = np.abs(apart) > np.pi / 2
    first = np.diff(walker, prepend=walker[0] - 1) != 0
    before = np.where(first[:, None], False, np.roll(over, 1, axis=0))
    hot_rate = (over != before).sum(axis=0) / (len(positions) * interval_ps)
    rate = _ATTEMPTS_PER_PS * (hot_rate / _ATTEMPTS_PER_PS) ** (hot_K / temperature_K)
    stiff = rate * _PATIENCE_PS < 1
    return mirrored(topology, structure, positions) | over[:, stiff].any(axis=1)
