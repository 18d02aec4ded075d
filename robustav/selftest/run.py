"""The self-test: every known defect, every planted defence and every honest model, each with its outcome."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import torch

from robustav.attacks import Square
from robustav.classifier import Classifier
from robustav.data.samples import Progress
from robustav.flags import inspect
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.ledger import failures
from robustav.plan import CLEAN, conditions
from robustav.randomness import seeded
from robustav.selftest.catalogue import CATALOGUE, NotApplicableError
from robustav.selftest.planted import HONEST, PLANTED, Case
from robustav.selftest.tiny import SPECS, Clips
from robustav.suites import members, quick
from robustav.threat import Budget

Kind = Literal["defect", "planted", "honest"]
Findings = Mapping[str, str]  # what is said against a model: name of a flag -> sentence
Checker = Callable[[Classifier, float], Findings]

CLIPS = 16
SEARCH = Square(queries=200)
REFUSED, AUDIT = "refused", "audit"  # findings that are no flags: the harness raised, or rows are not valid


class Outcome(NamedTuple):
    """One line of the self-test. `passed` is None where there is nothing to test; `found` says what was seen."""

    name: str
    kind: Kind
    passed: bool | None
    found: str
    seconds: float


def selftest(
    progress: Progress = lambda what, done, total: None,
    *,
    catalogue: Mapping[str, Callable[[], None]] = CATALOGUE,
    planted: Mapping[str, Case] = PLANTED,
    honest: Mapping[str, Case] = HONEST,
    checker: Checker | None = None,
) -> list[Outcome]:
    """Everything that the tool should know of itself; no file is left behind, and global generators are as they were.

    `checker` is what looks at a model, by default `findings`. Raises `ValueError` where Python skips assertions, which is
    what the checks are made of.
    """
    if not _asserts():
        raise ValueError(
            "Python runs without assertions (-O, or PYTHONOPTIMIZE), so nothing would fail: run it without"
        )
    look = checker or findings
    tests: list[tuple[str, Callable[[], Outcome]]] = [
        *((name, lambda name=name, check=check: judge_defect(name, check)) for name, check in catalogue.items()),
        *((name, lambda name=name, case=case: judge_planted(name, case, look)) for name, case in planted.items()),
        *((name, lambda name=name, case=case: judge_honest(name, case, look)) for name, case in honest.items()),
    ]
    outcomes = []
    for done, (name, test) in enumerate(tests):
        progress(f"testing: {name}", done, len(tests))
        began = time.perf_counter()
        with seeded(0, "self-test", name), _quiet(), _one_thread():
            outcomes.append(test()._replace(seconds=time.perf_counter() - began))
    progress("done", len(tests), len(tests))
    return outcomes


def judge_defect(name: str, check: Callable[[], None]) -> Outcome:
    """Whether robustav has a defect of the catalogue. A check that breaks down has shown nothing, and fails."""
    words = (check.__doc__ or name).splitlines()[0].removeprefix(f"{name}: ").rstrip(".")
    try:
        check()
    except NotApplicableError as reason:
        return Outcome(f"{name} {words}", "defect", None, str(reason), 0.0)
    except Exception as error:
        return Outcome(f"{name} {words}", "defect", False, _named(error), 0.0)
    return Outcome(f"{name} {words}", "defect", True, "", 0.0)


def judge_planted(name: str, case: Case, look: Checker) -> Outcome:
    """Whether every flag that a broken defence must raise was raised; others may be."""
    try:
        found = look(case.make(), case.epsilon)
    except Exception as error:
        return Outcome(name, "planted", False, _named(error), 0.0)
    missing = sorted(case.flags - found.keys())
    words = ", ".join(found) or "nothing"
    return Outcome(name, "planted", not missing, words + (f"; not found: {', '.join(missing)}" * bool(missing)), 0.0)


def judge_honest(name: str, case: Case, look: Checker) -> Outcome:
    """Whether nothing is said against an honest model."""
    try:
        found = look(case.make(), case.epsilon)
    except Exception as error:
        return Outcome(name, "honest", False, _named(error), 0.0)
    return Outcome(name, "honest", not found, "; ".join(f"{flag}: {words}" for flag, words in found.items()), 0.0)


def findings(model: Classifier, epsilon: float) -> Findings:
    """Every flag of an evaluation as a user would run it: of the model, of its attacks, and of the audit."""
    goal, clips = Untargeted(model.label_kind), Clips(model.label_kind, CLIPS)
    budgets = {m: Budget("linf", epsilon, low=spec.low, high=spec.high) for m, spec in SPECS.items()}
    attacks = members({**quick(goal, model), "square": SEARCH}, model, "mAP")
    rows = conditions(attacks, [budgets], goal, [tuple(sorted(SPECS))])
    with TemporaryDirectory() as folder:
        try:
            ledger = evaluate(model, clips, rows, goal, Path(folder) / "run", settings=Settings(device="cpu"))
        except ValueError as refusal:
            return {REFUSED: str(refusal)}
        described = ledger.record()["identity"]["conditions"]
        frames = {key: ledger.read(key) for key in described}
        flags = [*ledger.flags(), *inspect(frames, described, frames[CLEAN.key])]
        found: dict[str, str] = {}
        for name, sentence, *_ in flags:
            found.setdefault(name, sentence)
        return {**found, **dict.fromkeys([AUDIT] * bool(failures(ledger)), "rows are not valid")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that broken models deserve."""
    log = logging.getLogger("robustav")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models as small as these lose more by waiting for threads than they gain, on a busy machine tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _asserts() -> bool:
    try:
        assert not SEARCH
    except AssertionError:
        return True
    return False


def _named(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
