"""Do density and convexity predict the robustness of the shipped models? Trains nothing.

    python experiments/latent_geometry.py [--runs runs/latent-geometry] [--out experiments/latent-geometry]

Costs about an hour and a half on two CPU cores, most of it the attacks (noise and PGD-40 at four budgets on 500 of the 1 000
test scenes of av-events, five models), which resume where they were stopped. Metrics are measured on the other 500 scenes;
those at the raw input come last and take as long as all others.

Expect: clean mAP between 0.82 and 0.94; joint attacks on the fusion models to leave a mAP of 0.14 to 0.25 at epsilon 0.01;
conditional convexity of exactly 1 at every latent, since all heads are linear; with 10 classes, wide intervals everywhere.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from robustav.cli.progress import Bars
from robustav.cli.shared import ERRORS
from robustav.evaluation import Evaluation
from robustav.geometry.convexity import Segments
from robustav.geometry.survey import Survey
from robustav.harness import Settings
from robustav.models.zoo import MODELS
from robustav.study import Wanted, study, validate_runs

EPSILONS = ("0.001", "0.002", "0.005", "0.01")
ATTACKED = 500  # clips
DRIFT = 200  # clips whose adversarial latents are looked at
TARGETS = ("ap", "kept")


def main() -> None:
    """Attack, validate, survey."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/latent-geometry"))
    parser.add_argument("--out", type=Path, default=Path("experiments/latent-geometry"))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    survey = Survey(resamples=2000)
    wanted = Wanted(ks=(5, 10), segments=Segments(pairs=None))
    with Bars(ERRORS) as bars:
        runs: list[Path] = []

        def validate_at(layers: tuple[str, ...], name: str) -> None:
            here = replace(survey, layers=layers)
            for target, found in validate_runs(runs, here, wanted, targets=TARGETS, progress=bars.generation).items():
                found.save(arguments.out / f"{name}-{target}")

        for model in arguments.models:
            evaluation = Evaluation(model, EPSILONS, attacks=("noise", "pgd"), steps=40, limit=ATTACKED)
            runs.append(evaluation.run(arguments.runs / model, Settings(progress=bars.attacks)).folder)
        validate_at(("features", "latent"), "validation")
        for model in arguments.models:
            evaluation = Evaluation(model, "0.01", attacks="pgd", attacked="both", steps=40, limit=DRIFT)
            if len(MODELS[model].build().specs) == 1:
                evaluation = replace(evaluation, attacked=())
            kept = evaluation.run(arguments.runs / f"{model}-kept", Settings(keep=DRIFT, progress=bars.attacks)).folder
            alone = replace(wanted, ks=(10,), convexity=False, adversarial=kept)
            study(replace(survey, model=model, resamples=1000), alone, bars.generation).save(arguments.out / model)
        validate_at(("input",), "validation-input")


if __name__ == "__main__":
    main()
