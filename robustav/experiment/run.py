"""Running a recipe: every training with its evaluations and metrics, one folder each, resumable stage by stage."""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from robustav.classifier import missing_adaptive
from robustav.data.samples import Progress
from robustav.evaluation import Evaluation
from robustav.experiment.recipe import Experiment, Metrics, Unit, read_recipe
from robustav.geometry.survey import silent
from robustav.harness import Settings
from robustav.ledger import write_atomically
from robustav.study import study
from robustav.training.loop import train
from robustav.training.methods import code_of
from robustav.training.trained import CARD, load_trained

RECIPE = "recipe.toml"
TRAINING, METRICS = "training", "metrics"


@dataclass(frozen=True)
class Stage:
    """One training, one evaluation or one look at latents: what is done as a whole or begun again where it stopped.

    `asked` is what it was asked for; it is kept beside the result, so that a changed recipe is not taken for the same, and
    so is the checksum of the weights in `card`, so that a training done anew is not taken for the one that was judged.
    """

    unit: Unit
    name: str
    folder: Path  # of the unit
    asked: Mapping[str, Any]
    do: Callable[[], Mapping[str, Any]] = field(repr=False)  # returns what to keep beside it
    card: Path | None = None  # of the training that it looks at

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"{self.unit.name}: {self.name}"

    @property
    def mark(self) -> Path:
        """A file that is there once the stage is done."""
        return self.folder / f"{self.name}.json"

    @property
    def trouble(self) -> Path:
        """A file that says what went wrong."""
        return self.folder / f"{self.name}-failed.txt"

    def kept(self) -> dict[str, Any]:
        """What was asked, how long it took, and what else there is to know, once it is done."""
        found = json.loads(self.mark.read_bytes())
        assert isinstance(found, dict)
        return found

    def finished(self) -> bool:
        """Whether it was done; raises `ValueError` if it was done otherwise than it is asked for now."""
        if not self.mark.is_file():
            return False
        kept = self.kept()
        before, now = kept["asked"], json.loads(json.dumps(self.asked, default=str))
        if different := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            key = different[0]
            raise ValueError(
                f"{self.folder} holds a {self.name} with other settings (`{key}`: {before.get(key)!r} there, "
                f"{now.get(key)!r} in the recipe): choose another --out, or delete {self._files()}"
            )
        weights = self.weights()
        if weights is not None and kept.get("weights") != weights:
            raise ValueError(
                f"{self.folder} holds a {self.name} of other weights than those of its {TRAINING}: delete {self._files()}"
            )
        return True

    def weights(self) -> str | None:
        """The checksum of the weights that it looks at; None if it looks at none, or they are not there yet."""
        if self.card is None or not self.card.is_file():
            return None
        found = json.loads(self.card.read_bytes()).get("sha256")
        assert found is None or isinstance(found, str)
        return found

    def _files(self) -> str:
        """What there is of it, for people."""
        if self.card is None:  # and with a training what follows from it
            return "that folder"
        return f"its {self.mark.name} and {self.name}{'.csv' if self.name == METRICS else ''}"


@dataclass
class Outcome:
    """What a process did: stages by their words, of those that are its own."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # and what went wrong, in a sentence
    left: list[str] = field(default_factory=list)  # not begun, for want of time or since their training failed
    judged: bool = False  # whether there is anything to report


def run(
    recipe: Path | str,
    out: Path | str | None = None,
    *,
    only: str = "*",
    shard: tuple[int, int] = (0, 1),
    budget: float | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda words: None,
    progress: Progress = silent,
) -> Outcome:
    """Do what a recipe asks and what is not done yet, in folders MODEL/METHOD/SEED under `out` (`runs/NAME`).

    `only` is a pattern of such names; `shard` (index, count) this process's share of them. After `budget` minutes no
    stage is begun any more. A stage that fails is recorded and does not stop the others; the next call tries it again.
    Raises `ValueError`, before anything runs, where `out` holds results of other settings.
    """
    began, recipe = time.monotonic(), Path(recipe)
    experiment, out = read_recipe(recipe), default_folder(recipe, out)
    fitting = [unit for unit in experiment.units if fnmatchcase(unit.name, only)]
    if not fitting:
        raise ValueError(f"`only` {only!r} fits no MODEL/METHOD/SEED of the recipe, such as {experiment.units[0].name}")
    chosen = [unit for unit in fitting if unit.turn % shard[1] == shard[0]]
    stages = {unit: list(stages_of(experiment, unit, out, device, progress)) for unit in chosen}
    for stage in (stage for several in stages.values() for stage in several):
        stage.finished()  # says so if it was done with other settings
    write_atomically(out / RECIPE, recipe.read_bytes())
    outcome = Outcome()
    for number, unit in enumerate(chosen, 1):
        for stage in stages[unit]:
            late = budget is not None and time.monotonic() - began > 60 * budget
            untrained = stage.name != TRAINING and not stages[unit][0].finished()
            try:
                done = stage.finished()
            except ValueError as error:  # its training was there no more, and has come out otherwise
                outcome.failed[stage.words] = str(error)
                continue
            if done:
                outcome.done.append(stage.words)
            elif late or untrained:
                outcome.left.append(stage.words)
            else:
                _attempt(stage, outcome, say, f"[{number}/{len(chosen)}] ")
            outcome.judged |= stage.name == experiment.evaluations[0].name and stage.finished()
    return outcome


def default_folder(recipe: Path, out: Path | str | None = None) -> Path:
    """Where an experiment's results go unless told: `runs/NAME`, after the recipe's file."""
    return Path(out) if out is not None else Path("runs") / recipe.stem


def stages_of(
    experiment: Experiment, unit: Unit, out: Path, device: str = "auto", progress: Progress = silent
) -> Iterator[Stage]:
    """The training first, then what needs it."""
    folder = out / unit.name
    trained, card = f"trained:{folder / TRAINING}", folder / TRAINING / CARD

    def training() -> Mapping[str, Any]:
        train(unit.training, folder / TRAINING, device=device, progress=progress)
        return {}

    def judged(name: str, evaluation: Evaluation) -> Mapping[str, Any]:
        ledger = evaluation.run(folder / name, Settings(device=device, progress=progress), progress)
        attacks = {described["name"] for described in ledger.record()["identity"]["conditions"].values()}
        return {"withheld": missing_adaptive(load_trained(folder / TRAINING), attacks)}

    def measured(metrics: Metrics) -> Mapping[str, Any]:
        rows = study(metrics.survey(trained, device), metrics.wanted(), progress).report.rows
        write_atomically(folder / f"{METRICS}.csv", rows.to_csv(index=False).encode())
        return {}

    yield Stage(unit, TRAINING, folder, asdict(unit.training) | code_of(unit.training.method), training)
    for asked in experiment.evaluations:
        evaluation = asked.of(trained, unit.modalities) if asked.seeds is None or unit.seed in asked.seeds else None
        if evaluation is not None:
            words = {key: value for key, value in vars(evaluation).items() if key != "model" and value is not None}
            yield Stage(unit, asked.name, folder, words, partial(judged, asked.name, evaluation), card)
    if experiment.metrics is not None:
        yield Stage(unit, METRICS, folder, asdict(experiment.metrics), partial(measured, experiment.metrics), card)


def _attempt(stage: Stage, outcome: Outcome, say: Callable[[str], None], where: str) -> None:
    """Do one stage; whatever goes wrong in it is written down, and the others go on."""
    say(f"{where}{stage.words}")
    began = time.monotonic()
    try:
        more = stage.do()
    except Exception as error:
        sentence = f"{type(error).__name__}: {error}"
        write_atomically(stage.trouble, f"{sentence}\n\n{traceback.format_exc()}".encode())
        outcome.failed[stage.words] = sentence
        say(f"{where}{stage.words} FAILED: {sentence}")
        return
    stage.trouble.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    weights = {} if (found := stage.weights()) is None else {"weights": found}
    kept = {"asked": stage.asked, **weights, "seconds": round(seconds, 3), **more}
    write_atomically(stage.mark, json.dumps(kept, indent=1, default=str).encode())
    outcome.done.append(stage.words)
    say(f"{where}{stage.words} done in {seconds:.0f} s")


def troubles(stages: Sequence[Stage]) -> dict[str, str]:
    """Of stages that were tried and are not done, what went wrong."""
    found = {stage.words: stage.trouble for stage in stages if stage.trouble.is_file()}
    return {words: path.read_text(encoding="utf-8").partition("\n")[0] for words, path in found.items()}
