"""The cycle on alanine dipeptide, from one structure: F(φ, ψ) within a budget of energy calls.

    export CCG_DATA=... CCG_RUNS=...        # public inputs, see systems.py; what is written
    python free_energy_surface.py reference # what it is measured by
    python free_energy_surface.py frames    # held-out states
    python cycle.py run beads --seed 0      # ccg train; ccg free-energy after every turn
    python cycle.py run torsions --seed 0
    python cycle.py table                   # error of F and ΔF against calls, over all seeds
    python cycle.py labels --seed 0         # mean forces of the first and of the last force field
    python cycle.py chignolin               # Cα beads, two hours on two cores

ff96 with OBC1, 300 K. No data but the structure file: `[reference] source = "structure"`. Every
call counts: hot and restrained dynamics, labels, the final check, and those of the surface itself.
A run that was stopped continues. The final ensemble: weighted_observables.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openmm
import surface
from simulate import alanine_potential, folder
from surface import Curve, Reference
from systems import ALANINE_BEADS, chignolin_start

from ccg_ase.checkpoint import load_model
from ccg_ase.forcefield import ForceField
from ccg_ase.torsion_map import dihedral_angles
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper
from ccg_training.fit_forcefield import evaluate_force_field
from ccg_training.labels import Labels
from ccg_training.reconstruction import reconstruct
from ccg_training.reference import ReferenceData, read_npz
from ccg_training.samples import Samples

TOPOLOGY = Path(__file__).parents[1] / "alanine_dipeptide" / "alanine_dipeptide.pdb"
BACKBONE = list(ALANINE_BEADS["slices"].values())
TEMPERATURE_K, BINS, BUDGET = 300.0, 24, 1_000_000
OF_SURFACE = {"beads": 160_000, "torsions": 120_000}  # calls that it may take
ON = {"beads": ["phi=torsion:C1-N2-CA2-C2", "psi=torsion:N2-CA2-C2-N3"], "torsions": ["phi", "psi"]}
SETTINGS = """
[flow]
hops = 4
[reference]
source = "structure"
hot_time_ps = 150
n_states = 200
relaxation_ps = 0.5
restrained_ps = 1.0
save_every_fs = 20
[force_field]
members = 2
channels = 16
learning_rate = 4e-3
steps = 1200
refit_steps = 1000
[cycle]
iterations = 4
max_samples = 256
[stop]
target_accepted = 0.98
"""
CHIGNOLIN = """
[system]
topology = "chignolin.pdb"
[potential]
system = "system.xml"
[mapping]
preset = "ca"
[flow]
coordinate_steps = 0
force_steps = 0
loss = "likelihood"
refit_steps = 100
[reference]
source = "structure"
hot_time_ps = 400
n_states = 300
relaxation_ps = 1.0
restrained_ps = 3.0
save_every_fs = 50
[force_field]
members = 2
[cycle]
iterations = 10
n_states = 200
n_frame_labels = 5000
n_report = 500
[stop]
max_hours = 2.0
[run]
directory = "run"
"""


def config_of(way: str, seed: int, where: Path) -> Path:
    """Write the TOML file of a run."""
    if way == "beads":
        rows = {f"beads.{name}": json.dumps(text) for name, text in ALANINE_BEADS["slices"].items()}
    else:
        rows = {
            "torsions.phi": json.dumps(BACKBONE[:4]),
            "torsions.psi": json.dumps(BACKBONE[1:]),
        }
    lines = [f'[system]\ntopology = "{TOPOLOGY}"', "[mapping]"]
    lines += [f"{key} = {value}" for key, value in rows.items()]
    text = "\n".join(lines) + SETTINGS + f"max_calls = {BUDGET - OF_SURFACE[way]}\n"
    text += f'[run]\nseed = {seed}\ndirectory = "run"\n'
    where.mkdir(parents=True, exist_ok=True)
    (where / "cycle.toml").write_text(text)
    return where / "cycle.toml"


def ccg(*arguments: object) -> None:
    """Run a command of ccg, and stop if it fails."""
    subprocess.run([sys.executable, "-m", "ccg_training", *map(str, arguments)], check=True)


def run(runs: Path, args: argparse.Namespace) -> None:
    """Train, then map F(φ, ψ) with the models after every turn, or after the last one."""
    where = runs / "cycle" / f"{args.way}_{args.seed}"
    config = config_of(args.way, args.seed, where)
    ccg("train", config, "--resume")
    on = [word for text in ON[args.way] for word in ("--on", text)]
    models = sorted((where / "run").glob("iteration_*/model.ccg"))
    for model in models[-1:] if args.last else models:
        out = where / f"{model.parent.name}.npz"
        if not out.exists():
            basins = ("--basin", "phi<0", "--basin", "phi>0")
            grid = (*on, "--bins", BINS, *basins, "--samples", 128, "--most", 4096)
            ccg("free-energy", model, config, *grid, "--out", out, "--seed", args.seed)


def curve(where: Path, way: str) -> tuple[list[int], Curve]:
    """Return the turns of a run after which F was mapped, that F, and the calls up to there."""
    records = json.loads((where / "run" / "state.json").read_text())
    files = sorted(where.glob("iteration_*.npz"))
    turns, calls, surfaces = [int(file.stem.split("_")[1]) for file in files], [], []
    for turn, file in zip(turns, files, strict=True):
        stored = read_npz(file)
        spent = sum(record["calls"] for record in records if record["iteration"] <= turn)
        name = {"beads": "bead_ensemble", "torsions": "direct"}[way]
        calls.append(spent + int(stored[f"{name}_n_calls"]))
        surfaces.append(stored[f"{name}_free_energy"] / thermal_energy(TEMPERATURE_K))
    return turns, Curve(np.array(calls), np.array(surfaces)[None])


def table(runs: Path, args: argparse.Namespace) -> None:
    """Print errors against calls."""
    truth = Reference.load(surface.reference_file(runs / "free_energy_surface"), BINS)
    print(f"reference: noise {truth.noise:.3f} kT, ΔF {truth.difference:.3f} kT")
    print("| way | seed | turn | energy calls | rms error of F, kT | unknown bins | ΔF off, kT |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for where in sorted((runs / "cycle").glob("*_[0-9]*")):
        way, seed = where.name.split("_")
        turns, found = curve(where, way)
        found.save(where / "curve.npz")
        for turn, calls, F in zip(turns, found.calls, found.free_energy[0], strict=True):
            error = surface.rms_error(F, truth, at_centres=False)
            print(
                f"| {way} | {seed} | {turn} | {calls} | {error:.3f} | "
                f"{surface.unvisited(F, truth):.1%} | "
                f"{surface.difference(F) - truth.difference:+.3f} |"
            )


def labels(runs: Path, args: argparse.Namespace) -> None:
    """Compare mean forces of the first and the last force field with labels at held-out states.

    Half of the states are those of equilibrium, half of frames all over the plane of (φ, ψ), made
    by the reference. Labels are weighted averages of the last flow; their errors are taken off.
    """
    where = runs / "cycle" / f"beads_{args.seed}" / "run"
    surfaces = runs / "free_energy_surface"
    common = ReferenceData.load(surfaces / "frames.npz").positions
    flattened = read_npz(surfaces / "reference" / "static_000.npz")["positions"]
    rng = np.random.default_rng(args.seed)
    some = [rng.choice(part, args.states // 2, replace=False) for part in (common, flattened)]
    last = load_model(where / "model.ccg")
    beads = last.cg_map.apply(np.concatenate(some))
    flow, potential = Backmapper.from_model(last), alanine_potential()
    parts = [
        reconstruct(flow, potential, piece, args.samples, rng)
        for piece in np.array_split(beads, max(1, len(beads) // 10))
    ]
    found = Labels.from_samples(Samples.concatenate(*parts))
    angles = dihedral_angles(found.beads, last.cg_map.beads.dihedrals()[:2])
    place = tuple(((angles + np.pi) * (BINS / (2 * np.pi))).astype(int).clip(0, BINS - 1).T)
    rare = ~(Reference.load(surface.reference_file(surfaces), BINS).free_energy[place] < 4.0)
    print(f"{len(found)} of {len(beads)} labels accepted, {rare.sum()} of them above 4 kT")
    models = {"first": where / "iteration_0" / "model.ccg", "last": where / "model.ccg"}
    for name, part in (("all", slice(None)), ("below 4 kT", ~rare), ("above 4 kT", rare)):
        errors = {
            which: evaluate_force_field(ForceField.from_model(load_model(path)), found[part])
            for which, path in models.items()
        }
        first, final = (errors[which]["force_error"] for which in models)
        print(f"{name}: mean force off by {first:.4f} eV/Å before, {final:.4f} after, ratio "
              f"{first / max(final, 1e-9):.1f}; can't be told below "
              f"{errors['last']['force_resolution']:.4f}")  # fmt: skip


def chignolin(runs: Path, args: argparse.Namespace) -> None:
    """Run the cycle on chignolin with GBSA, from its folded structure, within two hours."""
    where = runs / "cycle" / "chignolin"
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "cycle.toml").exists():
        universe, potential = chignolin_start(folder(None, "CCG_DATA"))
        universe.atoms.write(str(where / "chignolin.pdb"), bonds="all")
        (where / "system.xml").write_text(openmm.XmlSerializer.serialize(potential.system))
        (where / "cycle.toml").write_text(CHIGNOLIN)
    ccg("train", where / "cycle.toml", "--resume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", help="folder of the simulated frames; default $CCG_RUNS")
    commands = parser.add_subparsers(required=True)
    for work in (run, table, labels, chignolin):
        command = commands.add_parser(work.__name__, help=work.__doc__.splitlines()[0])
        command.set_defaults(work=work)
        if work in (run, labels):
            command.add_argument("--seed", type=int, default=0)
        if work is run:
            command.add_argument("way", choices=list(ON))
            command.add_argument(
                "--last", action="store_true", help="map F after the last turn only"
            )
        if work is labels:
            command.add_argument("--states", type=int, default=300)
            command.add_argument("--samples", type=int, default=512)
    args = parser.parse_args()
    args.work(folder(args.runs, "CCG_RUNS"), args)


if __name__ == "__main__":
    main()
