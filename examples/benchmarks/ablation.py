"""Which term of the flow's loss buys what: alanine dipeptide, five backbone beads, several seeds.

    python ablation.py RUN/reference.npz RUN/model.ccg                    # all rows, three seeds
    python ablation.py RUN/reference.npz RUN/model.ccg --rows forces reverse_kl --seeds 1
    python ablation.py --table ablation.jsonl                             # print what is there

Every seed has one start, a new flow fitted by likelihood; every row continues from it for the same
number of steps. Bead forces and free energies are those of the model's force field, but in the row
"joint", which learns them along. Each finished row is appended to --out, and skipped when found
there, so that an interrupted table continues. One core: about 3 min per start, 2 to 4 min per row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ccg_ase import ForceField, load_model
from ccg_ase.energies import bead_energies
from ccg_mda import Backmapper
from ccg_mda.potential import OpenMMPotential
from ccg_training import evaluation
from ccg_training.fit_flow import (
    LIKELIHOOD_ONLY,
    NAMED_LOSSES,
    FlowFrames,
    FlowLoss,
    OwnSamples,
    fit_flow,
    mean_nll,
)
from ccg_training.reference import ReferenceData

PDB = Path(__file__).parent.parent / "alanine_dipeptide" / "alanine_dipeptide.pdb"
FIGURES = ("nll", "ess_mean", "ess_p5", "label_variance_kJ2", "ess_mean_rare", "ess_p5_rare")


class Ablation:
    """Data, potential and bead force field of a table, and how a row of it is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.train, self.held_out = ReferenceData.load(args.reference).split(0.1)
        model = load_model(args.model)
        self.force_field, self.cg_map = ForceField.from_model(model), model.cg_map
        self.temperature_K = model.temperature_K
        self.potential = OpenMMPotential.from_pdb(PDB, ["amber96.xml", "amber96_obc.xml"])
        self.frames, self.judged = self._frames(self.train), self._frames(self.held_out)

    def _frames(self, data: ReferenceData) -> FlowFrames:
        beads = self.cg_map.apply(data.positions)
        energy, force = bead_energies(self.force_field, beads)
        every = np.ones(len(data))
        return FlowFrames(data.positions, every, data.forces, data.energy, force, energy)

    def start(self, seed: int) -> tuple[Backmapper, dict]:
        """Fit a new flow by likelihood."""
        positions = torch.from_numpy(self.train.positions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = Backmapper.from_data(self.cg_map, self.temperature_K, positions)
        return flow, self._fit(flow, LIKELIHOOD_ONLY, self.args.start_steps, 512, 5.0, seed)

    def row(self, name: str, flow: Backmapper, seed: int) -> dict:
        """Continue from a start with one of the named losses."""
        flow, args = copy.deepcopy(flow), self.args
        terms = FlowLoss() if name == "joint" else FlowLoss.named(name)
        return self._fit(flow, terms, args.steps, args.batch_size, 1.0, seed, name == "joint")

    def _fit(self, flow, terms, steps, batch_size, clip, seed, joint=False) -> dict:
        frames, judged = self.frames, self.judged
        if joint:
            frames, judged = (
                dataclasses.replace(f, bead_force=None, free_energy=None) for f in (frames, judged)
            )
        begun = time.perf_counter()
        fit = fit_flow(
            flow,
            frames,
            terms=terms,
            steps=steps,
            batch_size=batch_size,
            learning_rate=self.args.learning_rate,
            seed=1000 + seed,
            clip=clip,
            held_out=judged,
            patience=20,  # twentieths: to the end, past the harm that a new peak of the rate does
            own=OwnSamples(self.potential) if terms.needs_samples else None,
            free_energy=self._fresh_force_field(seed) if joint else None,
        )
        seconds = time.perf_counter() - begun
        _, figures = evaluation.held_out_check(
            flow,
            self.potential,
            self.train,
            self.held_out,
            n_states=self.args.states,
            n_samples=200,
            seed=1,
            progress=lambda done, all_of_them: None,
        )
        return figures | {
            "nll": mean_nll(flow, self.held_out.positions),
            "calls": fit.energy_calls,
            "seconds": seconds,
            "fit": str(fit),
        }

    def _fresh_force_field(self, seed: int) -> ForceField:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ForceField.from_config(self.cg_map, self.temperature_K, self.force_field.config)


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the rows that aren't in --out yet, one after the other."""
    done = {(record["row"], record["seed"]) for record in records(args.out)}
    ablation = Ablation(args)
    for seed in range(args.seeds):
        missing = [name for name in args.rows if (name, seed) not in done]
        if not missing and ("start", seed) in done:
            continue
        flow, figures = ablation.start(seed)
        if ("start", seed) not in done:
            yield {"row": "start", "seed": seed} | figures
        for name in missing:
            yield {"row": name, "seed": seed} | ablation.row(name, flow, seed)


def records(path: str) -> list[dict]:
    """Return the rows of a file, none if there is no such file."""
    file = Path(path)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(found: list[dict]) -> str:
    """Return a Markdown table of mean ± standard deviation over the seeds of each row."""
    lines = [
        "| terms | seeds | " + " | ".join(FIGURES) + " | calls | seconds |",
        "| --- " * (len(FIGURES) + 4) + "|",
    ]
    for name in dict.fromkeys(record["row"] for record in found):
        rows = [record for record in found if record["row"] == name]
        cells = []
        for figure in FIGURES:
            values = [record[figure] for record in rows if figure in record]
            spread = f" ± {np.std(values, ddof=1):.3g}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if values else "")
        cells += [
            f"{np.mean([record[key] for record in rows]):.0f}" for key in ("calls", "seconds")
        ]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", nargs="?")
    parser.add_argument("model", nargs="?")
    parser.add_argument(
        "--table", metavar="FILE", help="print the table of a file, measure nothing"
    )
    rows = [*NAMED_LOSSES, "joint"]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start-steps", type=int, default=1400)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--states", type=int, default=80)
    parser.add_argument("--out", default="ablation.jsonl")
    args = parser.parse_args()
    if args.table is None:
        if args.model is None:
            parser.error("give the reference frames and a trained model, or --table")
        torch.set_num_threads(1)
        for record in measure(args):
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(record["row"], record["seed"], record["fit"], flush=True)
    print(table(records(args.table or args.out)))


if __name__ == "__main__":
    main()
