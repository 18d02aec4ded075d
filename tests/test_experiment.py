"""Experiments: what a recipe says, running it in pieces, and what its report makes of the results."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TinySamples, tiny_fusion, tiny_specs

from robustav import evaluation
from robustav.classifier import LateFusion
from robustav.experiment import run as running
from robustav.experiment.details import every_attack, every_epsilon, latents, second_opinions
from robustav.experiment.figures import _looks, _numbers, apart
from robustav.experiment.fused import against_single, vulnerability
from robustav.experiment.protection import comparisons, gaps, protection
from robustav.experiment.recipe import Asked, parse_recipe, read_recipe
from robustav.experiment.results import UNTOUCHED, Cost, Results, Scores, Where, read_results
from robustav.experiment.run import run
from robustav.experiment.sampled import (
    RESAMPLES,
    Sampled,
    budget_of_drop,
    flip_test,
    gap_closed,
    matched_share,
    ratio,
    shared,
)
from robustav.experiment.summary import report_of, save, summarise
from robustav.experiment.tables import Tables
from robustav.geometry import survey
from robustav.ledger import Ledger
from robustav.metrics.intervals import mcnemar
from robustav.metrics.tagging import random_average_precision
from robustav.report.grids import markdown
from robustav.report.table import build
from robustav.report.text import between
from robustav.report.words import WORST
from robustav.training import data as training_data

RECIPES = Path(__file__).parents[1] / "experiments"
EVALUATION = {"name": "quick", "attacks": ["noise", "fgsm"], "eps": ["0.01", "0.02"], "limit": 24}
GIVEN = {
    "models": {"heard": "test_experiment:tiny_audio", "both": "conftest:tiny_fusion"},
    "methods": {"erm": "erm", "n-fgsm": "n-fgsm"},
    "seeds": [0, 1],
    "training": {"data": "tiny", "epochs": 1, "batch_size": 8},
    "evaluations": [EVALUATION],
}
RECIPE = """
seeds = [0, 1]
reference = "n-fgsm"
[training]
data = "tiny"
epochs = 1
batch_size = 8
[models]
heard = "test_experiment:tiny_audio"
both = "conftest:tiny_fusion"
[methods]
erm = "erm"
n-fgsm = "n-fgsm"
[[evaluations]]
name = "quick"
attacks = ["noise", "fgsm"]
eps = ["0.01", "0.02"]
limit = 24
[[evaluations]]
name = "search"
attacks = "fmn"
steps = 4
eps = "0.02"
attacked = "both"
limit = 12
seeds = [0]
"""
METRICS = """
[metrics]
layers = ["latent"]
k = 2
pairs = 10
resamples = 40
"""

SHORT = (
    RECIPE.partition("[[evaluations]]")[0]
    + """
[[evaluations]]
name = "quick"
attacks = "fgsm"
eps = "0.02"
attacked = "both"
limit = 8
"""
)


def tiny_audio():
    whole = tiny_fusion()
    head = type(whole.head)(60, len(whole.classes))
    return LateFusion(
        {"audio": whole.encoders["audio"]}, head, specs={"audio": tiny_specs()["audio"]}, classes=whole.classes
    ).eval()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Forty random clips under every name, and a short recipe of them; returns the recipe's file."""
    for module in (evaluation, training_data, survey):
        monkeypatch.setattr(module, "load_samples", lambda source, model, progress=None: (TinySamples(40), None))
    path = tmp_path / "tiny.toml"
    path.write_text(SHORT)
    return path


def without(given, *keys):
    return {key: value for key, value in given.items() if key not in keys}


# Recipes


def test_units_come_seed_by_seed_and_model_by_model_with_all_methods():
    units = parse_recipe(GIVEN).units
    assert [unit.name for unit in units][:5] == ["heard/erm/0", "heard/n-fgsm/0", "both/erm/0", "both/n-fgsm/0",
                                                "heard/erm/1"]  # fmt: skip
    assert {(u.training.method, u.training.seed, u.training.epochs) for u in units} == {
        ("erm", 0, 1), ("erm", 1, 1), ("n-fgsm", 0, 1), ("n-fgsm", 1, 1)
    }  # fmt: skip
    assert units[0].training.model == "test_experiment:tiny_audio"
    assert (units[0].modalities, units[2].modalities) == (("audio",), ("audio", "visual"))


def test_a_method_may_differ_in_settings_models_and_seeds():
    long = {"method": "erm", "epochs": 5, "models": ["both"], "seeds": [1]}
    units = [u for u in parse_recipe({**GIVEN, "methods": {"erm": "erm", "long": long}}).units if u.method == "long"]
    assert [(u.name, u.training.epochs) for u in units] == [("both/long/1", 5)]


def test_budgets_by_modality_reach_each_model_as_far_as_it_has_them():
    table = {"audio": 0.01, "visual": "4/255"}
    given = {**GIVEN, "training": {**GIVEN["training"], "eps": table}}
    given["evaluations"] = [{**EVALUATION, "eps": [table, "0.001,0.002", {"visual": 0.5}]}]
    experiment = parse_recipe(given)
    heard, both = experiment.units[0], experiment.units[2]
    assert (heard.training.eps, both.training.eps) == ("audio=0.01", "audio=0.01,visual=4/255")
    (asked,) = experiment.evaluations
    assert asked.levels(("audio",)) == {"audio=0.01,visual=4/255": "audio=0.01", "0.001": "0.001", "0.002": "0.002"}
    assert list(asked.levels(("audio", "visual"))) == ["audio=0.01,visual=4/255", "0.001", "0.002", "visual=0.5"]


def test_attacked_sets_are_those_that_a_model_has():
    asked = Asked("a", ("0.01",), ("audio", "audio+visual", "both"), {})
    assert asked.sets(("audio",)) == ("audio", "both")
    assert replace(asked, attacked=("visual",)).of("m", ("audio",)) is None
    assert replace(asked, attacked=()).sets(("audio",)) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {}}, "a recipe has no key 'model': there are data, seeds"),
        ({"models": {}}, r"a recipe needs a table \[models\], got {}"),
        ({"models": {"a b": "av-fusion"}}, "`models`: a name must be letters, digits and ._"),
        ({"models": {"a": 3}}, "`models.a` must be text, got 3"),
        ({"models": {"a": "no-such"}}, "no model 'no-such'"),
        ({"methods": {"erm": 3}}, "`methods.erm` must be text or a table, got 3"),
        ({"methods": {"erm": {"epochs": 3}}}, "`methods.erm` needs its `method`"),
        (
            {"methods": {"erm": {"method": "erm", "epoch": 3}}},
            "`methods.erm` has no key 'epoch': there are method, mode",
        ),
        (
            {"methods": {"erm": {"method": "erm", "models": ["x"]}}},
            "`methods.erm.models` names 'x': there are heard, bo",
        ),
        ({"methods": {"erm": {"method": "erm", "seeds": [7]}}}, "`methods.erm.seeds` names 7: there are 0, 1"),
        ({"methods": {"erm": "emr"}}, "no method 'emr': there are erm"),
        ({"methods": {"sgd": "erm"}}, "`baseline` must be one of the methods sgd, got 'erm'"),
        ({"reference": "pgd"}, "`reference` must be one of the methods erm, n-fgsm, got 'pgd'"),
        ({"seeds": []}, r"`seeds` must be different whole numbers from 0 on, as in \[0, 1, 2\], got \[\]"),
        ({"seeds": [1, 1]}, r"`seeds` must be different .* got \[1, 1\]"),
        ({"seeds": ["a"]}, r"`seeds` must be different .* got \['a'\]"),
        ({"training": {"seed": 3}}, "`training` has no key 'seed': there are data, validation"),
        ({"training": {"data": "tiny", "epochs": 0}}, "`epochs` must be above 0, got 0"),
        ({"training": {"data": "tiny", "eps": "a"}}, "must be a number or a fraction"),
        ({"training": 3}, "`training` must be a table, got 3"),
        ({"training": {"epochs": "3"}}, "`training.epochs` must be a whole number, got '3'"),
        ({"training": {"epochs": 2.5}}, "`training.epochs` must be a whole number, got 2.5"),
        ({"training": {"learning_rate": True}}, "`training.learning_rate` must be a number, got True"),
        ({"training": {"cosine": 1}}, "`training.cosine` must be true or false, got 1"),
        ({"training": {"method": "erm", "augment": 2}}, "`training` has no key 'method'"),
        ({"training": {"augment": 2}}, "`training.augment` must be text, got 2"),
        ({"training": {"eps": [0.1]}}, r"`training.eps` must be text, got \[0.1\]"),
        (
            {"training": {"eps": {"visual": 0.1}}},
            "`training.eps` must cover audio, which test_experiment:tiny_audio reads",
        ),
        (
            {"methods": {"erm": {"method": "erm", "limit": "many"}}},
            "`training.limit` must be a whole number, got 'many'",
        ),
        (
            {"methods": {"erm": {"method": "erm", "models": "heard"}}},
            "`methods.erm.models` must be a list, got 'heard'",
        ),
        (
            {"training": {"eps": {"audio": 0.1, "vision": 0.1}}},
            "`training.eps` names 'vision': the models of this recipe have audio, visual",
        ),
        (
            {"methods": {"erm": {"method": "erm", "eps": {"vision": 0.1}}}},
            "`methods.erm.eps` names 'vision'",
        ),
        (
            {"evaluations": [{**EVALUATION, "eps": [{"audio": 0.1}, {"audio": 0.1, "vision": 0.1}]}]},
            "`evaluations.quick.eps` names 'vision'",
        ),
        (
            {"evaluations": [{**EVALUATION, "attacked": ["audio", "audio+vision"]}]},
            "`evaluations.quick.attacked` names 'vision'",
        ),
        ({"training": {"learning_rate": float("nan")}}, "`training.learning_rate` must be a number, got nan"),
        ({"training": {"norm": "l2"}, "methods": {"erm": "remembered"}}, "`norm` must be linf, since signs are"),
        ({"data": 3}, "`evaluations.quick.data` must be text, got 3"),
        ({"seeds": [True, False]}, r"`seeds` must be different whole numbers from 0 on.* got \[True, False\]"),
        ({"evaluations": []}, r"a recipe needs at least one \[\[evaluations\]\] table, got \[\]"),
        ({"evaluations": [without(EVALUATION, "name")]}, "an evaluation needs a `name`.* got None"),
        ({"evaluations": [{**EVALUATION, "name": "metrics"}]}, "an evaluation needs a `name`.* got 'metrics'"),
        ({"evaluations": [EVALUATION, EVALUATION]}, "an evaluation needs a `name`.* got 'quick'"),
        (
            {"evaluations": [{**EVALUATION, "model": "x"}]},
            "an evaluation has no key 'model': there are name, seeds, eps",
        ),
        ({"evaluations": [{**EVALUATION, "attacks": "pgdd"}]}, "no attack 'pgdd'"),
        ({"evaluations": [{**EVALUATION, "seeds": [5]}]}, r"`seeds` of an evaluation must be among \[0, 1\], got 5"),
        ({"evaluations": [{**EVALUATION, "eps": "x"}]}, "must be a number or a fraction"),
        (
            {"evaluations": [{**EVALUATION, "limit": "all"}]},
            "`evaluations.quick.limit` must be a whole number, got 'all'",
        ),
        ({"evaluations": [{**EVALUATION, "norm": 2}]}, "`evaluations.quick.norm` must be text, got 2"),
        ({"epsilon": "0.5"}, "`epsilon` must be one of the first evaluation's, 0.01, 0.02, got '0.5'"),
        ({"metrics": {"layer": []}}, "`metrics` has no key 'layer': there are data, layers"),
        ({"metrics": {"density": False, "convexity": False}}, "`metrics` must ask for density or convexity"),
        ({"metrics": {"limit": -1}}, "`limit` must not be negative"),
        ({"metrics": {"layers": [1]}}, r"`metrics.layers` must be a list of texts, got \[1\]"),
        ({"metrics": {"k": 2.5}}, "`metrics.k` must be a whole number, got 2.5"),
        ({"metrics": {"pairs": 0}}, "`pairs` must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_in_a_recipe_is_said(changes, words):
    with pytest.raises(ValueError, match=words):
        parse_recipe({**GIVEN, **changes})


def test_an_evaluation_must_cover_what_some_model_reads():
    given = {**GIVEN, "models": {"heard": "test_experiment:tiny_audio"}}
    with pytest.raises(ValueError, match="`eps` of the evaluation 'quick' must cover what a model reads, got none"):
        parse_recipe({**given, "evaluations": [{**EVALUATION, "eps": {}}]})


def test_a_text_is_a_list_of_one():
    metrics = parse_recipe({**GIVEN, "metrics": {"layers": "latent", "spaces": "raw"}}).metrics
    assert metrics is not None and (metrics.layers, metrics.spaces) == (("latent",), ("raw",))


def test_a_budget_may_be_a_number():
    given = {**GIVEN, "training": {**GIVEN["training"], "eps": 0.003}}
    assert {unit.training.eps for unit in parse_recipe(given).units} == {"0.003"}


def test_a_recipe_that_is_not_there_or_no_toml(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("seeds = [")
    with pytest.raises(ValueError, match=r"bad\.toml: "):
        read_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_can_be_run_and_say_what_they_cost_and_promise(path):
    experiment = read_recipe(path)
    text = path.read_text(encoding="utf-8")
    assert "# Cost" in text
    assert "# Expect" in text
    assert len(experiment.models) == 5
    assert len(experiment.seeds) >= 3
    assert experiment.reference == "pgd-at"


def test_shards_share_all_units_and_each_gets_every_method_and_some_of_every_model_and_seed():
    units = parse_recipe(GIVEN).units
    shares = [[u for u in units if u.turn % 2 == index] for index in (0, 1)]
    assert sorted(u.name for share in shares for u in share) == sorted(u.name for u in units)
    assert [sorted({u.method for u in share}) for share in shares] == [["erm", "n-fgsm"]] * 2
    assert [len({(u.model, u.seed) for u in share}) for share in shares] == [4, 4]


# Running


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole tiny experiment, run once: its folder and what the run said."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "tiny.toml").write_text(RECIPE + METRICS)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluation, training_data, survey):
            patch.setattr(module, "load_samples", lambda source, model, progress=None: (TinySamples(40), None))
        outcome = run(folder / "tiny.toml", folder / "out", say=said.append)
    return folder / "out", outcome, said


@pytest.fixture(scope="module")
def reported(finished):
    """Its report, and the results that it is of."""
    return report_of(finished[0])


def test_a_run_leaves_a_folder_for_each_training_with_all_that_follows(finished):
    out, outcome, said = finished
    assert (outcome.failed, outcome.left, outcome.judged) == ({}, [], True)
    assert len(outcome.done) == 8 + 8 + 4 + 8
    assert said[0] == "[1/8] heard/erm/0: training"
    for name in ("training/model.safetensors", "training.json", "quick/run.json", "search/run.json", "metrics.csv"):
        assert (out / "both/n-fgsm/0" / name).is_file()
    assert not (out / "both/n-fgsm/1/search").exists()
    record = Ledger(out / "both/erm/0/quick").record()
    assert record["about"]["model"] == f"trained:{out / 'both/erm/0/training'}"


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    out, before, _ = finished
    monkeypatch.setattr(running, "train", None)  # calling it would fail
    said: list[str] = []
    outcome = run(out.parent / "tiny.toml", out, say=said.append)
    assert said == []
    assert outcome == before


def test_a_killed_run_goes_on_with_what_is_missing(tiny, tmp_path, monkeypatch):
    trained = []

    def killed(recipe, folder, **settings):
        trained.append(folder.parent.relative_to(tmp_path / "out").as_posix())
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(recipe, folder, **settings)

    train = running.train
    monkeypatch.setattr(running, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", only="*/*/0")
    assert trained == ["heard/erm/0", "heard/n-fgsm/0"]
    experiment = read_recipe(tiny)
    assert read_results(experiment, tmp_path / "out").trained == 1
    outcome = run(tiny, tmp_path / "out", only="*/*/0")
    assert trained == ["heard/erm/0", "heard/n-fgsm/0", "heard/n-fgsm/0", "both/erm/0", "both/n-fgsm/0"]
    assert (outcome.failed, outcome.left) == ({}, [])


def test_one_failure_is_written_down_and_stops_nothing_else(tiny, tmp_path, monkeypatch):
    out, train = tmp_path / "out", running.train

    def unlucky(recipe, folder, **settings):
        if recipe.method == "erm":
            raise RuntimeError("out of luck")
        return train(recipe, folder, **settings)

    monkeypatch.setattr(running, "train", unlucky)
    outcome = run(tiny, out, only="heard/*/0")
    assert outcome.failed == {"heard/erm/0: training": "RuntimeError: out of luck"}
    assert outcome.left == ["heard/erm/0: quick"]
    assert outcome.done == ["heard/n-fgsm/0: training", "heard/n-fgsm/0: quick"]
    trouble = out / "heard/erm/0/training-failed.txt"
    assert trouble.read_text().startswith("RuntimeError: out of luck\n\nTraceback")
    report, results = report_of(out)
    assert results.failed == outcome.failed
    assert "WARNING: heard/erm/0: training failed: RuntimeError: out of luck" in report.notes
    monkeypatch.setattr(running, "train", train)
    assert run(tiny, out, only="heard/erm/0").failed == {}
    assert not trouble.exists()


def test_a_failed_evaluation_does_not_keep_the_metrics_from_being_taken(tiny, tmp_path, monkeypatch):
    tiny.write_text(SHORT + METRICS)
    monkeypatch.setattr(evaluation, "load_samples", lambda *_: (_ for _ in ()).throw(ValueError("no such clips")))
    outcome = run(tiny, tmp_path / "out", only="heard/erm/0")
    assert list(outcome.failed) == ["heard/erm/0: quick"]
    assert outcome.done == ["heard/erm/0: training", "heard/erm/0: metrics"]
    assert not outcome.judged
    with pytest.raises(
        FileNotFoundError, match=r"nothing to report yet.*heard/erm/0: quick failed: ValueError: no such"
    ):
        report_of(tmp_path / "out")


def test_nothing_is_begun_once_the_time_is_up(tiny, tmp_path, monkeypatch):
    minutes = iter(range(100))
    monkeypatch.setattr(running.time, "monotonic", lambda: 60.0 * next(minutes))
    outcome = run(tiny, tmp_path / "out", only="heard/erm/*", budget=3)
    assert outcome.done == ["heard/erm/0: training"]
    assert outcome.left == ["heard/erm/0: quick", "heard/erm/1: training", "heard/erm/1: quick"]


def test_results_of_other_settings_are_not_taken_for_these(finished, tmp_path):
    out, _, _ = finished
    changed = tmp_path / "tiny.toml"
    changed.write_text((RECIPE + METRICS).replace("epochs = 1", "epochs = 2"))
    with pytest.raises(
        ValueError, match=r"holds a training with other settings \(`epochs`: 1 there, 2 in the recipe\)"
    ):
        run(changed, out)
    changed.write_text((RECIPE + METRICS).replace("limit = 24", "limit = 23"))
    with pytest.raises(ValueError, match=r"holds a quick with other settings \(`limit`: 24 there, 23 in the recipe\)"):
        run(changed, out)
    assert (out / "recipe.toml").read_text() == RECIPE + METRICS


def test_a_training_by_a_method_whose_file_changed_is_not_taken_for_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    path = tmp_path / "own_method_of_experiment.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom robustav.training.method import Method\n"
        "@dataclass(frozen=True)\nclass Own(Method):\n    pass\n"
    )
    tiny.write_text(SHORT.replace('erm = "erm"', f'erm = "erm"\nown = "{path}:Own"'))
    outcome = run(tiny, tmp_path / "out", only="heard/own/0")
    assert outcome.done == ["heard/own/0: training", "heard/own/0: quick"] and not outcome.failed
    path.write_text(path.read_text() + "# changed\n")
    with pytest.raises(ValueError, match=r"holds a training with other settings \(`method_code`: .*delete that folder"):
        run(tiny, tmp_path / "out", only="heard/own/0")


def test_a_training_done_anew_is_not_taken_for_the_one_that_was_judged(finished, tmp_path, tiny, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    unit = out / "heard/erm/0"
    (unit / "training.json").unlink()
    card = unit / "training/card.json"
    anew = json.dumps({**json.loads(card.read_text()), "sha256": "0" * 64})
    monkeypatch.setattr(running, "train", lambda *_, **__: card.write_text(anew))
    outcome = run(finished[0].parent / "tiny.toml", out)
    assert sorted(outcome.failed) == ["heard/erm/0: metrics", "heard/erm/0: quick", "heard/erm/0: search"]
    words = "holds a quick of other weights than those of its training: delete its quick.json and quick"
    assert words in outcome.failed["heard/erm/0: quick"]
    for call in (lambda: run(finished[0].parent / "tiny.toml", out), lambda: report_of(out)):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_pattern_that_fits_nothing_is_an_error(tiny, tmp_path):
    with pytest.raises(ValueError, match="`only` 'x' fits no MODEL/METHOD/SEED of the recipe, such as heard/erm/0"):
        run(tiny, tmp_path / "out", only="x")
    with pytest.raises(ValueError, match=r"`only` '\*/emr/0' fits no MODEL/METHOD/SEED"):
        run(tiny, tmp_path / "out", only="*/emr/0", shard=(0, 2))
    assert not (tmp_path / "out").exists()


def test_a_shard_does_its_share(tiny, tmp_path):
    first = run(tiny, tmp_path / "out", shard=(0, 2), budget=0)
    second = run(tiny, tmp_path / "out", shard=(1, 2), budget=0)
    assert len(first.left) + len(second.left) == 16
    assert not set(first.left) & set(second.left)


# Reports of real runs


def test_a_report_names_the_models_that_an_evaluation_leaves_out(reported):
    _, results = reported
    first, search = results.experiment.evaluations
    pictures = replace(results.experiment, evaluations=[first, replace(search, attacked=("visual",))])
    for experiment, words in ((results.experiment, ""), (pictures, "; not heard, having nothing of what it attacks")):
        header = summarise("made up", replace(results, experiment=experiment)).headers
        assert header["judged by search"].endswith(results.scores["search"].about["data"] + words)
        assert header["judged by quick"].endswith(results.scores["quick"].about["data"])


def test_scores_are_those_of_each_run_s_own_report(finished, reported):
    out, results = finished[0], reported[1]
    scores = results.scores["quick"]
    assert scores.headline == "mAP"
    table = build([Ledger(out / "both/n-fgsm/1/quick")]).table
    assert len(table) == 1 + 2 * 3 * 3
    for _, row in table.iterrows():
        where = Where(row["attacked"], ["0.01", "0.02"][row["level"]]) if row["attacked"] else UNTOUCHED
        for score in ("top1", *(["mAP"] if row["condition"] in ("clean", WORST) else [])):
            found = scores.get("both", "n-fgsm", where, row=row["condition"], score=score)
            assert found.points[found.seeds.index(1)] == pytest.approx(row[score])
            if score == "mAP":
                ends = found.at([1]).interval
                assert (max(ends.low, 0), min(ends.high, 1)) == pytest.approx((row["mAP_low"], row["mAP_high"]))


def test_chance_is_what_a_model_scores_that_tells_no_clip_from_another(finished, reported):
    out, (report, results) = finished[0], reported
    clean = Ledger(out / "both/erm/0/quick").read("clean")
    counts = np.bincount(np.concatenate(clean["labels"].to_list()), minlength=3)
    expected = np.mean([random_average_precision(int(count), len(clean)) for count in counts if count])
    assert results.scores["quick"].chance == pytest.approx(expected)
    assert results.scores["search"].chance == pytest.approx(
        np.bincount(np.concatenate(Ledger(out / "both/erm/0/search").read("clean")["labels"].to_list())).max() / 12
    )
    assert any(f"about a mAP of {results.scores['quick'].chance:.3f} on these clips" in note for note in report.notes)


def test_a_search_that_spares_broken_clips_is_reported_by_hits(reported):
    _, results = reported
    assert results.scores["search"].headline == "top1"
    assert results.scores["search"].get("both", "erm", Where("audio+visual", "0.02"), score="mAP") is None


def test_the_report_has_every_table_and_every_number_in_its_csv(finished, reported, tmp_path):
    out, (report, results) = finished[0], reported
    text = markdown(report)
    for words in (
        "mAP clean and under attack at epsilon 0.02",
        "top-1 hits differ",
        "density and convexity",
        "12 clips that search looked at too",
        "mAP at every epsilon",
        "under each attack",
        "8 of 8 trainings, with all evaluations and metrics",
        "heard (audio), both (audio+visual)",
        "FGSM()",
    ):
        assert words in text, words
    assert str(out) not in text
    rows = report.rows
    protection = rows[
        (rows["table"] == "protection") & (rows["model"] == "both") & (rows["attacked"] == "audio+visual")
    ]
    assert list(protection["seeds"]) == [2, 2]
    scores = results.scores["quick"].get("both", "erm", Where("audio+visual", "0.02"))
    assert protection["value"].iloc[0] == pytest.approx(scores.points.mean())
    assert protection["spread"].iloc[0] == pytest.approx(scores.points.std(ddof=1))
    files = save(report, results, tmp_path / "report")
    assert sorted(file.name for file in files) == [
        "by-attack-mode.png", "by-attack-mode.svg", "by-epsilon.png", "by-epsilon.svg", "protection-by-cost.png",
        "protection-by-cost.svg", "report.csv", "report.md",
    ]  # fmt: skip
    assert all(file.stat().st_size > 1000 for file in files)


def test_cost_is_that_of_the_cards_relative_to_the_baseline(finished, reported):
    out, (report, results) = finished[0], reported
    assert results.costs["both", "erm"].passes_a_clip == 2
    assert results.costs["both", "n-fgsm"].passes_a_clip == 4
    rows = report.rows[report.rows["table"] == "passes, times"].set_index(["model", "method"])["value"]
    assert rows["both", "n-fgsm"] == 2
    card = json.loads((out / "both/erm/0/training/card.json").read_text())
    assert results.costs["both", "erm"].passes == card["cost"]["forwards"] + card["cost"]["backwards"]
    cards = [json.loads(path.read_text()) for path in out.glob("both/erm/*/training/card.json")]
    mean = sum(card["cost"]["cpu_seconds"] for card in cards) / len(cards)
    assert results.costs["both", "erm"].seconds == pytest.approx(mean)
    assert results.costs["both", "erm"].device == "cpu"


def test_seconds_of_two_devices_are_not_divided_by_one_another():
    results = synthetic({k: s for m in ("erm", "at") for k, s in curve("ear", m, "audio", 0.8, 0.6, 0.5).items()})
    plain = results.costs["ear", "erm"]
    for device, told in (("cpu", True), ("cuda", False), ("cpu+cuda", False)):
        costs = {**results.costs, ("ear", "at"): plain._replace(device=device)}
        tables = tables_of(replace(results, costs=costs))
        list(protection(tables))
        (row,) = [r for r in tables.rows if (r["table"], r["method"]) == ("seconds, times", "at")]
        assert bool(np.isnan(row["value"])) is not told


def test_a_part_is_reported_as_such(finished, tmp_path):
    out, _, _ = finished
    recipe = tmp_path / "part" / "recipe.toml"
    recipe.parent.mkdir()
    recipe.write_text(RECIPE + METRICS)
    (recipe.parent / "both" / "erm").mkdir(parents=True)
    (recipe.parent / "both/erm/0").symlink_to(out / "both/erm/0")
    report, results = report_of(recipe.parent)
    assert results.trained == 1
    assert len(results.missing) == 24
    assert "1 of 8 trainings; 24 stages are missing" in report.headers["finished"]
    assert any(note.startswith("WARNING: not finished") and "and 16 more" in note for note in report.notes)
    assert set(report.rows["model"]) == {"both"}
    assert "±" not in markdown(report).split("## every")[0].split("Notes")[0].split("- mAP")[0]


def test_no_robust_score_without_the_attack_that_knows_a_defence(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "missing_adaptive", lambda model, ran: "faced no adaptive attack" if ran else "")
    run(tiny, tmp_path / "out", only="heard/erm/0")
    report, results = report_of(tmp_path / "out")
    assert results.scores["quick"].places("heard") == [UNTOUCHED]
    assert "WARNING: heard/erm/0: quick: faced no adaptive attack" in report.notes
    assert save(report, results, tmp_path / "report")


def test_rows_that_failed_their_audit_are_no_scores(finished, tmp_path, monkeypatch):
    import robustav.experiment.results as reading

    out, _, _ = finished

    def doctored(ledger, key, clips):
        rows = usable(ledger, key, clips)
        return rows.assign(violation="too long") if key == "fgsm-audio-1" else rows

    usable = reading.usable
    monkeypatch.setattr(reading, "usable", doctored)
    report, results = report_of(out)
    assert len(results.unsound) == 2 * 8 + 4  # FGSM and the worst case of audio, and of both
    assert results.scores["quick"].get("heard", "erm", Where("audio", "0.02")) is None
    assert results.scores["quick"].get("heard", "erm", Where("audio", "0.01")) is not None
    assert any("heard/erm/0: quick: fgsm audio 0.02 is not valid" in note for note in report.notes)


def test_a_folder_without_a_recipe_is_no_experiment(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no experiment: it has no recipe\.toml"):
        report_of(tmp_path)


# Arithmetic


def sampled(*points, noise=0.0, seeds=None, seed=0):
    """A score by seed, its resamples scattered around it."""
    drawn = np.random.default_rng(seed).normal(size=(len(points), RESAMPLES))
    found = np.array(points, dtype=float)
    return Sampled(tuple(seeds or range(len(points))), found, found[:, None] + noise * drawn)


def test_a_score_is_the_mean_over_seeds_and_its_interval_covers_clips_and_seeds():
    score = sampled(0.2, 0.4, 0.6)
    assert (score.mean, score.spread) == pytest.approx((0.4, 0.2))
    low, high = score.interval
    assert low == pytest.approx(0.2)  # of three seeds, all three draws are often the lowest
    assert high == pytest.approx(0.6)
    assert np.isnan(sampled(0.5).spread)
    assert sampled(0.5, noise=0.1).interval == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=0.02)
    wider = sampled(0.3, 0.7, noise=0.1).interval
    assert wider.high - wider.low > 0.4


def test_differences_are_paired_by_seed_and_by_clip():
    one, other = sampled(0.5, 0.7, noise=0.1), sampled(0.4, 0.6, noise=0.1)
    assert one.minus(other).mean == pytest.approx(0.1)
    assert one.minus(other).interval == pytest.approx((0.1, 0.1))
    later = replace(other, seeds=(1, 2))
    assert one.minus(later).seeds == (1,)
    assert one.minus(later).mean == pytest.approx(0.7 - 0.4)
    with pytest.raises(ValueError, match=r"the scores share no seed: \(0, 1\) and \(5, 6\)"):
        one.minus(replace(other, seeds=(5, 6)))
    assert shared(one, None) == ()
    assert shared(one, replace(other, seeds=(5, 6))) == ()


def test_gap_closed_is_the_share_of_what_the_reference_gains():
    baseline, reference = sampled(0.2, 0.2), sampled(0.6, 0.8)
    value, ends = gap_closed(sampled(0.4, 0.5), baseline, reference)
    assert value == pytest.approx((0.45 - 0.2) / (0.7 - 0.2))
    assert ends == pytest.approx((0.5, 0.5))  # half of it with either seed
    assert gap_closed(baseline, baseline, reference)[0] == 0
    assert gap_closed(reference, baseline, reference)[0] == 1
    noisy = gap_closed(
        sampled(0.4, noise=0.02, seed=1), sampled(0.2, noise=0.02, seed=2), sampled(0.6, noise=0.02, seed=3)
    )
    assert noisy[0] == pytest.approx(0.5)
    # Delta method: sqrt((1 + 0.25 + 0.25) 0.02^2) / 0.4
    assert noisy[1] == pytest.approx((0.5 - 0.12, 0.5 + 0.12), abs=0.02)


def test_there_is_no_gap_to_close_where_the_reference_is_not_shown_to_be_better():
    baseline = sampled(0.4, noise=0.1)
    for reference in (sampled(0.42, noise=0.1, seed=9), sampled(0.3)):
        value, ends = gap_closed(sampled(0.5), baseline, reference)
        assert np.isnan(value)
        assert np.isnan(ends.low)


def test_a_ratio_below_nothing_is_none():
    assert np.isnan(ratio(1.0, 0.0, np.ones(3), np.zeros(3))[0])
    assert ratio(1.0, 2.0, np.ones(99), np.full(99, 2.0))[0] == 0.5


def test_the_flip_test_is_mcnemar_s_for_one_seed():
    for right, wrong in ((0, 0), (6, 0), (3, 9), (7, 7), (1, 0)):
        differences = np.array([1] * right + [-1] * wrong + [0] * 4)
        assert flip_test(differences) == pytest.approx(mcnemar(right, wrong))
        assert flip_test(-differences) == pytest.approx(flip_test(differences))


def test_the_flip_test_counts_every_way_to_flip_signs():
    # 3, 1, 1 sum to 5; of the eight ways to sign them, +5 and -5 are as far from 0.
    assert flip_test(np.array([3, 1, 1])) == 2 / 8
    # 3 - 1 - 1 = 1: the others are 5, 3, 3 and the negatives, none of them nearer to 0.
    assert flip_test(np.array([3, -1, -1])) == 1
    assert flip_test(np.array([2, 2, -1])) == 4 / 8  # 3; of the eight, 5 and 3 and their negatives


def test_budgets_and_scores_between_those_that_were_tried():
    drops = {0.01: 0.2, 0.02: 0.6}
    assert budget_of_drop(drops, 0.1) == pytest.approx(0.005)
    assert budget_of_drop(drops, 0.4) == pytest.approx(0.015)
    assert budget_of_drop(drops, 0.0) == 0
    assert np.isnan(budget_of_drop(drops, 0.7))
    assert budget_of_drop({0.01: 0.3, 0.02: 0.2, 0.03: 0.5}, 0.4) == pytest.approx(0.025)  # the curve made to rise


def test_a_share_is_taken_where_single_models_lose_as_much():
    ear, eye = {0.01: 0.4, 0.02: 0.6}, {0.01: 0.1, 0.02: 0.2}  # 0.2 is lost at 0.005 of audio
    share, budgets = matched_share([ear, eye], [{0.01: 0.6, 0.02: 0.7}, {0.01: 0.05, 0.02: 0.1}], [0.02, 0.02])
    assert budgets == (0.005, 0.02) and share == pytest.approx(0.3 / (0.3 + 0.1))
    assert matched_share([ear, ear], [ear, eye], [0.01, 0.01]).budgets == (0.01, 0.01)
    assert np.isnan(matched_share([ear, {0.02: -0.1}], [ear, eye], [0.02, 0.02]).share)  # one loses nothing
    assert np.isnan(matched_share([ear, eye], [{0.02: 0.0}, {0.02: 0.0}], [0.02, 0.02]).share)


# Tables of synthetic results

SPECS = tiny_specs()
MODELS = {"ear": {"audio": SPECS["audio"]}, "eye": {"visual": SPECS["visual"]}, "both": SPECS}


def synthetic(scores, *, methods=("erm", "at"), epsilon="0.02", clips=100, right=None, latent=None):
    """Results whose `scores` are {(model, method, attacked, epsilon): Sampled}."""
    places = {(m, t, WORST if a else "clean", Where(a, e)): s for (m, t, a, e), s in scores.items()}
    hits = {key: {seed: np.ones(clips, dtype=bool) for seed in s.seeds} for key, s in places.items()}
    hits |= {(m, t, WORST if a else "clean", Where(a, e)): r for (m, t, a, e), r in (right or {}).items()}
    found = {("mAP", key): s for key, s in places.items()}
    made = Scores("quick", "mAP", clips, found, hits, tuple(f"clip {i}" for i in range(clips)), {}, 0.2)
    experiment = replace(
        parse_recipe({**GIVEN, "methods": dict.fromkeys(methods, "erm")}),
        models=MODELS, methods=methods, baseline="erm", reference="at", epsilon=epsilon,
    )  # fmt: skip
    costs = {(m, t): Cost(2, 100 * (1 + 7 * (t == "at")), 5, "cpu") for m, t in {key[:2] for key in scores}}
    return Results(experiment, {"quick": made}, costs, latent if latent is not None else pd.DataFrame(), {}, 1)


def tables_of(results):
    return Tables(results, results.scores["quick"])


def constant(value):
    return sampled(value, value)


def curve(model, method, attacked, clean, *robust, epsilons=("0.01", "0.02")):
    found = {(model, method, attacked, e): constant(r) for e, r in zip(epsilons, robust, strict=True)}
    return {(model, method, "", ""): constant(clean), **found}


def test_synergy_is_the_joint_drop_beyond_the_worse_of_the_single_ones():
    scores = {
        **curve("both", "erm", "audio", 0.9, 0.7, 0.5),
        **curve("both", "erm", "visual", 0.9, 0.8, 0.7),
        **curve("both", "erm", "audio+visual", 0.9, 0.4, 0.2),
    }
    tables = tables_of(synthetic(scores))
    (grid,) = vulnerability(tables)
    assert grid.body[0][-2] == ("+0.300", between(0.3, 0.3))  # 0.7 - 0.4
    assert grid.body[0][-1][0] == "2", "seeds"
    assert grid.body[0][3][0] == "-", "there are no models of one modality to match budgets by"


def test_vulnerability_is_told_at_budgets_that_cost_single_models_the_same():
    scores = {
        **curve("ear", "erm", "audio", 0.8, 0.4, 0.2),  # drops 0.4 at 0.01
        **curve("eye", "erm", "visual", 0.8, 0.6, 0.6),  # drops 0.2 at 0.02: matched by 0.005 of audio
        **curve("both", "erm", "audio", 0.9, 0.3, 0.2),  # at 0.005: half of 0.6
        **curve("both", "erm", "visual", 0.9, 0.85, 0.8),  # at 0.02: 0.1
        **curve("both", "erm", "audio+visual", 0.9, 0.2, 0.1),
    }
    tables = tables_of(synthetic(scores))
    (grid,) = vulnerability(tables)
    row = grid.body[0]
    assert row[4][0] == "audio 0.005, visual 0.02"
    assert row[3][0] == "0.750"  # 0.3 / (0.3 + 0.1)
    (told,) = [r for r in tables.rows if r["table"] == "vulnerability"]
    assert told["value"] == pytest.approx(0.75)


def scattered(*points, seeds=(0, 1)):
    return sampled(*points, noise=0.02, seeds=seeds, seed=int(1000 * sum(points)))


def test_vulnerability_keeps_to_the_seeds_that_all_conditions_have():
    """One condition of one seed was not valid."""
    full = {("ear", "erm", "audio"): (0.4, 0.2), ("eye", "erm", "visual"): (0.6, 0.5),
            ("both", "erm", "audio"): (0.3, 0.2), ("both", "erm", "visual"): (0.85, 0.8)}  # fmt: skip
    scores = {(m, t, "", ""): scattered(0.9, 0.8) for m, t, _ in full}
    for (m, t, attacked), robust in full.items():
        scores |= {(m, t, attacked, e): scattered(r, r - 0.1) for e, r in zip(("0.01", "0.02"), robust, strict=True)}
    broken = ("both", "erm", "audio", "0.01")
    for seeds, told in (((0, 1), "2"), ((1,), "1")):
        points = [scores[broken].points[seed] for seed in seeds]
        tables = tables_of(synthetic({**scores, broken: scattered(*points, seeds=seeds)}))
        (grid,) = vulnerability(tables)
        assert grid.body[0][-1][0] == told
        (row,) = [r for r in tables.rows if r["table"] == "vulnerability"]
        assert row["low"] < row["value"] < row["high"]
    without_it = {**scores, broken: scattered(0.3, seeds=(5,))}  # the smaller epsilon is of no use then
    (grid,) = vulnerability(tables_of(synthetic(without_it)))
    assert grid.body[0][-1][0] == "2"


def test_budgets_are_matched_anew_on_every_resample():
    """Where the single models' curves are all that is uncertain, the share is uncertain too."""
    scores = {
        **curve("ear", "erm", "audio", 0.8, 0.4, 0.2),
        **curve("eye", "erm", "visual", 0.8, 0.6, 0.6),
        **curve("both", "erm", "audio", 0.9, 0.3, 0.2),
        **curve("both", "erm", "visual", 0.9, 0.85, 0.8),
    }
    scores["ear", "erm", "audio", "0.01"] = sampled(0.4, 0.4, noise=0.05)
    tables = tables_of(synthetic(scores))
    list(vulnerability(tables))
    (told,) = [r for r in tables.rows if r["table"] == "vulnerability"]
    assert told["value"] == pytest.approx(0.75) and told["high"] - told["low"] > 0.03


def test_vulnerability_is_told_of_epsilons_that_differ_by_modality():
    """As above, with a quarter of the epsilon for audio."""
    levels = ("audio=0.0025,visual=0.01", "audio=0.005,visual=0.02")
    scores = {
        **curve("ear", "erm", "audio", 0.8, 0.4, 0.2, epsilons=levels),
        **curve("eye", "erm", "visual", 0.8, 0.6, 0.6, epsilons=levels),
        **curve("both", "erm", "audio", 0.9, 0.3, 0.2, epsilons=levels),
        **curve("both", "erm", "visual", 0.9, 0.85, 0.8, epsilons=levels),
        **curve("both", "erm", "audio+visual", 0.9, 0.2, 0.1, epsilons=levels),
    }
    (grid,) = vulnerability(tables_of(synthetic(scores, epsilon=levels[1])))
    assert grid.body[0][4][0] == "audio 0.0013, visual 0.02" and grid.body[0][3][0] == "0.750"


def test_ticks_have_an_epsilon_a_line_where_they_differ():
    levels = "audio=0.0025,visual=1/250"
    assert [_numbers(levels, parts) for parts in (["audio"], ["visual"], ["audio", "visual"])] == [
        "0.0025", "0.004", "0.0025\n0.004",
    ]  # fmt: skip
    assert _numbers("0.01", ["audio", "visual"]) == "0.01" and _numbers("snr=30dB", ["audio"]) == "snr=30dB"


def test_fused_models_are_held_against_the_model_of_what_is_attacked():
    scores = {
        **curve("ear", "erm", "audio", 0.7, 0.5, 0.2),
        **curve("eye", "erm", "visual", 0.6, 0.5, 0.4),
        **curve("both", "erm", "audio", 0.9, 0.6, 0.5),
        **curve("both", "erm", "visual", 0.9, 0.8, 0.7),
        **curve("both", "erm", "audio+visual", 0.9, 0.4, 0.1),
    }
    (grid,) = against_single(tables_of(synthetic(scores)))
    assert grid.head[2:] == ["clean", "audio", "visual", "both", "seeds"]
    (row,) = grid.body
    assert [text for text, _ in row[2:]] == ["+0.200", "+0.300", "+0.300", "-0.300", "2"]


def test_gaps_and_comparisons_leave_out_what_they_are_made_of():
    methods = ("erm", "at", "mix")
    scores = {
        key: s
        for m, r in (("erm", 0.1), ("at", 0.5), ("mix", 0.2))
        for key, s in curve("ear", m, "audio", 0.8, 0.6, r).items()
    }
    rng = np.random.default_rng(0)
    good, bad = np.ones(100, dtype=bool), rng.random(100) < 0.5
    place = ("audio", "0.02")
    right = {("ear", "erm", *place): {0: bad, 1: bad}, ("ear", "at", *place): {0: good, 1: good},
             ("ear", "mix", *place): {0: bad, 1: bad}}  # fmt: skip
    tables = tables_of(synthetic(scores, methods=methods, right=right))
    (grid,) = gaps(tables)
    assert [[cell[0] for cell in row] for row in grid.body] == [["ear", "mix", "0.250", "2", "0.12"]]
    (grid,) = comparisons(tables)
    rows = {tuple(cell[0] for cell in row[:3]): row[3:] for row in grid.body}
    assert set(rows) == {("ear", "at", "erm"), ("ear", "mix", "erm"), ("ear", "mix", "at")}
    assert "6 tests" in grid.title
    assert rows["ear", "at", "erm"][1][0] == "+0.400*"
    assert rows["ear", "mix", "erm"][1][0] == "+0.100"  # scores differ, hits do not
    told = {(r["method"], r["table"], r["attacked"]): r for r in tables.rows if "p" in r}
    assert told["at", "against erm", "audio"]["p"] == pytest.approx(flip_test(2 * (1 - bad.astype(int))))
    assert told["mix", "against erm", "audio"]["p"] == 1
    assert told["at", "against erm", "audio"]["p_holm"] / told["at", "against erm", "audio"]["p"] == pytest.approx(6)


def test_rows_say_how_many_seeds_they_rest_on():
    scores = {key: s for m, r in (("erm", 0.1), ("at", 0.5), ("mix", 0.2))
              for key, s in curve("ear", m, "audio", 0.8, 0.6, r).items()}  # fmt: skip
    scores["ear", "mix", "audio", "0.02"] = sampled(0.2)
    tables = tables_of(synthetic(scores, methods=("erm", "at", "mix")))
    grids = {table.__name__: next(iter(table(tables))) for table in (protection, gaps, comparisons, every_epsilon)}
    seeds = {
        name: {tuple(cell[0] for cell in row[: grid.words]): row[grid.head.index("seeds")][0] for row in grid.body}
        for name, grid in grids.items()
    }
    assert seeds["protection"] == {("ear", "erm"): "2", ("ear", "at"): "2", ("ear", "mix"): "1-2"}
    assert seeds["gaps"] == {("ear", "mix"): "1"}
    assert seeds["every_epsilon"] == {
        ("ear", "erm", "audio"): "2",
        ("ear", "at", "audio"): "2",
        ("ear", "mix", "audio"): "1-2",
    }
    assert seeds["comparisons"]["ear", "mix", "at"] == "1-2" and seeds["comparisons"]["ear", "at", "erm"] == "2"


def test_hits_under_each_attack_say_how_many_seeds_they_rest_on():
    results = synthetic(curve("ear", "erm", "audio", 0.8, 0.6, 0.5), methods=("erm",))
    first = results.scores["quick"]
    where = Where("audio", "0.02")
    hits = {("top1", ("ear", "erm", "pgd", where)): sampled(0.4), ("top1", ("ear", "erm", WORST, where)): constant(0.3)}
    scores = replace(first, found={**first.found, **hits}, hits={**first.hits, ("ear", "erm", "pgd", where): {}})
    results = replace(results, scores={"quick": scores})
    (grid,) = every_attack(
        tables_of(replace(results, experiment=replace(results.experiment, models={"ear": MODELS["ear"]})))
    )
    assert grid.head == ["model", "method", "pgd", WORST, "seeds"]
    assert [cell[0] for cell in grid.body[0]] == ["ear", "erm", "0.400", "0.300 ± 0.000", "1-2"]


def test_methods_look_different_and_lie_side_by_side():
    many = tuple(f"m{i}" for i in range(20))
    results = synthetic({}, methods=("erm", "at"))
    looks = _looks(replace(results, experiment=replace(results.experiment, methods=many)))
    assert len(set(looks.values())) == 20
    assert len({(look.colour, look.line) for look in looks.values()}) == 20
    places = apart({"a": 1.0, "b": 1.02, "c": 2.0})
    assert places["a"] < 1 < places["b"] and places["b"] / places["a"] > 1.04 and places["c"] == 2


def test_too_few_clips_have_no_intervals():
    (grid,) = gaps(tables_of(synthetic({k: s for m, r in (("erm", 0.1), ("at", 0.5), ("mix", 0.2))
                   for k, s in curve("ear", m, "audio", 0.8, 0.6, r).items()}, methods=("erm", "at", "mix"), clips=19)))  # fmt: skip
    assert grid.body[0][2] == ("0.250", "")


def test_latent_metrics_are_told_beside_their_change_from_the_baseline():
    place = {"metric": "relative density", "layer": "latent", "part": "fused", "space": "raw", "setting": "k=5"}
    values = {("erm", 0): 0.1, ("erm", 1): 0.3, ("at", 1): 0.8}
    latent = pd.DataFrame(
        [{**place, "model": "ear", "method": m, "seed": s, "value": v} for (m, s), v in values.items()]
    )
    other = latent.assign(setting="k=9", value=9.0)
    scores = {**curve("ear", "erm", "audio", 0.8, 0.6, 0.1), **curve("ear", "at", "audio", 0.8, 0.6, 0.5)}
    (grid,) = latents(tables_of(synthetic(scores, latent=pd.concat([latent, other]))))
    assert grid.head == ["model", "method", "relative density, latent", "seeds"]
    assert [row[2] for row in grid.body] == [("0.200", ""), ("0.800", "+0.500")]
    assert [row[3][0] for row in grid.body] == ["2", "1"]


def test_a_second_evaluation_is_read_on_the_clips_that_both_looked_at():
    scores = curve("ear", "erm", "audio", 0.8, 0.6, 0.5)
    results = synthetic(scores)
    first = results.scores["quick"]
    place = ("ear", "erm", WORST, Where("audio", "0.02"))
    held = np.arange(100) < 50
    first.hits[place].update({0: held, 1: held})
    other = Scores(
        "search", "top1", 3, {}, {place: {1: np.array([True, False, True])}}, ("clip 9", "clip 49", "clip 60"), {}, 0.2
    )
    tables = tables_of(replace(results, scores={"quick": first, "search": other}))
    (grid,) = second_opinions(tables)
    assert grid.body[0][4:] == [("0.667", ""), ("0.667", ""), ("0.333", ""), ("1", "")]
    assert "the 3 clips that search looked at too" in grid.title


def test_a_report_of_synthetic_results_says_what_is_missing():
    scores = {
        key: s for m, r in (("erm", 0.1), ("at", 0.5)) for key, s in curve("ear", m, "audio", 0.8, 0.6, r).items()
    }
    results = synthetic(scores)
    about = dict.fromkeys(("data", "attacks", "goal", "device", "run"), "x")
    results = replace(results, scores={"quick": replace(results.scores["quick"], about=about)}, missing=["a: training"])
    report = summarise("made up", results)
    assert report.title == "Experiment made up"
    assert any("not in these tables: a: training." in note for note in report.notes)


# The command


def test_the_command_runs_reports_and_goes_on(tiny, tmp_path, monkeypatch, capsys):
    import sys

    from robustav.cli import main as cli

    def invoke(*arguments):
        monkeypatch.setattr(sys, "argv", ["robustav", "experiment", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("run", tiny, "--only", "heard/erm/0", "--shard", "0/1")
    assert code == 0, err
    assert out.splitlines()[0] == "runs/tiny/report/report.md"
    assert "heard/erm/0: quick done" in err
    code, out, err = invoke("report", "runs/tiny", "--format", "csv")
    assert (code, out.startswith("table,model,method")) == (0, True)
    code, out, err = invoke("run", tiny, "--budget", "0")
    assert code == 0
    assert "14 of this process are left; the same command goes on with them" in err
    code, out, err = invoke("run", tiny, "--shard", "1/2", "--budget", "0")
    assert (code, out) == (0, "")
    assert "robustav experiment report runs/tiny" in err
    code, _, err = invoke("run", tiny, "--shard", "2/2")
    assert code == 2
    assert "must be I/N" in err
    monkeypatch.setattr(running, "train", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("bad luck")))
    code, _, err = invoke("run", tiny, "--only", "both/erm/0")
    assert code == 1
    assert "1 failed; the same command tries them again" in err
    assert "both/erm/0: training: RuntimeError: bad luck" in err
    code, _, err = invoke("report", tmp_path)
    assert (code, "is no experiment" in err) == (2, True)
