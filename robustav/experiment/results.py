"""What a recipe's finished stages say: scores by model, method, attacked modalities and epsilon; cost; latent metrics."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from robustav.experiment.recipe import Asked, Experiment, Unit
from robustav.experiment.run import METRICS, TRAINING, Stage, stages_of, troubles
from robustav.experiment.sampled import RESAMPLES, Sampled
from robustav.flags import inspect
from robustav.geometry.measure import MACRO
from robustav.ledger import Ledger
from robustav.metrics.intervals import bootstrap, bootstrap_weights
from robustav.metrics.tagging import mean_average_precision, random_average_precision, top1_hit
from robustav.plan import CLEAN
from robustav.report.table import light, settle_all, usable, worst_case
from robustav.report.words import WORST, header_of

LATENT = ("metric", "layer", "part", "space", "setting")


class Where(NamedTuple):
    """What an adversary touches, and how far: `("", "")` is the clean row."""

    attacked: str  # as in "audio+visual"
    epsilon: str  # as the recipe writes it


UNTOUCHED = Where("", "")
Key = tuple[str, str, str, Where]  # model, method, row, where


class Row(NamedTuple):
    """One condition of one evaluation of one training, clip by clip."""

    name: str  # of the attack, or the worst case
    where: Where
    logits: Float[np.ndarray, "clip class"]
    spared: bool  # clips were left alone, so only hits are a score
    valid: bool  # the audit found nothing


class Judged(NamedTuple):
    """One evaluation of one training."""

    unit: Unit
    clips: tuple[str, ...]
    labels: Int[np.ndarray, "clip class"]
    headline: str  # mAP or top1
    rows: Sequence[Row]
    flags: tuple[str, ...]
    about: Mapping[str, str]  # how it was judged, for the report's header


def read_judged(ledger: Ledger, unit: Unit, asked: Asked) -> Judged:
    """Every condition and every worst case of a finished run, taken as the report of one run takes them."""
    record = ledger.record()
    described: dict[str, dict[str, Any]] = record["identity"]["conditions"]
    epsilons = list(asked.levels(unit.modalities))
    clean = usable(ledger, CLEAN.key, record["clips"])
    if clean.empty:
        raise ValueError(f"{ledger.folder}: no clip could be used")
    labels = np.zeros((len(clean), len(record["identity"]["classes"])), dtype=np.int8)
    for row, classes in enumerate(clean["labels"]):
        labels[row, np.asarray(classes, dtype=int)] = 1
    sound = not (clean["violation"] != "").any()

    def made(name: str, where: Where, frame: pd.DataFrame, spared: bool = False) -> Row:
        logits = np.stack(frame["logits"].to_list()).astype(np.float64)
        return Row(name, where, logits, spared, sound and not (frame["violation"] != "").any())

    rows = [made(CLEAN.name, UNTOUCHED, clean)]
    looked = {CLEAN.key: light(clean)}
    for level in sorted({d["level"] for d in described.values() if d["attacked"]}):
        here = {key: d for key, d in described.items() if d["attacked"] and d["level"] == level}
        frames = {CLEAN.key: clean} | {key: usable(ledger, key, record["clips"]) for key in here}
        looked |= {key: light(frame) for key, frame in frames.items()}
        settle_all(frames, here, looked, lambda key: usable(ledger, key, record["clips"]))
        bounded = {key: d for key, d in here.items() if not d["smallest"]}
        for key, d in bounded.items():
            where = Where("+".join(d["attacked"]), epsilons[level])
            rows.append(made(d["name"], where, frames[key], bool(d["after"])))
        for attacked in dict.fromkeys(tuple(d["attacked"]) for d in bounded.values()):
            members = [key for key, d in bounded.items() if set(d["attacked"]) <= set(attacked)]
            attacks = [bounded[key] for key in members if bounded[key]["knowledge"] != "nothing"]
            ascents = [bool(d["after"]) for d in attacks if not d["search"]]
            spared = bool(attacks) and (any(ascents) or not ascents)
            worst = worst_case([clean, *(frames[key] for key in members)])
            rows.append(made(WORST, Where("+".join(attacked), epsilons[level]), worst, spared))
    flags = [flag[0] for flag in ledger.flags()] + [flag.name for flag in inspect(looked, described, clean)]
    ranked = record["identity"]["label_kind"] == "multilabel" and not any(
        row.spared for row in rows if row.name == WORST
    )
    headline = "mAP" if ranked else "top1"
    header = header_of(record, len(clean), failed=False)
    about = {key: header[key] for key in ("data", "attacks", "goal", "device", "run")}
    return Judged(unit, tuple(clean["sample"]), labels, headline, rows, tuple(dict.fromkeys(flags)), about)


@dataclass(frozen=True)
class Scores:
    """Scores of one evaluation over all trainings: `mAP` and `top1`, by model, method, row and place.

    `hits` has what `top1` is the mean of, of the clips in `ids`: those that have a label.
    """

    name: str
    headline: str
    clips: int
    found: Mapping[tuple[str, Key], Sampled]  # score and key
    hits: Mapping[Key, Mapping[int, Bool[np.ndarray, " clip"]]]  # by seed
    ids: tuple[str, ...]
    about: Mapping[str, str]
    chance: float  # the headline score of a model that tells no clip from another

    def get(self, model: str, method: str, where: Where, row: str = WORST, score: str = "") -> Sampled | None:
        """The headline score unless told, under the worst case; None where it is not there or not valid."""
        name = CLEAN.name if where == UNTOUCHED else row
        return self.found.get((score or self.headline, (model, method, name, where)))

    def right(self, model: str, method: str, where: Where) -> Mapping[int, Bool[np.ndarray, " clip"]]:
        """Seed -> which clips are right in the worst case."""
        return self.hits.get((model, method, CLEAN.name if where == UNTOUCHED else WORST, where), {})

    def places(self, model: str) -> list[Where]:
        """Clean, then every set of modalities and epsilon at which this model was judged."""
        return list(dict.fromkeys(where for one, _, _, where in self.hits if one == model))


def scores_of(name: str, judged: Sequence[Judged]) -> Scores:
    """All trainings on the same resamples of the same clips; raises `ValueError` if they were judged on different ones."""
    first = judged[0]
    if other := next((one for one in judged if one.clips != first.clips or (one.labels != first.labels).any()), None):
        raise ValueError(f"{other.unit.name} and {first.unit.name} were judged on different clips by {name!r}")
    weights = bootstrap_weights(len(first.clips), RESAMPLES, seed=0)
    seeds: dict[tuple[str, Key], dict[int, tuple[float, np.ndarray]]] = defaultdict(dict)
    hits: dict[Key, dict[int, np.ndarray]] = defaultdict(dict)
    labelled = np.asarray(first.labels.any(1))
    weighted = weights[:, labelled] / np.maximum(weights[:, labelled].sum(1, keepdims=True), 1)
    for one in judged:
        for row in one.rows:
            if not row.valid:
                continue
            key = (one.unit.model, one.unit.method, row.name, row.where)
            right = top1_hit(row.logits, one.labels)[labelled]
            hits[key][one.unit.seed] = right
            sampled = {"top1": (right.mean(), weighted @ right)}
            if not row.spared and row.name in (CLEAN.name, WORST):
                precision = mean_average_precision(row.logits, one.labels)
                sampled["mAP"] = precision, bootstrap(row.logits, one.labels, weights).map
            for score, values in sampled.items():
                seeds[score, key][one.unit.seed] = values
    found: dict[tuple[str, Key], Sampled] = {}
    for (score, key), by_seed in seeds.items():
        points, resampled = (np.array(values) for values in zip(*by_seed.values(), strict=True))
        found[score, key] = Sampled(tuple(by_seed), points, resampled, rate=score == "top1")
    ids = tuple(clip for clip, counts in zip(first.clips, labelled, strict=True) if counts)
    if first.headline == "mAP":
        counts = [int(count) for count in first.labels.sum(0) if count]
        chance = float(np.mean([random_average_precision(count, len(first.clips)) for count in counts]))
    else:
        chance = float(first.labels[labelled].mean(0).max(initial=0.0))
    return Scores(name, first.headline, len(first.clips), found, hits, ids, first.about, chance)


class Cost(NamedTuple):
    """What a training took, mean over the seeds."""

    passes_a_clip: float  # forward and backward together
    passes: float  # in all
    seconds: float  # of CPU; of the wall for what a GPU did
    device: str  # cpu, cuda, or both joined by +: their seconds cannot be compared


@dataclass(frozen=True)
class Results:
    """Everything that is finished, and what is missing."""

    experiment: Experiment
    scores: Mapping[str, Scores]  # by evaluation
    costs: Mapping[tuple[str, str], Cost]  # by model and method
    latents: pd.DataFrame  # a row a training and latent metric: macro means
    flags: Mapping[tuple[str, str], tuple[str, ...]]  # raised in the first evaluation
    trained: int
    missing: Sequence[str] = ()  # stages that are not done
    failed: Mapping[str, str] = field(default_factory=dict)
    unsound: Sequence[str] = ()  # conditions in which the audit found something
    withheld: Mapping[str, str] = field(default_factory=dict)  # evaluation -> why its robust scores are not told

    def trainings(self) -> Iterator[tuple[str, str]]:
        """Models and methods of which something is there, in the recipe's order."""
        for model in self.experiment.models:
            yield from ((model, method) for method in self.experiment.methods if (model, method) in self.costs)

    def widest(self, model: str) -> str:
        """All modalities of a model."""
        return "+".join(sorted(self.experiment.models[model]))


def read_results(experiment: Experiment, out: Path) -> Results:
    """Look at every stage that the recipe names."""
    judged: dict[str, list[Judged]] = {asked.name: [] for asked in experiment.evaluations}
    cards: dict[tuple[str, str], list[Cost]] = defaultdict(list)
    latents: list[pd.DataFrame] = []
    flags: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    missing: list[str] = []
    unsound: list[str] = []
    failed, withheld = dict[str, str](), dict[str, str]()
    trained = 0
    for unit in experiment.units:
        stages = {stage.name: stage for stage in stages_of(experiment, unit, out)}
        done = {name for name, stage in stages.items() if stage.finished()}
        missing += [stage.words for name, stage in stages.items() if name not in done]
        failed |= troubles([stage for name, stage in stages.items() if name not in done])
        if TRAINING in done:
            trained += 1
            cards[unit.model, unit.method].append(_cost(stages[TRAINING]))
        if METRICS in done:
            latents.append(_latent(stages[METRICS]))
        for asked in experiment.evaluations:
            if asked.name in done:
                stage = stages[asked.name]
                one = read_judged(Ledger(stage.folder / asked.name), unit, asked)
                if reason := stage.kept()["withheld"]:
                    withheld[stage.words] = reason
                    one = one._replace(rows=[row for row in one.rows if row.where == UNTOUCHED])
                unsound += [f"{stage.words}: {' '.join((row.name, *row.where))}" for row in one.rows if not row.valid]
                judged[asked.name].append(one)
                if asked is experiment.evaluations[0]:
                    flags[unit.model, unit.method] |= dict.fromkeys(one.flags)
    return Results(
        experiment,
        {name: scores_of(name, several) for name, several in judged.items() if several},
        {key: _mean_cost(several) for key, several in cards.items()},
        pd.concat(latents, ignore_index=True) if latents else pd.DataFrame(),
        {key: tuple(names) for key, names in flags.items()},
        trained,
        missing,
        failed,
        unsound,
        withheld,
    )


def _cost(stage: Stage) -> Cost:
    card = json.loads((stage.folder / TRAINING / "card.json").read_bytes())
    spent = card["cost"]
    passes = spent["forwards"] + spent["backwards"]
    seconds = spent["cpu_seconds" if card["device"] == "cpu" else "seconds"]  # whatever else the machine was doing
    return Cost(passes / max(1, spent["clips"]), passes, seconds, card["device"])


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    """Over the seeds."""
    passes_a_clip, passes, seconds = np.mean([cost[:3] for cost in costs], axis=0).tolist()
    return Cost(passes_a_clip, passes, seconds, "+".join(sorted({cost.device for cost in costs})))


def _latent(stage: Stage) -> pd.DataFrame:
    rows = pd.read_csv(stage.folder / f"{METRICS}.csv", keep_default_na=False, na_values=[""])
    rows = rows[rows["class"] == MACRO].fillna(dict.fromkeys(LATENT, ""))
    unit = stage.unit
    return rows[[*LATENT, "value"]].assign(model=unit.model, method=unit.method, seed=unit.seed)
