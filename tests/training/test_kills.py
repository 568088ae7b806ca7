"""Twenty SIGKILLs at random times: the run that is left ends as if nothing had happened."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest
from tiny_run import Interrupted, assert_same_result, new_folder, train

KILLS, LONGEST_S = 20, 25.0


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    """Last run: see examples/benchmarks/README.md."""
    whole = new_folder(tmp_path / "whole")
    assert train(whole).exit_code == 0
    broken = Interrupted(new_folder(tmp_path / "broken"))
    rng, killed, stages = np.random.default_rng(0), 0, []
    while killed < KILLS:
        end = time.monotonic() + rng.uniform(4.0, LONGEST_S)
        code, messages = broken.until(lambda end=end: time.monotonic() > end, signal.SIGKILL)
        stages.append(broken.stages_done())
        if code == 0:  # it came to its end: begin again
            assert_same_result(broken.run, whole / "run")
            broken.begin_again()
            continue
        assert code == -signal.SIGKILL, messages
        killed += 1
    print(f"{killed} kills, after {stages} stages")
    assert train(broken.folder, "--resume").exit_code == 0
    assert_same_result(broken.run, whole / "run")
