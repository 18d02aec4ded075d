"""From a validation to a report: what predicts measured robustness, and what is not shown to."""

from collections.abc import Iterable, Sequence

import pandas as pd

from robustav.geometry.joining import Joined
from robustav.geometry.validation import BASELINES, CONTROLS, Validation
from robustav.report.grids import Cell, Grid, GridReport
from robustav.report.text import NONE, between, number

HEADLINES = (
    "relative density",
    "-log radius",
    "local dimension",
    "purity gain",
    "modality gap",
    "fusion gain",
    "published convexity",
    "conditional convexity",
    "soft convexity",
    "hardened convexity, area",
    "hardened convexity given accepted, area",
    "flip distance",
    "graph convexity",
)
FEW_MODELS = 20  # below this a correlation across models says little
FEW_CLASSES = 20  # likewise across classes
FEW_BUDGETS = 4


def validation_report(joined: Sequence[Joined], found: Validation) -> GridReport:
    """The report of `robustav metrics validate`: baselines first, then every metric, then what choosing is worth."""
    table = found.table
    baselines = table[table["metric"].isin(BASELINES)]
    metrics = table[~table["metric"].isin(BASELINES)]
    first = metrics.groupby(["metric", "space"])["setting"].transform("first") == metrics["setting"]
    headline = metrics["metric"].isin(HEADLINES) & metrics["space"].isin(["", "raw", "matched"])
    brief = metrics[headline & first]
    rest = metrics.drop(brief.index)
    grids = [
        _grid("baselines, which a metric must beat", baselines),
        _grid("metrics", brief),
        *([_grid("other metrics, spaces and settings", rest, brief=False)] if len(rest) else []),
    ]
    if len(found.held_out):
        grids.append(_held_out(found.held_out))
    if len(found.across):
        grids.append(_across(found.across))
    rows = pd.concat(
        [
            frame.assign(table=name)
            for name, frame in (("within", table), ("held out", found.held_out), ("across", found.across))
            if len(frame)
        ],
        ignore_index=True,
    )
    header = {
        "runs": ", ".join(found.models),
        "target": f"{found.target}, under attack on {_and(run.attacked for run in joined)}, mean over the budgets "
        f"({_and(str(n) for n in found.levels)})",
        "data": f"{joined[0].view.samples.name}, {_and(str(run.measured.clips) for run in joined)} clips attacked, metrics on "
        f"{_and('the same' if run.same_clips else f'{len(run.view.latents)} others' for run in joined)}, "
        f"{len(joined[0].view.latents.classes)} classes",
        "goal": _and(run.goal for run in joined),
        "controls": "partial coefficients are given " + ", ".join(CONTROLS) + " (a control itself only the others)",
        "run": f"{len(joined[0].view.weights)} resamples of classes and clips, seed {joined[0].view.survey.seed}",
    }
    return GridReport(
        "Do latent metrics predict robustness?", header, grids, _notes(joined, found, len(rest)), rows, _skipped(joined)
    )


def _grid(title: str, table: pd.DataFrame, *, brief: bool = True) -> Grid:
    several = table["models"].nunique() > 1
    head = [
        "metric",
        "where",
        "space, setting",
        *(["models"] if several else []),
        "rho",
        "tau",
        "partial rho",
        "p",
        "Holm",
    ]
    body: list[list[Cell]] = []
    for _, row in table.iterrows():
        details = ", ".join(text for text in (row["space"], row["setting"]) if text)
        words = [row["metric"], row["where"], details or NONE, *([str(row["models"])] if several else [])]
        body.append(
            [
                *((text, "") for text in words),
                _cell(row, "rho"),
                (number(row["kendall"], 2), ""),
                _cell(row, "partial"),
                (number(row["partial_p"], 3), ""),
                (number(row["partial_p_holm"], 3), ""),
                (row["verdict"], ""),
            ]
        )
    return Grid(title, [*head, "verdict"], body, words=3, brief=brief)


def _cell(row: pd.Series, name: str) -> Cell:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return number(row[name], 2), "" if pd.isna(low) else between(low, high, 2)


def _held_out(table: pd.DataFrame) -> Grid:
    body: list[list[Cell]] = [
        [
            (row["metric"], ""),
            (str(row["variants"]), ""),
            (number(row["in_sample"], 2), ""),
            _cell(row, "held_out"),
            (f"{row['chosen_most']} ({row['chosen_share']:.0%})", ""),
        ]
        for _, row in table.dropna(subset=["held_out"]).sort_values("held_out", ascending=False).iterrows()
    ]
    head = ["metric", "variants", "best |rho| in sample", "rho held out", "most often chosen"]
    return Grid("choosing layer, space, k and sigma on one half, measured on the other", head, body)


def _across(table: pd.DataFrame) -> Grid:
    body: list[list[Cell]] = [
        [
            (row["metric"], ""),
            (row["where"], ""),
            (", ".join(text for text in (row["space"], row["setting"]) if text) or NONE, ""),
            (str(row["models"]), ""),
            _cell(row, "rho"),
            (number(row["kendall"], 2), ""),
            (number(row["p"], 3), ""),
            (number(row["p_holm"], 3), ""),
        ]
        for _, row in table.iterrows()
    ]
    head = ["metric", "where", "space, setting", "models", "rho", "tau", "p", "Holm"]
    return Grid("across models, macro means", head, body, words=3, brief=False)


def _skipped(joined: Sequence[Joined]) -> pd.DataFrame:
    """Clips of the surveys that could not be used."""
    reasons = {name: reason for run in joined for name, reason in run.view.latents.skipped.items()}
    return pd.DataFrame({"sample": list(reasons), "reason": list(reasons.values())})


def _notes(joined: Sequence[Joined], found: Validation, more: int) -> list[str]:
    table = found.table[~found.table["metric"].isin(BASELINES)]
    predicts = table[table["predicts"]]
    notes = [
        "rho is Spearman's coefficient across classes within a model (mean over models), tau Kendall's tau-b; the partial "
        "coefficient is Spearman's given clean score, log frequency and logit margin. Intervals are 95 %, two-level bootstrap "
        "over classes and clips, its median moved to the coefficient itself (clip noise enters a resample twice and pulls it to 0); "
        "percentile and BCa intervals are in CSV and JSON. p is by permutation of the classes, for the partial "
        "coefficient; Holm's adjustment is over all metrics tried here, shown or not.",
        f"{more} more rows (other metrics, spaces, thresholds) are in the formats that are kept (--format md, --out).",
        f"{len(predicts)} of {len(table)} metrics, layers and settings have a partial interval that excludes 0; with that many tried, "
        f"some do by chance: {int((table['partial_p_holm'] < 0.05).sum())} stay below 0.05 after Holm.",
        *(
            [
                "WARNING: metric and target are measured on the same clips, so they share their noise, and that alone can correlate "
                "them. Attack a part of the data with --limit and leave the rest to the metrics."
            ]
            if any(run.same_clips for run in joined)
            else [
                "Metrics are measured on clips of the same data that the runs did not attack; the target and the controls on those they did."
            ]
        ),
    ]
    classes = len(joined[0].view.latents.classes)
    if classes < FEW_CLASSES:
        notes.append(
            f"WARNING: {classes} classes: a coefficient over so few is rough, and one given three controls rougher still."
        )
    if len(joined) < FEW_MODELS:
        notes.append(
            f"{len(joined)} model{'s' * (len(joined) > 1)}: across models nothing can be claimed (at least {FEW_MODELS} are wanted)."
        )
    if len(found.across):
        notes.append(
            "Across models only metrics without a scale are compared, and only runs that attack the same modalities with the same "
            "budgets and goal."
        )
    if min(found.levels) < FEW_BUDGETS:
        notes.append(
            f"WARNING: the target is a mean over {min(found.levels)} budget{'s' * (min(found.levels) > 1)}; {FEW_BUDGETS} or more tell "
            "a curve from a point: robustav attack --eps 0.001,0.002,0.005,0.01."
        )
    own = sum(run.measured.unlabelled for run in joined), sum(int((~run.view.latents.labelled).sum()) for run in joined)
    if any(own):
        notes.append(
            f"WARNING: {own[0]} attacked and {own[1]} surveyed clips have no usable label: the model's own prediction stands in, "
            "so clean scores are high by construction, and so is what follows from them."
        )
    notes.append(
        "The target is only as good as the attack: robust scores of a weak one are too high, and what they correlate with "
        "may be the attack's weakness."
    )
    if joined[0].view.samples.name.startswith("av-events"):
        notes.append("av-events is synthetic: what predicts here need not predict on real recordings.")
    return notes


def _and(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))
