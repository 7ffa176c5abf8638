"""How sure is a score: percentile bootstrap over the test samples.

Efron and Tibshirani, *An Introduction to the Bootstrap* (1993), chapter 13; for BLEU and for
paired comparisons Koehn, *Statistical Significance Tests for Machine Translation Evaluation*
(EMNLP 2004). The interval says what another draw of test rows would give; it says nothing
about another training seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from baton.errors import DataError

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A point estimate (`mean`) and the two ends of its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """For a difference: the data decide which of the two is better."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(
    values: Sequence[float] | Floats, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """Mean of `values` with its percentile bootstrap interval.

    One value cannot vary: for n = 1 the interval is the point, which means "unknown", not
    "certain". Raises DataError for no values or a value that is NaN or infinite.
    """
    numbers = _finite(values)
    mean = float(numbers.mean())
    # Resampling deviations keeps equal values (and n = 1) free of rounding in sum / n.
    sums = resampled_sums((numbers - mean)[:, None], seed=seed, resamples=resamples)
    low, high = percentiles(sums[:, 0] / len(numbers), level=level)
    return Interval(mean=mean, low=mean + low, high=mean + high)


def paired_difference(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Mean of `a - b` over the same test rows, with its interval; positive: `a` is better.

    Row i of both must be the same test question. Pairing removes the spread between easy and
    hard questions, so it decides far earlier than a look at two separate intervals.
    """
    if len(a) != len(b):
        raise DataError(
            f"a paired difference needs the same test rows on both sides, got {len(a)} and {len(b)}"
        )
    return bootstrap_mean(_finite(a) - _finite(b), seed=seed, resamples=resamples, level=level)


def resampled_sums(rows: Floats, *, seed: int, resamples: int) -> Floats:
    """Column sums of `rows` (n, k) over `resamples` draws of n rows with replacement.

    Returns (resamples, k). The draws depend on (seed, n) alone, never on k. One draw is in
    memory at a time: 100,000 rows cost a few MB, however many resamples are asked for.
    """
    n = len(rows)
    if n == 0:
        raise DataError("nothing to resample: there are no scored samples")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.Generator(np.random.PCG64(seed))
    sums = np.empty((resamples, rows.shape[1]))
    for draw in sums:
        counts = np.bincount(rng.integers(0, n, size=n), minlength=n).astype(np.float64)
        # Not `counts @ rows`: BLAS sums in an order that depends on the number of threads.
        draw[:] = np.einsum("n,nk->k", counts, rows)
    return sums


def percentiles(estimates: Floats, *, level: float) -> tuple[float, float]:
    """The two ends that leave (1 - level) / 2 of the bootstrap estimates outside on each side."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _finite(values: Sequence[float] | Floats) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"expected one number a sample, got shape {numbers.shape}")
    if len(numbers) == 0:
        raise DataError("no mean without values: there are no scored samples")
    if not np.isfinite(numbers).all():
        bad = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise DataError(f"sample {bad} has the value {numbers[bad]}; scores must be finite")
    return numbers
