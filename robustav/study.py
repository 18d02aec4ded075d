"""From what is asked to a report: one survey, or runs held against the metrics of their models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from robustav.classifier import Classifier
from robustav.data.samples import Progress
from robustav.data.sources import load_samples
from robustav.geometry.convexity import Segments, convexity_measures
from robustav.geometry.cuts import Cut
from robustav.geometry.density import density_measures
from robustav.geometry.drift import adversarial_measures, against_measures
from robustav.geometry.joining import join
from robustav.geometry.kept import KeptSamples
from robustav.geometry.latents import Latents
from robustav.geometry.measure import Measure
from robustav.geometry.modalities import modality_measures, overlap_measures
from robustav.geometry.survey import Survey, View, silent
from robustav.geometry.targets import TARGETS
from robustav.geometry.validation import Validation, validate
from robustav.ledger import Ledger, write_atomically
from robustav.metrics.spaces import SPACES
from robustav.record import check_model
from robustav.report.grids import FORMATS, GridReport
from robustav.report.latent_figures import by_layer, hardened_curves, latent_views, save_figures, scatters
from robustav.report.latents import survey_report
from robustav.report.validation import validation_report


@dataclass(frozen=True)
class Wanted:
    """Which metrics, and how: neighbours, spaces, segments, and what the surveyed clips are held against."""

    ks: Sequence[int] = (10,)
    spaces: Sequence[str] = tuple(SPACES)
    segments: Segments = field(default_factory=Segments)
    density: bool = True
    convexity: bool = True
    adversarial: Path | None = None  # a run with kept examples
    against: str | None = None  # data

    def __post_init__(self) -> None:
        if unknown := [name for name in self.spaces if name not in SPACES]:
            raise ValueError(f"no space {unknown[0]!r}: there are {', '.join(SPACES)}")
        if not self.spaces:
            raise ValueError(f"`spaces` must name at least one of {', '.join(SPACES)}")
        object.__setattr__(self, "ks", tuple(dict.fromkeys(self.ks)))
        if not self.ks or min(self.ks) < 2:
            raise ValueError(f"`ks` must be numbers of neighbours from 2 on, got {list(self.ks)}")


@dataclass(frozen=True)
class Study:
    """A report, and what its figures are drawn from."""

    report: GridReport
    latents: Latents | None = None
    adversarial: Latents | None = None
    cuts: Sequence[Cut] = ()
    validation: Validation | None = None

    def save(self, folder: Path) -> list[Path]:
        """The report in every format, and figures, into `folder`; returns the files."""
        files = []
        for ending, render in FORMATS.items():
            files.append(folder / f"report.{ending}")
            write_atomically(files[-1], render(self.report).encode())
        return [*files, *self.draw(folder)]

    def draw(self, folder: Path) -> list[Path]:
        """Every figure that there is data for."""
        figures: dict[str, Figure | None] = {}
        if self.validation is not None:
            figures |= scatters(self.validation.classes, self.validation.table)
        else:
            figures |= {"by-layer": by_layer(self.report.rows), "hardened": hardened_curves(self.report.rows)}
        if self.latents is not None:
            figures |= latent_views(self.latents, self.adversarial, self.cuts)
        return save_figures({name: figure for name, figure in figures.items() if figure is not None}, folder)


def study(survey: Survey, wanted: Wanted, progress: Progress = silent) -> Study:
    """Survey a model's latents and report every metric that is wanted."""
    with survey.opened(progress) as view:
        adversarial = others = held = None
        if wanted.density and wanted.adversarial is not None:
            ledger = Ledger(wanted.adversarial)
            check_model(ledger, view.model)
            held = KeptSamples(ledger, view.samples)
            adversarial = view.collect_others(held, progress)
        if wanted.density and wanted.against is not None:
            others = view.collect_others(load_samples(wanted.against, view.model, progress)[0], progress)
        measures = _measures(view, wanted, progress)
        if adversarial is not None:
            measures += adversarial_measures(
                view.latents, adversarial, view.cuts, view.weights, wanted.spaces, survey.seed
            )
        if others is not None:
            measures += against_measures(view.latents, others, view.cuts, view.weights, wanted.spaces, survey.seed)
        beside = {} if held is None else {"adversarial": f"{held.name}, {len(held.ids)} clips"}
        if others is not None:
            beside["against"] = f"{wanted.against}, {len(others)} clips"
        return Study(survey_report(view, measures, beside), view.latents, adversarial, view.cuts)


def validate_runs(
    runs: Sequence[Path],
    survey: Survey,
    wanted: Wanted,
    *,
    targets: Sequence[str] = (),
    attacked: str | None = None,
    clips: str = "auto",
    model: str | Classifier | None = None,
    data: str | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Study]:
    """Hold the metrics of each run's model against the robustness that the run measured, for each of the targets.

    `targets` are keys of `TARGETS`; none is average precision for multi-label models and top-1 hits for the others.
    `clips` says on which clips the metrics are measured, see `join`. `model`, `data` and `checkpoint` stand in for what
    the runs do not know.
    """
    ledgers = [Ledger(run) for run in runs]
    identities = [ledger.record()["identity"] for ledger in ledgers]
    weights = [(identity["model"], identity["weights"]) for identity in identities]
    if len(set(weights)) < len(weights):
        again = max(i for i, one in enumerate(weights) if one in weights[:i])
        raise ValueError(f"{ledgers[again].folder} is of a model that another run is of already: one run a model")
    kinds = {ledger.record()["identity"]["label_kind"] for ledger in ledgers}
    targets = targets or ["ap" if kinds == {"multilabel"} else "hit"]
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"no target {unknown[0]!r}: there are {', '.join(TARGETS)}")
    joined = [
        join(
            ledger,
            lambda view, progress: _measures(view, wanted, progress),
            survey,
            targets=targets,
            attacked=attacked,
            clips=clips,
            model=model,
            data=data,
            checkpoint=checkpoint,
            progress=progress,
        )
        for ledger in ledgers
    ]
    studies = {}
    for target in targets:
        here = [run[target] for run in joined]
        found = validate(here, target=target, seed=survey.seed)
        studies[target] = Study(validation_report(here, found), validation=found)
    return studies


def _measures(view: View, wanted: Wanted, progress: Progress) -> list[Measure]:
    measures: list[Measure] = []
    most = int(view.latents.labels.sum(0).max())
    if wanted.density:
        if most < 5 * min(wanted.ks):
            raise ValueError(
                f"no class has enough clips: the largest has {most}, and k={min(wanted.ks)} needs {5 * min(wanted.ks)}; give more "
                f"clips{f', or --k {most // 5}' if most >= 10 else ''}"
            )
        seed = view.survey.seed
        measures += density_measures(
            view.latents, view.cuts, view.weights, spaces=wanted.spaces, ks=wanted.ks, seed=seed, progress=progress
        )
        for k in wanted.ks:
            measures += modality_measures(view.latents, view.cuts, view.weights, k, seed)
        measures += overlap_measures(view.latents, view.cuts, view.weights)
    if wanted.convexity:
        if most < 2:
            raise ValueError(
                f"no class has two of the {len(view.latents)} clips, so there is nothing to mix: give more clips"
            )
        measures += convexity_measures(view, wanted.segments, progress)
    return measures
