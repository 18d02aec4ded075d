"""Do metrics of latents predict measured robustness? Each metric against runs, class by class and model by model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from robustav.geometry.joining import Joined
from robustav.geometry.measure import Measure
from robustav.geometry.targets import MULTIPLES, TARGETS
from robustav.metrics.correlation import kendall, spearman
from robustav.metrics.intervals import Interval, bca_interval, centred_interval, holm, percentile_interval
from robustav.metrics.selection import held_out
from robustav.metrics.validity import across, claim, class_draws, jackknife, permutation_p, two_level, within

BASELINES = ("clean score", "logit margin", "first-order margin", *(f"noise score x{n}" for n in MULTIPLES))
ALPHA = 0.05
SCALED = (  # depend on the scale of the latents, or on recall alone: never compared between models
    "log density",
    "-log radius",
    "entropy",
    "gaussian density",
    "kernel density",
    "published convexity",
    "both ends accepted",
    "both ends rejected",
)
CONTROLS = ("clean score", "log frequency", "logit margin")


@dataclass(frozen=True)
class Validation:
    """Every predictor against the target: within models over classes, and across models."""

    table: pd.DataFrame  # a row a predictor
    held_out: pd.DataFrame  # a row a metric: what the choice of its layer, space, k and sigma is worth
    across: pd.DataFrame  # a row a predictor, models as units; empty with fewer than 3 models
    classes: pd.DataFrame  # a row a model and class: target, attack success and every predictor
    target: str  # in words
    models: tuple[str, ...]
    levels: tuple[int, ...]  # budgets of each run that the target is a mean over


def validate(joined: Sequence[Joined], *, target: str, seed: int) -> Validation:
    """Correlations of every predictor that the runs share with the target, and what may be said of each.

    Within models: the coefficient across the classes of each model, mean over the models that have the predictor.
    Intervals are of the two-level bootstrap over classes and clips, moved so that its median is the coefficient on the
    clips themselves: clip noise enters a resample a second time and pulls it towards 0. p-values are by permutation of
    the classes, Holm's over all metrics (baselines apart).
    """
    names = [run.name for run in joined]
    models = tuple(n if names.count(n) == 1 else f"{n} {i + 1}" for i, n in enumerate(names))
    classes = joined[0].view.latents.classes
    if other := [m for m, run in zip(models, joined, strict=True) if run.view.latents.classes != classes]:
        raise ValueError(f"the runs must be of models with the same classes, but those of {other[0]} differ")
    predictors = _predictors(joined)
    draws = class_draws(len(classes), len(joined[0].view.weights), seed=seed)
    table = pd.DataFrame([_row(key, found, joined, draws, seed) for key, found in predictors.items()])
    for column in ("p", "partial_p"):
        tried = table[column].notna() & ~table["metric"].isin(BASELINES)
        table[f"{column}_holm"] = np.nan
        if tried.any():
            table.loc[tried, f"{column}_holm"] = holm(table.loc[tried, column].to_numpy(dtype=float))
    said = [claim(Interval(row["partial_low"], row["partial_high"])) for _, row in table.iterrows()]
    table["predicts"] = [one.predicts for one in said]
    unadjusted = ~(table["partial_p_holm"] < ALPHA) & ~table["metric"].isin(BASELINES)
    table["verdict"] = [
        "no coefficient: it does not vary, or classes are too few"
        if np.isnan(partial)
        else (f"{one.words}; not after Holm" if one.predicts and late else one.words)
        for one, late, partial in zip(said, unadjusted, table["partial"], strict=True)
    ]
    robust = np.stack([run.measured.robust.values for run in joined])
    return Validation(
        table,
        _held_out(predictors, robust, seed),
        _across(joined, predictors, seed),
        _by_class(joined, models, predictors),
        TARGETS[target].words,
        models,
        tuple(run.measured.levels for run in joined),
    )


def _predictors(joined: Sequence[Joined]) -> dict[str, list[Measure | None]]:
    """Predictor -> its measure in each run, None where a model lacks it; measures of whole sets predict no class."""
    size = len(joined[0].view.latents.classes)
    found: dict[str, list[Measure | None]] = {}
    for i, run in enumerate(joined):
        for measure in run.measures:
            if len(measure.names) == size and np.isfinite(measure.values).any():
                found.setdefault(measure.key, [None] * len(joined))[i] = measure
    return found


def _row(
    key: str,
    found: Sequence[Measure | None],
    joined: Sequence[Joined],
    draws: Int[np.ndarray, "resample class"],
    seed: int,
) -> dict[str, object]:
    """One predictor against the target, over the models that have it."""
    pairs = [(m, run) for m, run in zip(found, joined, strict=True) if m is not None]
    one = pairs[0][0]
    values, resampled = np.stack([m.values for m, _ in pairs]), np.stack([m.resampled for m, _ in pairs])
    robust = np.stack([run.measured.robust.values for _, run in pairs])
    robust_resampled = np.stack([run.measured.robust.resampled for _, run in pairs])
    controls, controls_resampled = _controls([run for _, run in pairs], one.metric)
    row: dict[str, object] = {
        "key": key, "metric": one.metric, "where": one.where, "space": one.space, "setting": one.setting,
        "models": len(pairs), "classes": int(np.isfinite(values).all(0).sum()),
    }  # fmt: skip
    for name, given, given_resampled in (("rho", None, None), ("partial", controls, controls_resampled)):

        def statistic(kept: np.ndarray, given: np.ndarray | None = given) -> float:
            return within(values[:, kept], robust[:, kept], None if given is None else given[:, kept])

        everyone = np.arange(values.shape[1])
        point = statistic(everyone)
        drawn = two_level(resampled, robust_resampled, draws, given_resampled)
        for words, ends in (
            ("", centred_interval(point, drawn)),
            ("_percentile", percentile_interval(drawn)),
            ("_bca", bca_interval(point, drawn, jackknife(statistic, len(everyone)))),
        ):
            low, high = (max(ends.low, -1.0), min(ends.high, 1.0)) if np.isfinite(point) else (np.nan, np.nan)
            row |= {f"{name}{words}_low": low, f"{name}{words}_high": high}
        row[name] = point
        row["p" if name == "rho" else "partial_p"] = permutation_p(values, robust, seed=seed, controls=given)
    coefficients = np.atleast_1d(kendall(values, robust))
    row["kendall"] = float(np.nanmean(coefficients)) if np.isfinite(coefficients).any() else np.nan
    return row


def _controls(
    joined: Sequence[Joined], metric: str
) -> tuple[Float[np.ndarray, "model class control"], Float[np.ndarray, "model resample class control"]]:
    """Clean score, log frequency and logit margin on the target's clips; but not the one that is being judged itself."""
    values, resampled = [], []
    for run in joined:
        found = run.measured
        columns = dict(zip(CONTROLS, (found.clean, found.frequency, found.margin), strict=True))
        kept = [column for name, column in columns.items() if name != metric]
        values.append(np.stack([column.values for column in kept], axis=-1))
        resampled.append(np.stack([column.resampled for column in kept], axis=-1))
    return np.stack(values), np.stack(resampled)


def _held_out(predictors: Mapping[str, Sequence[Measure | None]], robust: np.ndarray, seed: int) -> pd.DataFrame:
    """For each metric with several variants: choose one on half of the classes (or models), measure it on the rest."""
    rows = []
    metrics = dict.fromkeys(next(m for m in found if m is not None).metric for found in predictors.values())
    for metric in metrics:
        everywhere = {
            key: [m for m in found if m is not None]
            for key, found in predictors.items()
            if all(m is not None and m.metric == metric for m in found)
        }
        complete = {key: found for key, found in everywhere.items() if all(np.isfinite(m.values).all() for m in found)}
        if len(complete) < 2:
            continue
        variants = np.stack([[m.values for m in found] for found in complete.values()], axis=1)
        result = held_out(variants, robust, seed=seed)
        favourite = list(complete)[int(result.chosen.argmax())]
        rows.append(
            {
                "metric": metric, "variants": len(complete), "in_sample": result.in_sample, "held_out": result.mean,
                "held_out_low": result.interval.low, "held_out_high": result.interval.high, "chosen_most": favourite,
                "chosen_share": result.chosen.max() / max(result.chosen.sum(), 1),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _across(joined: Sequence[Joined], predictors: Mapping[str, Sequence[Measure | None]], seed: int) -> pd.DataFrame:
    """Macro means with models as units, for predictors without a scale that at least 3 comparable models have.

    Comparable are runs with the same goal, attacked modalities and budgets; of several such groups the largest.
    """
    threats = [run.threat for run in joined]
    chosen = [i for i, threat in enumerate(threats) if threat == max(threats, key=threats.count)]
    rows = []
    for key, found in predictors.items():
        here = [(m, joined[i].measured.robust) for i in chosen if (m := found[i]) is not None]
        if len(here) < 3 or here[0][0].metric in SCALED:
            continue
        one = here[0][0]
        values = np.array([m.macro for m, _ in here])
        robust = np.array([np.nanmean(scores.values) for _, scores in here])
        draws = class_draws(len(here), here[0][0].resampled.shape[0], seed=seed)
        resampled = across(
            np.stack([m.macro_resampled for m, _ in here]),
            np.stack([np.nanmean(scores.resampled, axis=1) for _, scores in here]),
            draws,
        )
        rho = float(spearman(values, robust))
        ends = centred_interval(rho, resampled)
        rows.append(
            {
                "key": key, "metric": one.metric, "where": one.where, "space": one.space, "setting": one.setting,
                "models": len(here), "rho": rho, "rho_low": max(ends.low, -1.0), "rho_high": min(ends.high, 1.0),
                "kendall": float(kendall(values, robust)), "p": permutation_p(values, robust, seed=seed),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    if len(table):
        tried = table["p"].notna()
        table["p_holm"] = np.nan
        if tried.any():
            table.loc[tried, "p_holm"] = holm(table.loc[tried, "p"].to_numpy(dtype=float))
    return table


def _by_class(
    joined: Sequence[Joined], models: Sequence[str], predictors: Mapping[str, Sequence[Measure | None]]
) -> pd.DataFrame:
    """A row a model and class: target, attack success, and every predictor under its key."""
    frames = []
    for i, (run, model) in enumerate(zip(joined, models, strict=True)):
        columns: dict[str, object] = {
            "model": model,
            "class": list(run.view.latents.classes),
            "clips": run.view.latents.labels.sum(0).tolist(),
            "target": run.measured.robust.values,
            "clean": run.measured.clean.values,
            "attack success": run.measured.success.values,
        }
        columns |= {key: m.values for key, found in predictors.items() if (m := found[i]) is not None}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
