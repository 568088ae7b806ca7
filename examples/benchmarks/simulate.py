"""Run the simulations behind the benchmark systems of systems.py.

    export CCG_DATA=... CCG_RUNS=...        # public inputs, see systems.py; what is written
    python simulate.py chignolin            # or alanine, methanol, water, rigid_water

Frames are stored in chunks, each a pure function of its inputs and of (seed, walker, chunk): an
interrupted run continues where it stopped when the command is given again. Steps are of 1 fs,
without constraints, except for rigid_water (2 fs).
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import openmm
from ase import units
from openmm import app

from ccg_mda.potential import OpenMMPotential
from ccg_training.generate import generate
from ccg_training.reference import ReferenceData, read_npz, read_structure, write_npz

KJ_PER_MOL = units.kJ / units.mol  # eV
NM = units.nm  # Å
ALANINE = Path(__file__).parent.parent / "alanine_dipeptide" / "alanine_dipeptide.pdb"
BIAS = 1  # force group of what steers a run; it stays out of the stored energies and forces


@dataclass(frozen=True)
class Walker:
    """How one chignolin walker starts, and whether its Cα atoms are held near that start."""

    folded: bool
    restrained: bool


WALKERS = tuple(Walker(folded=k < 8, restrained=k % 2 == 1) for k in range(28))


@dataclass(frozen=True)
class Box:
    """A periodic box: its Amber files (without suffix) below openmmtools, and how it is run.

    `scale` is by how much the molecules are moved together, since `lengths_nm` are for the liquid.
    """

    files: str
    lengths_nm: tuple[float, float, float]
    frames: int
    scale: float = 1.0
    rigid: bool = False


BOXES = {
    # The box of the file has 0.50 g/cm³, where methanol would boil; this one has 0.79.
    "methanol": Box("methanol-box/methanol-box", (2.0270, 2.0743, 2.0075), 1000, scale=0.857),
    # The angles in the files of this box are wrong (5156.6°: radians converted twice); it's a cube.
    "water": Box("waterbox/watbox216", (1.8774349,) * 3, 200),
    "rigid_water": Box("waterbox/watbox216", (1.8774349,) * 3, 200, rigid=True),
}


def folder(given: str | Path | None, variable: str) -> Path:
    """Return the folder given, or else the one that an environment variable names."""
    found = given or os.environ.get(variable)
    if not found or not Path(found).is_dir():
        raise SystemExit(f"{found or 'nothing'} is no folder: set {variable} (see systems.py)")
    return Path(found)


# ------------------------------------------------------------------------------------ systems


def alanine_potential() -> OpenMMPotential:
    """Alanine dipeptide: ff96 with OBC1."""
    return OpenMMPotential.from_pdb(ALANINE, ["amber96.xml", "amber96_obc.xml"])


def chignolin_system(public: Path) -> tuple[openmm.System, app.Topology]:
    """CLN025 with GBSA-OBC (OBC2), flexible.

    OBC2 is a built-in force of OpenMM, six times as fast on one core as OBC1, a custom one.
    """
    return _amber(public / "pccg" / "cln025.prmtop", implicitSolvent=app.OBC2)


def box_system(public: Path, name: str) -> tuple[openmm.System, app.Topology]:
    """Return a box of `BOXES` with PME."""
    rigid = {"constraints": app.HBonds, "rigidWater": True} if BOXES[name].rigid else {}
    prmtop = public / "openmmtools" / f"{BOXES[name].files}.prmtop"
    system, topology = _amber(prmtop, nonbondedMethod=app.PME, nonbondedCutoff=0.9, **rigid)
    system.setDefaultPeriodicBoxVectors(*np.diag(BOXES[name].lengths_nm).tolist())
    return system, topology


def _amber(prmtop: Path, **options: object) -> tuple[openmm.System, app.Topology]:
    """Build a System from a prmtop, flexible unless the options say otherwise."""
    flexible = {"constraints": None, "rigidWater": False, "removeCMMotion": False}
    file = app.AmberPrmtopFile(str(prmtop))
    with warnings.catch_warnings():  # OpenMM finds the radii of CLN025's prmtop "non-optimal"
        warnings.filterwarnings("ignore", "Non-optimal GB parameters")
        return file.createSystem(**{**flexible, **options}), file.topology


def start_nm(file: Path) -> np.ndarray:
    """Read an Amber coordinate file: (n, 3) in nm."""
    return app.AmberInpcrdFile(str(file)).getPositions(asNumpy=True)._value


# -------------------------------------------------------------------------------- simulations


def alanine(runs: Path) -> None:
    """Training frames as cycle.toml makes them, 8 ns, and 80 ns with another seed."""
    jobs = {"alanine": (8.0, 100.0, 0), "alanine_held_out": (80.0, 400.0, 20261122)}
    for stem, (time_ns, every_fs, seed) in jobs.items():
        generate(
            alanine_potential(),
            read_structure(ALANINE).atoms.positions,
            300.0,
            runs / stem,
            time_ns=time_ns,
            save_every_fs=every_fs,
            seed=seed,
        ).save(runs / f"{stem}.npz")


def chignolin(
    public: Path,
    runs: Path,
    *,
    chunks: int = 8,
    frames_per_chunk: int = 100,
    steps_per_frame: int = 80,
    seed: int = 3,
) -> None:
    """Sample CLN025 at 300 K around its folded state and unfolded ones; resumable.

    Frames 80 fs apart are correlated, and side chains keep their rotamers for nanoseconds. Hence
    many walkers, and before every chunk the side chains are heated while the Cα atoms are held.
    During the stored frames, a bias is a function of the Cα positions only: it changes which s are
    visited, and leaves p(x given s) as it is. One round adds a chunk to every walker and rewrites
    chignolin.npz, so that early frames are usable.
    """
    target = runs / "chignolin.npz"
    chunk_folder = target.with_suffix("")
    for chunk in range(chunks + 1):
        for w, walker in enumerate(WALKERS):
            file = chunk_folder / f"walker{w:02d}_chunk{chunk:03d}.npz"
            if file.is_file():
                continue
            rng = np.random.default_rng([seed, w, chunk])
            if chunk == 0:
                start = start_nm(public / "pccg" / "cln025.prmcrd")
                context = _chignolin_context(public, start, start, rng)
                openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
                reach = 0.5 + 2.2 * (w * 0.618034 % 1)  # nm; spread evenly over the walkers
                if not walker.folded:  # pull it out, then bring its ends to a distance of its own
                    _run(context, 800.0, 6000, trans=60.0, pull=500.0, reach=2.9)
                    _run(context, 800.0, 6000, trans=60.0, pull=500.0, reach=reach)
                _run(context, 300.0, 4000, trans=60.0, pull=0.0)
                write_npz(file, _last(context))
                continue
            first = read_npz(chunk_folder / f"walker{w:02d}_chunk000.npz")["last_positions_nm"]
            last = read_npz(chunk_folder / f"walker{w:02d}_chunk{chunk - 1:03d}.npz")
            last = last["last_positions_nm"]
            context = _chignolin_context(public, last, first if walker.restrained else last, rng)
            _run(context, 900.0, 2000, trans=60.0, hold=1000.0)
            _run(context, 300.0, 2000, trans=60.0, hold=1000.0)
            _run(context, 300.0, 1000, trans=0.0, hold=100.0 if walker.restrained else 0.0)
            context.getIntegrator().setFriction(1.0)
            write_npz(file, _record(context, frames_per_chunk, steps_per_frame))
        if chunk:
            _gather(chunk_folder, target, steps_per_frame * 1e-3)
        print(f"chignolin: chunk {chunk} of {chunks}, {time.ctime()}", flush=True)


def _chignolin_context(
    public: Path, positions_nm: np.ndarray, around_nm: np.ndarray, rng: np.random.Generator
) -> openmm.Context:
    """Return CLN025 with biases that are off: `hold`, `trans`, `pull` are their strengths.

    `hold`, in kJ/mol/nm², are springs between Cα atoms at their distances in `around_nm`; `pull`
    brings the ends to the distance `reach`. `trans`, in kJ/mol, keeps peptide bonds trans while the
    molecule is hot: at 800 K some turn, and at 300 K they don't turn back.
    """
    system, topology = chignolin_system(public)
    names = [{a.name: a.index for a in residue.atoms()} for residue in topology.residues()]
    alphas = [atoms["CA"] for atoms in names]
    hold = openmm.CustomBondForce("0.5 * hold * (r - r0)^2")
    hold.addPerBondParameter("r0")
    for k, i in enumerate(alphas):
        for j in alphas[k + 3 :]:
            hold.addBond(i, j, [float(np.linalg.norm(around_nm[i] - around_nm[j]))])
    trans = openmm.CustomTorsionForce("trans * (1 + cos(theta))")
    for this, after in pairwise(names):
        trans.addTorsion(this["CA"], this["C"], after["N"], after["CA"])
    pull = openmm.CustomBondForce("0.5 * pull * (r - reach)^2")
    pull.addBond(alphas[0], alphas[-1])
    for force, parameters in ((hold, ["hold"]), (trans, ["trans"]), (pull, ["pull", "reach"])):
        for parameter in parameters:
            force.addGlobalParameter(parameter, 0.0)
        force.setForceGroup(BIAS)
        system.addForce(force)
    context = _context(system, friction_per_ps=5.0, timestep_fs=1.0, rng=rng)
    context.setPositions(positions_nm)
    context.setVelocitiesToTemperature(300.0, int(rng.integers(1, 2**31)))
    return context


def _run(context: openmm.Context, temperature_K: float, steps: int, **bias: float) -> None:
    context.getIntegrator().setTemperature(temperature_K)
    for parameter, value in bias.items():
        context.setParameter(parameter, value)
    context.getIntegrator().step(steps)


def _gather(chunk_folder: Path, target: Path, frame_ps: float) -> None:
    """Write the chunks that are there as one `ReferenceData` file."""
    parts: dict[str, list[np.ndarray]] = {}
    walkers = sorted({file.name.split("_")[0] for file in chunk_folder.glob("walker*_chunk*.npz")})
    for w, name in enumerate(walkers):
        chunks = [read_npz(f) for f in sorted(chunk_folder.glob(f"{name}_chunk*.npz"))[1:]]
        for key in chunks[0].keys() & {"positions", "forces", "energy"} if chunks else ():
            parts.setdefault(key, []).append(np.concatenate([c[key] for c in chunks]))
        count = sum(len(c["positions"]) for c in chunks)
        parts.setdefault("walker", []).append(np.full(count, w))
        parts.setdefault("time_ps", []).append((np.arange(count) + 1) * frame_ps)
    ReferenceData(**{key: np.concatenate(values) for key, values in parts.items()}).save(target)


def box(public: Path, runs: Path, name: str, *, chunks: int = 10, seed: int = 5) -> None:
    """Sample a periodic box at 300 K and constant volume, a frame with forces every 0.5 ps."""
    system, topology = box_system(public, name)
    target, kind = runs / f"{name}.npz", BOXES[name]
    timestep_fs = 2.0 if kind.rigid else 1.0
    steps_per_frame = round(500 / timestep_fs)
    chunk_folder = target.with_suffix("")
    for chunk in range(chunks + 1):
        file = chunk_folder / f"walker00_chunk{chunk:03d}.npz"
        if file.is_file():
            continue
        context = _context(system, 1.0, timestep_fs, np.random.default_rng([seed, chunk]))
        if chunk == 0:
            start = start_nm(public / "openmmtools" / f"{kind.files}.crd")
            for residue in topology.residues():
                molecule = [atom.index for atom in residue.atoms()]
                start[molecule] += (kind.scale - 1) * start[molecule].mean(axis=0)
            context.setPositions(start)
            openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
            context.setVelocitiesToTemperature(300.0, seed)
            context.getIntegrator().step(20_000)
            write_npz(file, _last(context))
            continue
        last = read_npz(chunk_folder / f"walker00_chunk{chunk - 1:03d}.npz")
        context.setPositions(last["last_positions_nm"])
        context.setVelocities(last["last_velocities"])
        count = kind.frames * chunk // chunks - kind.frames * (chunk - 1) // chunks
        write_npz(file, _record(context, count, steps_per_frame))
        _gather(chunk_folder, target, steps_per_frame * timestep_fs * 1e-3)
        print(f"{name}: chunk {chunk} of {chunks}", flush=True)


def _context(
    system: openmm.System, friction_per_ps: float, timestep_fs: float, rng: np.random.Generator
) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(300.0, friction_per_ps, timestep_fs * 1e-3)
    integrator.setRandomNumberSeed(int(rng.integers(1, 2**31)))
    platform = openmm.Platform.getPlatformByName("CPU")
    return openmm.Context(system, integrator, platform, {"Threads": "1"})


def _record(context: openmm.Context, count: int, steps: int) -> dict[str, np.ndarray]:
    """Run, and return frames with energies and forces of the unbiased molecule (group 0).

    Molecules stay whole: positions are unwrapped unless OpenMM is asked to wrap them.
    """
    frames: dict[str, list[np.ndarray | float]] = {"positions": [], "forces": [], "energy": []}
    for _ in range(count):
        context.getIntegrator().step(steps)
        state = context.getState(positions=True, energy=True, forces=True, groups={0})
        frames["positions"].append(state.getPositions(asNumpy=True)._value * NM)
        frames["forces"].append(state.getForces(asNumpy=True)._value * (KJ_PER_MOL / NM))
        frames["energy"].append(state.getPotentialEnergy()._value * KJ_PER_MOL)
    return {**{key: np.array(values) for key, values in frames.items()}, **_last(context)}


def _last(context: openmm.Context) -> dict[str, np.ndarray]:
    state = context.getState(positions=True, velocities=True)
    return {
        "last_positions_nm": np.array(state.getPositions(asNumpy=True)._value),
        "last_velocities": np.array(state.getVelocities(asNumpy=True)._value),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["alanine", "chignolin", *BOXES])
    parser.add_argument("--public", help="folder of the public inputs; default $CCG_DATA")
    parser.add_argument("--runs", help="folder of the simulated frames; default $CCG_RUNS")
    args = parser.parse_args()
    runs = folder(args.runs, "CCG_RUNS")
    if args.name == "alanine":
        alanine(runs)
    elif args.name == "chignolin":
        chignolin(folder(args.public, "CCG_DATA"), runs)
    else:
        box(folder(args.public, "CCG_DATA"), runs, args.name)


if __name__ == "__main__":
    main()
