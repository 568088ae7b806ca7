"""How often error bars cover the truth: every estimator, 100 repetitions, molecules known exactly.

    python calibration.py

Intervals of one and of 1.96 standard errors should cover 68 % and 95 %, give or take 5 % and 2 %;
the mean over the repetitions should be within three of its own standard errors. Takes a minute;
figures of the last release: README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the molecules of the tests


def main() -> None:
    """Print the table."""
    from calibration_cases import CASES

    print("| estimator | 68 % | 95 % | z of the mean |\n| --- | --- | --- | --- |")
    worst = 0.0
    for case, work in CASES.items():
        for name, (value, error, truth) in work().items():
            deviation = value - truth
            z = deviation.mean() / deviation.std(ddof=1) * np.sqrt(len(value))
            one, two = ((np.abs(deviation) < width * error).mean() for width in (1.0, 1.96))
            print(f"| {case}: {name} | {one:.0%} | {two:.0%} | {z:+.1f} |")
            worst = max(worst, abs(z))
    print(f"\ngreatest |z| of a mean: {worst:.1f}")


if __name__ == "__main__":
    main()
