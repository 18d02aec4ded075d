"""Conditions of universal perturbations: learnt on other clips than they are tried on, with their controls."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch

import robustav
from robustav.attacks.universal import FixedNoise, Shuffled, Universal
from robustav.classifier import Classifier
from robustav.data.av_events import cache_dir
from robustav.data.samples import Progress, Samples
from robustav.data.sources import DATA, load_samples
from robustav.goals import Goal
from robustav.harness import BATCH, Settings, as_evaluated, choose, learned_goal, pick_device
from robustav.ledger import digest_of, digest_of_model
from robustav.plan import Condition, subsets
from robustav.reader import Reader
from robustav.threat import Budget, ThreatModel
from robustav.universal import Learnt, Lesson, learn, load, save

UNIVERSAL = "universal"
CLIPS = 500  # of the learning split, unless it has fewer: 5 passes over them are some 300 updates
PASSES = 5


def universal_rows(
    model: Classifier,
    goal: Goal,
    epsilons: Sequence[Mapping[str, Budget]],
    sets: Sequence[tuple[str, ...]] | None,
    data: str | None,
    attacked_samples: Samples,
    learn_on: str | None,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
) -> list[Condition]:
    """For every epsilon and set of modalities a perturbation learnt on `learn_on`, the same shuffled, and fixed noise.

    What is learnt is kept in the cache, by everything that decides it. Raises `ValueError` where it is not known what to
    learn on, or it is what will be attacked.
    """
    if learn_on is None and (data or "av-events").partition("/")[0] not in DATA:
        raise ValueError(
            "a universal perturbation is learnt on other clips than it is tried on: name them with --learn-on"
        )
    source = learn_on or "av-events/train"
    samples, _ = load_samples(source, model, progress)
    if samples.digest == attacked_samples.digest:
        raise ValueError(
            f"a universal perturbation must be learnt on other clips than it is tried on, got {samples.name} for both"
        )
    device = pick_device(settings.device)
    reader = Reader(model, samples, goal, settings.batch_size or BATCH[device.type], device, seed=seed)
    chosen = choose(samples, CLIPS, seed)

    with as_evaluated(model, device):
        (first, *_), _ = reader.read(chosen[: reader.batch_size])
        if goal.needs_corpus:
            goal = learned_goal(reader, chosen, reader.batch_size, progress or _silent)
    scores = hashlib.sha256(first.clean.logits.float().cpu().numpy().tobytes()).hexdigest()

    def lessons() -> Iterator[Lesson]:
        for i in range(0, len(chosen), reader.batch_size):
            for batch in reader.read(chosen[i : i + reader.batch_size])[0]:
                yield Lesson(batch.inputs, batch.labels, batch.writable)

    rows = []
    for level, budgets in enumerate(epsilons):
        for attacked in sets or subsets(sorted(budgets)):
            if not set(attacked) <= budgets.keys():
                continue
            threat = ThreatModel({m: budgets[m] for m in attacked}, goal)
            decided = {
                "model": [
                    type(model).__qualname__,
                    digest_of_model(model),
                    scores,
                ],  # scores: code may change, not weights
                "versions": [robustav.__version__, torch.__version__],
                "data": samples.digest,
                "clips": digest_of([samples.ids[i] for i in chosen]),
                "threat": {m: repr(budget) for m, budget in threat.budgets.items()},
                "goal": goal.settings(),
                "settings": [PASSES, seed, reader.batch_size, device.type],
            }
            path = cache_dir() / "universal" / f"{digest_of(decided)[:24]}.safetensors"
            if not path.exists():
                with as_evaluated(model, device):
                    learnt: Learnt = learn(
                        model, lessons, threat, passes=PASSES, seed=seed, progress=progress or _silent
                    )
                save(path, learnt, model=model, threat=threat, seed=seed, data=samples.digest)
            attack = Universal(load(path).perturbation, name=f"learnt on {len(chosen)} of {samples.name}")
            for name, one in (
                (UNIVERSAL, attack),
                ("universal-shuffled", Shuffled(attack)),
                ("universal-noise", FixedNoise()),
            ):
                rows.append(Condition(name, tuple(attacked), level, one, threat))
    return rows


def _silent(what: str, done: int, total: int) -> None:
    """Nobody listens."""
