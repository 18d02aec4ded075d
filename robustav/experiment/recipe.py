"""A recipe: which models are trained by which methods, and how each is then judged. Read from TOML."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from robustav.classifier import Classifier, InputSpec
from robustav.evaluation import Evaluation
from robustav.geometry.convexity import Segments
from robustav.geometry.survey import Survey
from robustav.models.zoo import inputs_of
from robustav.study import Wanted
from robustav.threat import parse_epsilons
from robustav.training.methods import parse_method
from robustav.training.recipe import Recipe as Training
from robustav.training.settings import check_types

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*")  # a name that is also a folder
TRAINING = tuple(f.name for f in fields(Training) if f.name not in ("model", "method", "seed"))
JUDGED = tuple(f.name for f in fields(Evaluation) if f.name not in ("model", "checkpoint", "trust_pickle"))
STAGES = ("training", "metrics")  # besides the evaluations, which have names of their own
TOP = ("data", "seeds", "baseline", "reference", "epsilon", "training", "models", "methods", "evaluations", "metrics")


@dataclass(frozen=True)
class Asked:
    """One evaluation that every training gets: the words of `Evaluation`, as written in the recipe.

    `eps` holds texts as on the command line, or tables such as `{audio = 0.01, visual = "4/255"}`; a model gets what it
    has modalities for, and of `attacked` the sets that it has. `seeds` None is all.
    """

    name: str
    eps: tuple[Any, ...]
    attacked: tuple[str, ...]
    settings: Mapping[str, Any]
    seeds: tuple[int, ...] | None = None

    def levels(self, modalities: Iterable[str]) -> dict[str, str]:
        """Epsilon as the recipe writes it -> as this model's command line would."""
        texts: dict[str, str] = {}
        for given in self.eps:
            if isinstance(given, Mapping):
                if text := fitted(given, modalities):
                    texts[fitted(given, given)] = text
            else:
                parts = str(given).split(",")
                texts |= {str(given): str(given)} if "=" in str(given) else {p.strip(): p.strip() for p in parts}
        return texts

    def sets(self, modalities: Sequence[str]) -> tuple[str, ...] | None:
        """The sets of `attacked` that a model with these modalities has; None where it has none of them."""
        fits = tuple(s for s in self.attacked if s == "both" or {p.strip() for p in s.split("+")} <= set(modalities))
        return fits if fits or not self.attacked else None

    def of(self, model: str, modalities: Sequence[str]) -> Evaluation | None:
        """The evaluation of one model, or None where nothing of it concerns the model."""
        eps, sets = tuple(self.levels(modalities).values()), self.sets(modalities)
        if not eps or sets is None:
            return None
        return Evaluation(model, eps=eps, attacked=sets, **self.settings)


@dataclass(frozen=True)
class Metrics:
    """Which latent metrics are taken of every trained model, in the words of `robustav metrics`."""

    data: str | None = None
    layers: tuple[str, ...] = ("latent",)
    limit: int = 0
    k: int = 10
    spaces: tuple[str, ...] = ("raw",)
    pairs: int = 200  # a class
    density: bool = True
    convexity: bool = True
    resamples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.density or self.convexity):
            raise ValueError("`metrics` must ask for density or convexity: leave the table out for neither")

    def survey(self, model: str, device: str) -> Survey:
        """What is looked at."""
        return Survey(
            model=model,
            data=self.data,
            layers=self.layers,
            limit=self.limit,
            device=device,
            resamples=self.resamples,
            seed=self.seed,
        )

    def wanted(self) -> Wanted:
        """What is measured there."""
        segments = Segments(self.pairs, k=self.k, seed=self.seed)
        return Wanted((self.k,), self.spaces, segments, density=self.density, convexity=self.convexity)


@dataclass(frozen=True)
class Unit:
    """One training, and what follows from it."""

    model: str
    method: str
    seed: int
    training: Training = field(repr=False)
    modalities: tuple[str, ...]
    turn: int  # what shards are dealt by

    @property
    def name(self) -> str:
        """The folder below the experiment's."""
        return f"{self.model}/{self.method}/{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A recipe, checked: every training and evaluation that it names can be made.

    Costs, gaps and tests are told against `baseline` (plain training) and `reference` (the protection to reach), at
    `epsilon`, one of those of the first evaluation.
    """

    models: Mapping[str, Mapping[str, InputSpec]]  # label -> what it reads
    methods: Sequence[str]
    seeds: Sequence[int]
    baseline: str
    reference: str | None
    epsilon: str
    training: Mapping[str, Any]  # what all trainings share, as far as the recipe says it
    units: Sequence[Unit]  # in the order in which they are run
    evaluations: Sequence[Asked]
    metrics: Metrics | None


def read_recipe(path: Path | str) -> Experiment:
    """The experiment that a TOML file describes; raises `ValueError` naming the file and what is wrong in it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {str(path)!r}: give a TOML file such as experiments/fusion-study.toml")
    try:
        return parse_recipe(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # TOML that is none among them
        raise ValueError(f"{path}: {error}") from error


def parse_recipe(given: Mapping[str, Any]) -> Experiment:
    """The experiment that a recipe's tables describe; unknown keys are refused naming the known."""
    known("a recipe", given, TOP)
    models = _table(given, "models", str)
    methods = _table(given, "methods", (str, Mapping))
    settings = _table(given, "training", object, needed=False)
    known("`training`", settings, TRAINING)
    seeds = _seeds("`seeds`", given.get("seeds", [0, 1, 2]))
    built = {label: inputs_of(model) for label, model in models.items()}
    reads = {label: dict(model.specs) for label, model in built.items()}
    _check_modalities("training.eps", settings.get("eps"), reads)
    units: list[Unit] = []
    for s, seed in enumerate(seeds):
        for i, (label, model) in enumerate(models.items()):
            for j, (method, entry) in enumerate(methods.items()):
                own = _method(method, entry, models, seeds)
                _check_modalities(f"methods.{method}.eps", own.get("eps"), reads)
                if label in own.pop("models") and seed in own.pop("seeds"):
                    training = _training(model, seed, {**settings, **own}, built[label])
                    units.append(Unit(label, method, seed, training, tuple(sorted(reads[label])), s + i + j))
    evaluations = _evaluations(given, seeds)
    for asked in evaluations:
        for eps in asked.eps:
            _check_modalities(f"evaluations.{asked.name}.eps", eps, reads)
        parts = {part.strip() for chosen in asked.attacked if chosen != "both" for part in chosen.split("+")}
        _check_modalities(f"evaluations.{asked.name}.attacked", dict.fromkeys(sorted(parts)), reads)
        for label, specs in reads.items():
            if (made := asked.of(models[label], sorted(specs))) is not None:
                parse_epsilons(list(made.eps), specs, made.norm)
    baseline, reference = str(given.get("baseline", "erm")), given.get("reference")
    for key, named in (("baseline", baseline), ("reference", reference)):
        if named is not None and named not in methods:
            raise ValueError(f"`{key}` must be one of the methods {', '.join(methods)}, got {named!r}")
    labels = list(dict.fromkeys(e for specs in reads.values() for e in evaluations[0].levels(specs)))
    if not labels:
        raise ValueError(
            f"`eps` of the evaluation {evaluations[0].name!r} must cover what a model reads, got none that does"
        )
    epsilon = str(given.get("epsilon", labels[-1]))
    if epsilon not in labels:
        raise ValueError(f"`epsilon` must be one of the first evaluation's, {', '.join(labels)}, got {epsilon!r}")
    metrics = _metrics(given, next(iter(models.values())))
    return Experiment(reads, tuple(methods), seeds, baseline, reference, epsilon, settings, units, evaluations, metrics)


def known(where: str, given: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `ValueError` for a key that there is not."""
    if unknown := [key for key in given if key not in names]:
        raise ValueError(f"{where} has no key {unknown[0]!r}: there are {', '.join(names)}")


def _check_modalities(where: str, named: Any, reads: Mapping[str, Mapping[str, InputSpec]]) -> None:
    """Raise `ValueError` where a table names a modality that no model of the recipe has; a text is for others to read."""
    have = sorted({m for specs in reads.values() for m in specs})
    if isinstance(named, Mapping) and (unknown := [m for m in named if m not in have]):
        raise ValueError(f"`{where}` names {unknown[0]!r}: the models of this recipe have {', '.join(have)}")


def fitted(budgets: Mapping[str, Any], modalities: Iterable[str]) -> str:
    """A table of budgets as text, `audio=0.01,visual=4/255`, of the modalities that a model has."""
    here = set(modalities)
    return ",".join(f"{m}={budget}" for m, budget in budgets.items() if m in here)


def _table(given: Mapping[str, Any], key: str, kind: Any, *, needed: bool = True) -> Mapping[str, Any]:
    found = given.get(key, {})
    if not isinstance(found, Mapping) or (needed and not found):
        raise ValueError(
            f"{f'a recipe needs a table [{key}]' if needed else f'`{key}` must be a table'}, got {found!r}"
        )
    for label, value in found.items():
        if needed and not LABEL.fullmatch(label):
            raise ValueError(f"`{key}`: a name must be letters, digits and ._+- (it is a folder too), got {label!r}")
        if not isinstance(value, kind):
            raise ValueError(f"`{key}.{label}` must be text{' or a table' * (kind is not str)}, got {value!r}")
    return found


def _method(
    label: str, entry: str | Mapping[str, Any], models: Mapping[str, str], seeds: Sequence[int]
) -> dict[str, Any]:
    """A method's text with what it does otherwise than `training`, and the models and seeds it is run with."""
    table: dict[str, Any] = {"method": entry} if isinstance(entry, str) else dict(entry)
    known(f"`methods.{label}`", table, ("method", "models", "seeds", *TRAINING))
    if not isinstance(table.get("method"), str):
        raise ValueError(f'`methods.{label}` needs its `method`, as in method = "pgd-at(steps=7)"')
    table["models"] = table.get("models", list(models))
    for name, chosen, there in (("models", table["models"], models), ("seeds", table.get("seeds", []), seeds)):
        if not isinstance(chosen, list):
            raise ValueError(f"`methods.{label}.{name}` must be a list, got {chosen!r}")
        if missing := [one for one in chosen if one not in there]:
            raise ValueError(f"`methods.{label}.{name}` names {missing[0]!r}: there are {', '.join(map(str, there))}")
    table["seeds"] = table.get("seeds", list(seeds))
    return table


def _training(name: str, seed: int, settings: Mapping[str, Any], model: Classifier) -> Training:
    settings, eps = dict(settings), settings.get("eps")
    if isinstance(eps, Mapping):
        settings["eps"] = fitted(eps, model.specs)
        if not settings["eps"]:
            raise ValueError(
                f"`training.eps` must cover {' or '.join(model.specs)}, which {name} reads, got {dict(eps)}"
            )
    elif isinstance(eps, int | float) and not isinstance(eps, bool):
        settings["eps"] = str(eps)
    check_types(Training, settings, "training")
    training = Training(model=name, seed=seed, **settings)
    method = parse_method(training.method)
    method.check(model)
    method.check_budgets(model, training.budgets(model))
    return training


def _evaluations(given: Mapping[str, Any], seeds: Sequence[int]) -> list[Asked]:
    found = given.get("evaluations")
    if not isinstance(found, list) or not found or not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"a recipe needs at least one [[evaluations]] table, got {found!r}")
    made: list[Asked] = []
    for table in found:
        known("an evaluation", table, ("name", "seeds", *JUDGED))
        settings = _frozen(table)
        name = settings.pop("name", None)
        if not LABEL.fullmatch(str(name)) or name in (None, *STAGES, *(one.name for one in made)):
            raise ValueError(
                "an evaluation needs a `name` of letters, digits and ._+-, other than that of another and than "
                f"{' and '.join(STAGES)}; got {name!r}"
            )
        chosen = _seeds("`seeds` of an evaluation", settings.pop("seeds")) if "seeds" in settings else None
        if chosen and (missing := [seed for seed in chosen if seed not in seeds]):
            raise ValueError(f"`seeds` of an evaluation must be among {list(seeds)}, got {missing[0]}")
        eps, attacked = _many(settings.pop("eps", "0.01")), _many(settings.pop("attacked", ()))
        if "data" in given:
            settings.setdefault("data", given["data"])
        check_types(Evaluation, settings, f"evaluations.{name}")
        made.append(Asked(name, eps, tuple(map(str, attacked)), settings, chosen))
    return made


def _metrics(given: Mapping[str, Any], model: str) -> Metrics | None:
    if "metrics" not in given:
        return None
    settings = _table(given, "metrics", object, needed=False)
    known("`metrics`", settings, [f.name for f in fields(Metrics)])
    check_types(Metrics, settings, "metrics")
    several = {key: _many(settings[key]) for key in ("layers", "spaces") if key in settings}
    made = Metrics(**{"data": given.get("data"), **settings, **several})
    made.survey(model, "cpu")  # this and the next look at their own settings
    made.wanted()
    return made


def _seeds(where: str, given: Any) -> tuple[int, ...]:
    whole = isinstance(given, Sequence) and all(type(one) is int and one >= 0 for one in given)
    if not whole or not given or len(set(given)) < len(given):
        raise ValueError(f"{where} must be different whole numbers from 0 on, as in [0, 1, 2], got {given!r}")
    return tuple(given)


def _many(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _frozen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, since settings are frozen."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
