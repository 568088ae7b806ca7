"""Values and error bars of every estimator in repetitions: no bias, and the coverage they claim."""

import numpy as np
import pytest
from calibration_cases import CASES, REPETITIONS
from scipy.stats import binom


def assert_calibrated(value, error, truth, name=""):
    """Mean within 3 standard errors; 68 % and 95 % intervals cover as often as chance allows.

    That is within binomial bounds which all of some sixty such checks keep together at 99.4 %.
    """
    n = len(value)
    deviation = value - truth
    assert abs(deviation.mean()) < 3 * deviation.std(ddof=1) / np.sqrt(n), name
    for level, width in ((0.6827, 1.0), (0.95, 1.96)):
        covered = (np.abs(deviation) < width * error).sum()
        low, high = binom.interval(0.9999, n, level)
        assert low <= covered <= high, (name, level, covered, low, high)


def test_this_check_can_fail():
    rng = np.random.default_rng(0)
    value, error = rng.normal(size=REPETITIONS), np.ones(REPETITIONS)
    assert_calibrated(value, error, 0.0)
    for wrong in ((value, error / 1.5, 0.0), (value, error * 1.7, 0.0), (value + 0.4, error, 0.0)):
        with pytest.raises(AssertionError):
            assert_calibrated(*wrong)


@pytest.mark.parametrize("case", CASES)
def test_estimators(case):
    for name, found in CASES[case]().items():
        assert_calibrated(*found, name)
