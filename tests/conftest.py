"""Fixtures that all tests share: one torch thread, and a hand-made alanine dipeptide."""

from __future__ import annotations

import signal

import ase.data
import numpy as np
import pytest
import torch

from ccg_ase import CGMap, ForceField, Prior, Topology, fit_prior

# Name, residue, residue number, element, position in Å.
_ALA2 = (
    ("H1", "ACE", 1, "H", (15.908, 11.969, 16.089)),
    ("CH3", "ACE", 1, "C", (15.377, 12.899, 15.886)),
    ("H2", "ACE", 1, "H", (14.471, 12.940, 16.490)),
    ("H3", "ACE", 1, "H", (15.112, 12.945, 14.830)),
    ("C", "ACE", 1, "C", (16.244, 14.114, 16.225)),
    ("O", "ACE", 1, "O", (17.382, 13.964, 16.665)),
    ("N", "ALA", 2, "N", (15.699, 15.314, 16.018)),
    ("H", "ALA", 2, "H", (14.759, 15.386, 15.655)),
    ("CA", "ALA", 2, "C", (16.418, 16.541, 16.300)),
    ("HA", "ALA", 2, "H", (16.683, 16.572, 17.357)),
    ("CB", "ALA", 2, "C", (17.696, 16.630, 15.473)),
    ("HB1", "ALA", 2, "H", (17.446, 16.609, 14.413)),
    ("HB2", "ALA", 2, "H", (18.215, 17.560, 15.705)),
    ("HB3", "ALA", 2, "H", (18.343, 15.785, 15.711)),
    ("C", "ALA", 2, "C", (15.568, 17.761, 15.975)),
    ("O", "ALA", 2, "O", (14.428, 17.628, 15.534)),
    ("N", "NME", 3, "N", (16.126, 18.953, 16.194)),
    ("H", "NME", 3, "H", (17.066, 19.012, 16.558)),
    ("C", "NME", 3, "C", (15.420, 20.190, 15.926)),
    ("H1", "NME", 3, "H", (14.425, 19.965, 15.540)),
    ("H2", "NME", 3, "H", (15.330, 20.766, 16.847)),
    ("H3", "NME", 3, "H", (15.972, 20.771, 15.187)),
)
_ALA2_BONDS = (
    (0, 1), (1, 2), (1, 3), (1, 4), (4, 5), (4, 6), (6, 7), (6, 8), (8, 9), (8, 10), (10, 11),
    (10, 12), (10, 13), (8, 14), (14, 15), (14, 16), (16, 17), (16, 18), (18, 19), (18, 20),
    (18, 21),
)  # fmt: skip
ALA2_BEADS = (4, 6, 8, 14, 16)
TEMPERATURE_K = 300.0


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    """Small graphs next to a busy process: a second thread makes torch a hundred times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _uncompiled():
    """Building compiled code takes a minute; test_compiled.py does it for kernels of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCG_COMPILE", "0")
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """A process that a shell starts in the background ignores SIGINT unless told otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def ala2_topology() -> Topology:
    """Alanine dipeptide, 22 atoms: ACE-ALA-NME."""
    names, resnames, resids, elements, _ = zip(*_ALA2, strict=True)
    return Topology(
        names=names,
        elements=elements,
        masses=[ase.data.atomic_masses[ase.data.atomic_numbers[e]] for e in elements],
        resnames=resnames,
        resids=resids,
        segids=("A",) * len(names),
        bonds=_ALA2_BONDS,
    )


@pytest.fixture(scope="session")
def ala2_positions() -> np.ndarray:
    """Extended conformation in Å, shape (22, 3), L-alanine."""
    return np.array([row[-1] for row in _ALA2])


@pytest.fixture(scope="session")
def ala2_map(ala2_topology) -> CGMap:
    """Five backbone slice beads, C N CA C N."""
    return CGMap.from_slices(ala2_topology, ALA2_BEADS)


@pytest.fixture(scope="session")
def ala2_beads(ala2_map, ala2_positions) -> np.ndarray:
    """Make 400 bead structures in Å, shape (400, 5, 3): all torsions, and 0.02 Å of noise."""
    rng = np.random.default_rng(1)
    frames = np.repeat(ala2_map.apply(ala2_positions)[None], 400, axis=0)
    for j, k, moved in ((1, 2, slice(3, 5)), (2, 3, slice(4, 5))):
        axis = frames[:, k] - frames[:, j]
        axis = axis / np.linalg.norm(axis, axis=-1, keepdims=True)
        turn = rng.uniform(-np.pi, np.pi, (len(frames), 1, 1))
        arm, axis = frames[:, moved] - frames[:, k, None], axis[:, None]
        frames[:, moved] = (
            frames[:, k, None]
            + arm * np.cos(turn)
            + np.cross(axis, arm) * np.sin(turn)
            + axis * (axis * arm).sum(-1, keepdims=True) * (1 - np.cos(turn))
        )
    return frames + rng.normal(scale=0.02, size=frames.shape)


@pytest.fixture(scope="session")
def ala2_prior(ala2_map, ala2_beads) -> Prior:
    return fit_prior(ala2_beads, ala2_map.beads, TEMPERATURE_K)


@pytest.fixture
def force_field(ala2_map, ala2_beads) -> ForceField:
    """A float64 force field with a random readout: a network that does something."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = ForceField.from_data(ala2_map, TEMPERATURE_K, ala2_beads, channels=8).double()
        torch.nn.init.normal_(model.members[0].out.weight, std=0.5)
    return model
