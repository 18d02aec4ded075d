"""The smallest budget that breaks each clip, and with it the whole curve over epsilon."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def smallest_budgets(record: Mapping[str, Any], rows: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One line a condition that looked for them: at how many times its epsilon what share of the clips is broken.

    Columns: condition, attacked, level, budget, clips (that are not wrong already, as for attack success), wrong (those
    that are), broken (clips for which some budget was found), `at_5` ... `at_95` (times epsilon; nan where fewer clips than that were broken),
    `at_50_low` and `at_50_high` (95 %, from order statistics), `all` (the largest; nan unless every clip was broken).
    """
    lines = []
    for key, described in record["identity"]["conditions"].items():
        if not described["smallest"]:
            continue
        sizes = budgets_of(rows[key])
        wrong = int((sizes == 0).sum())
        sizes = sizes[sizes > 0]
        low, high = median_interval(sizes)
        lines.append(
            {
                "condition": described["name"],
                "attacked": "+".join(described["attacked"]),
                "level": described["level"],
                "budget": "; ".join(f"{m} {text}" for m, text in described["budgets"].items()),
                "clips": len(sizes),
                "wrong": wrong,
                "broken": int(np.isfinite(sizes).sum()),
                **{f"at_{share * 100:.0f}": _at(sizes, share) for share in SHARES},
                "at_50_low": _finite(low),
                "at_50_high": _finite(high),
                "all": _at(sizes, 1.0),
                "violations": int((rows[key]["violation"] != "").sum()),
            }
        )
    return pd.DataFrame(lines)


def budgets_of(rows: pd.DataFrame) -> NDArray[np.float64]:
    """Of each clip the smallest multiple of epsilon that breaks it: 0 where it is wrong already, infinite if none was found."""
    return np.where(rows["reached"].to_numpy(dtype=bool), rows["gauge"].to_numpy(), np.inf)


def median_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """A distribution-free interval for the median: order statistics whose ranks a fair coin leaves inside.

    Infinite values are fine. (nan, nan) where too few values can give that level.
    """
    ranked, n = np.sort(values), len(values)
    below = int(scipy.stats.binom.ppf((1 - level) / 2, n, 0.5)) if n else 0
    if below < 1:
        return float("nan"), float("nan")
    return float(ranked[below - 1]), float(ranked[n - below])


def _at(sizes: NDArray[np.float64], share: float) -> float:
    """The smallest multiple at which at least `share` of the clips are broken; nan where none is."""
    place = max(int(np.ceil(share * len(sizes))) - 1, 0)
    return _finite(np.sort(sizes)[place]) if len(sizes) else float("nan")


def _finite(value: float) -> float:
    return float(value) if np.isfinite(value) else float("nan")
