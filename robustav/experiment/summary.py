"""From an experiment's results to its report, in words, tables and figures."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pandas as pd

from robustav.experiment.details import every_attack, every_epsilon, latents, second_opinions
from robustav.experiment.figures import draw
from robustav.experiment.fused import against_single, vulnerability
from robustav.experiment.protection import comparisons, gaps, protection
from robustav.experiment.recipe import Asked, Experiment, Unit, fitted, read_recipe
from robustav.experiment.results import Results, read_results
from robustav.experiment.run import RECIPE
from robustav.experiment.sampled import RESAMPLES
from robustav.experiment.tables import Tables
from robustav.ledger import write_atomically
from robustav.metrics.intervals import FEW_CLIPS
from robustav.report.grids import GridReport, csv, markdown
from robustav.training.recipe import Recipe as Training

TABLES = (
    protection,
    gaps,
    comparisons,
    against_single,
    vulnerability,
    latents,
    second_opinions,
    every_epsilon,
    every_attack,
)
MOST_LISTED = 8  # stages named one by one
ALWAYS = ("data", "eps", "epochs", "batch_size", "learning_rate")  # settings that are told though they be the usual


def report_of(folder: Path | str) -> tuple[GridReport, Results]:
    """The report of whatever is finished under a folder that `run` wrote.

    Raises `FileNotFoundError` if that is nothing yet, `ValueError` where results do not fit the recipe kept there.
    """
    folder = Path(folder)
    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(f"{folder} is no experiment: it has no {RECIPE} (give the folder that a run wrote)")
    results = read_results(read_recipe(folder / RECIPE), folder)
    return summarise(folder.resolve().name, results), results


def summarise(name: str, results: Results) -> GridReport:
    """Tables of what is finished, and what is missing."""
    first = results.experiment.evaluations[0].name
    if first not in results.scores:
        raise FileNotFoundError(f"nothing to report yet: no training has been judged by {first!r}{_why(results)}")
    tables = Tables(results, results.scores[first])
    grids = [grid for table in TABLES for grid in table(tables)]
    return GridReport(f"Experiment {name}", _header(tables), grids, _notes(tables), pd.DataFrame(tables.rows))


def save(report: GridReport, results: Results, folder: Path) -> list[Path]:
    """Write `report.md`, `report.csv` and the figures; returns the files."""
    files = [folder / "report.md", folder / "report.csv"]
    for file, text in zip(files, (markdown(report), csv(report)), strict=True):
        write_atomically(file, text.encode())
    return [*files, *draw(results, folder)]


def _header(tables: Tables) -> dict[str, str]:
    results, experiment = tables.results, tables.results.experiment
    usual = {f.name: f.default for f in fields(Training) if f.name in ALWAYS}
    told = [f"{name} {value}" for name, value in {**usual, **experiment.training}.items()]
    judged = {
        f"judged by {name}": f"{', '.join(_levels(experiment, name))}: {found.about['attacks']}; "
        f"{found.about['goal']}; {found.about['data']}{_without(experiment, name)}"
        for name, found in results.scores.items()
    }
    return {
        "models": ", ".join(f"{name} ({'+'.join(sorted(specs))})" for name, specs in experiment.models.items()),
        "methods": ", ".join(dict.fromkeys(f"{u.method}: {_own(experiment, u)}" for u in experiment.units)),
        "training": ", ".join(told),
        "seeds": ", ".join(map(str, experiment.seeds)),
        **judged,
        "run": f"{tables.scores.about['run']}; {tables.scores.about['device']}",
        "finished": f"{results.trained} of {len(experiment.units)} trainings"
        + (f"; {len(results.missing)} stages are missing" if results.missing else ", with all evaluations and metrics"),
    }


def _own(experiment: Experiment, unit: Unit) -> str:
    """A method, and what its training does otherwise than the others."""
    usual = {**{f.name: f.default for f in fields(Training)}, **experiment.training}
    if isinstance(usual["eps"], Mapping):
        usual["eps"] = fitted(usual["eps"], unit.modalities)
    own = ("model", "method", "seed")
    different = [f"{k} {v}" for k, v in vars(unit.training).items() if k not in own and v != usual[k]]
    return " with ".join([unit.training.method, *([", ".join(different)] if different else [])])


def _levels(experiment: Experiment, name: str) -> list[str]:
    """The epsilons of one evaluation."""
    asked = _asked(experiment, name)
    return list(dict.fromkeys(f"epsilon {e}" for specs in experiment.models.values() for e in asked.levels(specs)))


def _without(experiment: Experiment, name: str) -> str:
    """The models that one evaluation leaves out, since they have nothing of what it attacks."""
    asked = _asked(experiment, name)
    out = [label for label, specs in experiment.models.items() if asked.of(label, sorted(specs)) is None]
    return f"; not {', '.join(out)}, having nothing of what it attacks" if out else ""


def _asked(experiment: Experiment, name: str) -> Asked:
    (asked,) = (one for one in experiment.evaluations if one.name == name)
    return asked


def _notes(tables: Tables) -> list[str]:
    results, experiment = tables.results, tables.results.experiment
    notes = [f"WARNING: {words} failed: {sentence}" for words, sentence in results.failed.items()]
    notes += [f"WARNING: {words}: {reason}" for words, reason in results.withheld.items()]
    notes += [
        f"WARNING: {words} is not valid: the audit found something, see that run's report" for words in results.unsound
    ]
    if results.missing:
        listed = ", ".join(results.missing[:MOST_LISTED])
        more = f" and {len(results.missing) - MOST_LISTED} more" if len(results.missing) > MOST_LISTED else ""
        notes.append(
            f"WARNING: not finished, and not in these tables: {listed}{more}. The same command goes on with them."
        )
    notes += [
        f"{tables.scores.headline} ± its standard deviation over the training seeds; in brackets 95 % intervals of the mean, "
        f"bootstrap over clips and seeds ({RESAMPLES} resamples, the same for all, so that differences are paired). The "
        "seeds' own part of an interval is too narrow by a fifth with three seeds, by a third with two, and missing with one.",
        f"A model that tells no clip from another has about a {tables.scores.headline} of {tables.scores.chance:.3f} on these clips: "
        "scores about there or below are of no use, whatever share of a gap they close.",
        "Worst case: for each clip the attack, among those at this epsilon that touch no more than it, clean included, that "
        "costs the hit, and of those the one with the largest loss; then the score over all clips. Robust scores are upper "
        "bounds: a stronger attack may lower them.",
        f"Passes are forward and backward passes of one clip; times {experiment.baseline}: as many times those of "
        f"{experiment.baseline} on the same model. Seconds (of CPU time, or of the wall on a GPU) depend on what else the "
        "machine did, even those of equal work: look at passes first.",
    ]
    if experiment.reference is not None:
        notes.append(
            f"Gap closed: (method - {experiment.baseline}) / ({experiment.reference} - {experiment.baseline}) of the means; "
            f"none where {experiment.reference} is not shown to be better than {experiment.baseline} (95 %)."
        )
    notes.append(
        "Tests: hits of all seeds are added up clip by clip, and every sign of their differences is flipped in every way "
        "(exact; for one seed McNemar's). They speak of these trainings on other clips; the intervals of other trainings too."
    )
    if any(len(specs) == 2 for specs in experiment.models.values()):
        notes.append(
            "Vulnerability: a modality's share of the two single-modality drops, at budgets at which the models of one "
            "modality, trained alike, lose as much as one another (interpolated, and anew on every resample). Synergy: the drop under the joint attack, "
            "both at full budget, minus the larger of the two single drops."
        )
    if len(results.latents):
        notes.append(
            f"Density and convexity before and after: {experiment.baseline} is before, since every method departs from it."
        )
    if any(results.flags.values()):
        notes.append("Flags: reasons to doubt a score, from any seed; `robustav report` of the run says what was seen.")
    if tables.scores.clips < FEW_CLIPS:
        notes.append(f"Fewer than {FEW_CLIPS} clips: no intervals, and mAP means little.")
    notes.append("An interval without width means that every resample scored alike, not that the score is certain.")
    if any(str(unit.training.data).startswith(("av-events", "None")) for unit in experiment.units):
        notes.append(
            "av-events is synthetic: its scores are for comparing methods and models, not for any real recording."
        )
    return notes


def _why(results: Results) -> str:
    if not results.failed:
        return "; run the recipe first"
    words, sentence = next(iter(results.failed.items()))
    return f"; {words} failed: {sentence}"
