"""From measures of latents to a report: what each class and each layer has, and what its reader must know."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from robustav.geometry.convexity import ARG_MAX, F1
from robustav.geometry.measure import MACRO, Measure
from robustav.geometry.survey import View
from robustav.metrics.intervals import FEW_CLIPS, Interval
from robustav.report.grids import Cell, Grid, GridReport
from robustav.report.text import NONE, between, number

MOST_CLASSES = 30  # that a terminal shows; of more, the ends of the list
ENDS = 10
WORDS: Mapping[str, str] = {
    "relative density": "log of the distance to the k-th clip without the class over that to the k-th of the class, on equally "
    "many of both; above 0 the own class is closer. No scale in it: it compares between layers and models.",
    "relative density, strict": "the same against clips that share no label with the clip.",
    "log density": "k-NN log density within the class, with the class's own intrinsic dimension. Depends on the scale of the "
    "latents: rank classes by it, never layers or models.",
    "-log radius": "minus the log distance to the k-th clip of the class; depends on the scale likewise.",
    "entropy": "Kozachenko-Leonenko entropy of the class in nats, over all dimensions; depends on the scale and on how many there are.",
    "gaussian density": "minus half the squared Mahalanobis distance to the class's mean, one shrunk covariance for all classes; on "
    "the clips of the fit, so flattering.",
    "kernel density": "log density under Gaussian kernels on the class's other clips, after PCA to 20 axes.",
    "local dimension": "maximum-likelihood intrinsic dimension, harmonic mean over the class's clips.",
    "purity gain": "share of the k nearest clips that carry the class, less what chance would give.",
    "label overlap": "mean Jaccard overlap of labels with those of the k nearest clips.",
    "hubness": "skewness of how often a clip is among another's nearest; above 1 or so, few clips decide every other metric.",
    "modality gap": "relative density of one modality's features less the other's, on as many principal axes and at one scale.",
    "fusion gain": "relative density of the fused latent less that of the better modality, likewise.",
    "density in": "clips in a typical ball of the other set, relative to what is usual there: about 1 where both are alike.",
    "coverage of": "share of the other set's balls that are reached, as many clips of both: about 1 - 2^-k where both are alike.",
    "published convexity": "share of random points between two clips of the class that score at least tau, as in the code released with "
    "arXiv:2203.12122, but with uniform pairs. Above a linear head it is at least the share of pairs with both ends accepted (and, "
    "multi-label, at most one minus that with both rejected): it then tells recall at tau, not convexity.",
    "both ends accepted": "share of pairs whose two clips score at least tau themselves.",
    "conditional convexity": "share of points between two accepted clips that are accepted; exactly 1 where only a linear layer "
    "follows, so read it at earlier layers.",
    "soft convexity": "smallest margin between two accepted clips over the larger of their own; at most 1, negative where "
    "segments leave the region.",
    "convexity defect": "how far margins fall below both ends' between accepted clips, over the ends' mean; 0 is convex.",
    "hardened convexity, area": "share of midpoints accepted under Gaussian noise, area under the curve over sigma; falls with thin regions, "
    "and with recall.",
    "hardened convexity given accepted, area": "the same between accepted clips only.",
    "flip distance": "distance gone from accepted clips towards clips without the class, per rejection that is met, in typical "
    "distances between neighbours.",
    "flipped segments": "share of those segments on which the class is ever rejected.",
    "mismatch consistency": "share of accepted pairs of a class whose mixed-up clip, one's audio with the other's picture, is accepted.",
    "graph convexity": "share of the inner clips of shortest paths between clips of the class that carry it, class and rest in equal "
    "numbers.",
}
CONVEXITY = tuple(WORDS)[list(WORDS).index("published convexity") :]
BY_CLASS = (
    "published convexity",
    "both ends accepted",
    "conditional convexity",
    "soft convexity",
    "hardened convexity, area",
    "flip distance",
)


def cell(value: float, ends: Interval, digits: int = 3) -> Cell:
    """A value and its interval, if it has one."""
    shown = "" if np.isnan(ends.low) or np.isnan(value) else between(float(ends.low), float(ends.high), digits)
    return number(value, digits), shown


def of_class(measure: Measure, i: int) -> Cell:
    """One class's value."""
    return cell(measure.values[i], measure.interval(i))


def of_macro(measure: Measure) -> Cell:
    """The macro mean; of a set, its only value."""
    if len(measure.names) == 1:
        return of_class(measure, 0)
    return cell(measure.macro, measure.macro_interval)


def by_class(title: str, columns: Mapping[str, Measure], view: View) -> list[Grid]:
    """A row a class and the macro mean beneath; of many classes a terminal shows both ends, by the last column."""
    if not columns:
        return []
    counts = view.latents.labels.sum(0).tolist()

    def row(i: int) -> list[Cell]:
        return [(view.latents.classes[i], ""), (str(counts[i]), ""), *(of_class(m, i) for m in columns.values())]

    last = [(MACRO, ""), ("", ""), *(of_macro(m) for m in columns.values())]
    head = ["class", "clips", *columns]
    everyone = list(range(len(counts)))
    if len(counts) <= MOST_CLASSES:
        return [Grid(title, head, [*map(row, everyone), last], words=1)]
    ranked = [
        int(i)
        for i in np.argsort(list(columns.values())[-1].values)
        if np.isfinite(list(columns.values())[-1].values[i])
    ]
    ends = sorted({*ranked[:ENDS], *ranked[-ENDS:]}, key=ranked.index)
    short = Grid(f"{title}; lowest and highest {ENDS} classes by the last column", head, [*map(row, ends), last])
    return [short, Grid(title, head, [*map(row, everyone), last], brief=False)]


def by_place(title: str, measures: Sequence[Measure], *, brief: bool = True) -> list[Grid]:
    """Macro means: a row a metric (and space, setting), a column a layer."""
    if not measures:
        return []
    places = list(dict.fromkeys(m.where for m in measures))
    keys = list(dict.fromkeys((m.metric, m.space, m.setting) for m in measures))
    found = {((m.metric, m.space, m.setting), m.where): m for m in measures}
    shown = [n for n in range(3) if n == 0 or len({key[n] for key in keys}) > 1]
    body = []
    for key in keys:
        values = [of_macro(found[key, place]) if (key, place) in found else (NONE, "") for place in places]
        body.append([*((key[n], "") for n in shown), *values])
    return [Grid(title, [*(("metric", "space", "setting")[n] for n in shown), *places], body, len(shown), brief)]


def survey_report(view: View, measures: Sequence[Measure], beside: Mapping[str, str] | None = None) -> GridReport:
    """The report of `robustav metrics density`, `convexity` or `all`, whichever was measured."""
    latents = [m for m in measures if not _of_segments(m)]
    segments = [m for m in measures if _of_segments(m)]
    kinds = [word for word, found in (("Density", latents), ("Convexity", segments)) if found]
    grids = [*density_grids(view, latents), *convexity_grids(view, segments)]
    return assemble(view, f"{' and '.join(kinds)} of latents", grids, measures, beside or {})


def _of_segments(measure: Measure) -> bool:
    return measure.metric.startswith("hardened") or measure.metric in (*CONVEXITY, "both ends rejected")


def convexity_grids(view: View, measures: Sequence[Measure]) -> list[Grid]:
    """By class wherever everything is mixed; everything by layer; other thresholds."""
    if not measures:
        return []
    operating = f"t={view.survey.threshold:g}" if view.latents.label_kind == "multilabel" else ARG_MAX
    settled = [m for m in measures if F1 not in m.setting and "sigma" not in m.setting]
    grids: list[Grid] = []
    for cut in view.cuts:
        part = "+".join(cut.mixable)
        here = {m.metric: m for m in settled if m.layer == cut.name and m.part == part}
        columns = {metric: here[metric] for metric in BY_CLASS if metric in here}
        mixed = f", {part} mixed" if len(cut.mixable) > 1 else ""
        grids += by_class(f"convexity at the {cut.name}{mixed}, {operating}", columns, view)
    grids += by_place(f"convexity by layer and by what is mixed, macro means, {operating}", settled)
    rest = [m for m in measures if F1 in m.setting or "sigma" in m.setting]
    return grids + by_place("other thresholds, and each noise", rest, brief=False)


def density_grids(view: View, measures: Sequence[Measure]) -> list[Grid]:
    """Relative density by class, everything by layer, modalities, drift."""
    headline = [m for m in measures if m.metric == "relative density" and m.space != "matched"]
    grids: list[Grid] = []
    if headline:
        space, setting = headline[0].space, headline[0].setting
        columns = {m.where: m for m in headline if (m.space, m.setting) == (space, setting)}
        grids += by_class(f"relative density ({space}, {setting})", columns, view)
        spaces = [
            m for m in measures if m.space not in ("matched", space) and m.metric in ("relative density", "hubness")
        ]
        first = [m for m in measures if (m.space, m.setting) == (space, setting)]
        grids += by_place(f"by layer, macro means ({space}, {setting})", first)
        grids += by_place("in other spaces", [m for m in spaces if m.setting == setting])
        shown = {id(m) for m in first}
        rest = [
            m
            for m in measures
            if id(m) not in shown and m.space != "matched" and m.metric not in ("density in", "coverage of")
        ]
        sweep = [m for m in headline if m.space == space]
        if len({m.setting for m in sweep}) > 1:
            grids += by_place(f"relative density at every k ({space})", sweep)
        grids += by_place("every space and k", rest, brief=False)
    matched = [m for m in measures if m.space == "matched" and len(m.names) > 1]
    first = [m for m in matched if m.setting == matched[0].setting]
    columns = {f"{m.metric}: {m.part}" if m.part else m.metric: m for m in first}
    grids += by_class(f"modalities against one another ({matched[0].setting})" if matched else "", columns, view)
    grids += by_place("modalities at every k", [m for m in matched if m not in first], brief=False)
    sets = [m for m in measures if m.metric in ("density in", "coverage of")]
    grids += by_place("how one set lies in another", sets)
    return grids


def assemble(
    view: View, title: str, grids: Sequence[Grid], measures: Sequence[Measure], beside: Mapping[str, str]
) -> GridReport:
    """A report with what is said of every survey."""
    rows = pd.concat([m.rows() for m in measures], ignore_index=True) if measures else pd.DataFrame()
    about = view.header()
    rows.insert(0, "model", about["model"].partition(",")[0])
    skipped = pd.DataFrame({"sample": list(view.latents.skipped), "reason": list(view.latents.skipped.values())})
    return GridReport(title, {**about, **beside}, grids, _notes(view, measures), rows, skipped)


def _notes(view: View, measures: Sequence[Measure]) -> list[str]:
    notes = [
        f"Intervals are 95 %, bootstrap over clips ({len(view.weights)} resamples) with the neighbours as they are: they say how "
        "far the mean over these clips can be trusted, not what another reference set would give. There is none on fewer "
        f"than {FEW_CLIPS} clips that count, nor where more than a tenth of the resamples have no value. A macro mean is over the classes that were not skipped."
    ]
    used = [m.metric for m in measures]
    notes += [f"{metric}: {words}" for metric, words in WORDS.items() if metric in used]
    left_out = {name: reason for m in reversed(measures) if len(m.names) > 1 for name, reason in m.skipped.items()}
    if left_out:
        shown = [f"{name} ({reason})" for name, reason in reversed(left_out.items())]
        more = f"; and {len(shown) - 5} more" if len(shown) > 5 else ""
        notes.append(f"Skipped somewhere: {'; '.join(shown[:5])}{more}.")
    own = int((~view.latents.labelled).sum())
    if own:
        notes.append(
            f"WARNING: {own} of {len(view.latents)} clips have no usable label: the model's own prediction stands in, which makes "
            "its classes look denser and more convex than they are."
        )
    if view.samples.name.startswith("av-events"):
        notes.append(
            "av-events is synthetic: its values are for comparing models and layers, not for any real recording."
        )
    return notes
