"""Whether metrics predict robustness: planted relations are found, chance is not, and runs are held to their own clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TinySamples, tiny_fusion
from typer.testing import CliRunner

import robustav.geometry.survey as survey_module
from robustav.attacks import PGD, Noise
from robustav.cli.main import app
from robustav.geometry.convexity import Segments
from robustav.geometry.joining import Joined, join
from robustav.geometry.latents import Latents
from robustav.geometry.measure import Measure
from robustav.geometry.survey import Survey, View
from robustav.geometry.targets import ClassScores, Measured
from robustav.geometry.validation import validate
from robustav.goals import Untargeted
from robustav.harness import evaluate
from robustav.plan import conditions
from robustav.reader import Reader
from robustav.report.grids import FORMATS
from robustav.report.validation import validation_report
from robustav.study import Wanted, validate_runs
from robustav.threat import parse_epsilons

CLASSES = tuple(f"class {i:02}" for i in range(24))
RESAMPLES = 200


def scores(values, noise, draw):
    return ClassScores(values, values + noise * draw.normal(size=(RESAMPLES, len(values))))


def measure(metric, values, draw, noise=0.05, layer="latent", setting=""):
    found = scores(values, noise, draw)
    counts = np.full(len(values), 50)
    return Measure(metric, layer, "", "", setting, CLASSES, found.values, found.resampled, counts, counts)


def joined(seed, *, same=False, name="model"):
    """A run whose robustness follows the metric "planted"; "through clean" is the clean score in other words."""
    draw = np.random.default_rng(seed)
    clean, planted, chance = draw.normal(size=(3, len(CLASSES)))
    robust = clean + planted
    found = Measured(
        scores(robust, 0.05, draw), scores(-robust, 0.05, draw), scores(clean, 0.05, draw),
        scores(draw.normal(size=24), 0.05, draw), scores(draw.normal(size=24), 0.05, draw), 500, 0, 4,
    )  # fmt: skip
    measures = [
        measure("clean score", clean, draw, layer="logits"),
        measure("planted", planted, draw),
        measure("planted", chance, draw, layer="input"),
        measure("through clean", np.exp(clean + 0.5 * draw.normal(size=24)), draw),
        measure("chance", chance, draw),
        measure("chance", np.where(np.arange(24) < 3, np.nan, chance), draw, layer="features"),
    ]
    return Joined(name, view_of(CLASSES), found, measures, "audio", same, "untargeted", "threat")


def view_of(classes):
    """As much of a survey as a validation looks at."""
    labels, clips = torch.ones(500, len(classes), dtype=torch.bool), tuple(map(str, range(500)))
    latents = Latents(clips, labels, labels[:, 0], labels.float(), {}, classes, "multilabel", {})
    model, samples = tiny_fusion(), TinySamples()
    reader = Reader(model, samples, Untargeted(), 8, torch.device("cpu"))
    return View(Survey(resamples=RESAMPLES), model, samples, reader, [], latents, {"model": "tiny"}, (0,))


def row(found, metric, where="latent"):
    (one,) = found.table.query("metric == @metric and where == @where").to_dict("records")
    return one


def test_a_planted_relation_is_found_and_one_through_the_clean_score_is_not():
    found = validate([joined(0)], target="ap", seed=0)
    planted = row(found, "planted")
    assert planted["partial"] > 0.7
    assert planted["predicts"]
    assert planted["verdict"] == "predicts: the higher the metric, the higher the target"
    assert planted["partial_p_holm"] < 0.05
    through = row(found, "through clean")
    assert through["rho"] > 0.4
    assert not through["predicts"]
    assert not row(found, "chance")["predicts"]
    assert row(found, "chance")["verdict"] == "not shown to predict"


def test_what_a_control_says_already_has_no_partial_coefficient():
    run = joined(0)
    same = measure("clean again", run.measured.clean.values, np.random.default_rng(1))
    again = Joined("model", run.view, run.measured, [*run.measures, same], "audio", False, "untargeted", "threat")
    found = row(validate([again], target="ap", seed=0), "clean again")
    assert np.isnan(found["partial"])
    assert np.isnan(found["partial_low"])
    assert not found["predicts"]


def test_intervals_hold_the_coefficient_and_stay_within_its_range():
    table = validate([joined(0)], target="ap", seed=0).table
    for name in ("rho", "partial"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
        assert table[[f"{name}_low", f"{name}_high"]].abs().max().max() <= 1


def test_a_baseline_is_not_given_itself_and_takes_no_part_in_holms_adjustment():
    found = validate([joined(0)], target="ap", seed=0)
    clean = row(found, "clean score", "logits")
    assert abs(clean["partial"]) > 0.3  # given itself, nothing would be left
    assert np.isnan(clean["partial_p_holm"])
    tried = found.table["partial_p_holm"].notna()
    assert tried.sum() == 5
    smallest = found.table.loc[tried, "partial_p"].min()
    assert found.table.loc[tried, "partial_p_holm"].min() == pytest.approx(min(5 * smallest, 1))


def test_what_excludes_zero_but_not_after_holm_says_so():
    found = validate([joined(seed) for seed in (5,)], target="ap", seed=0).table
    doubtful = found[found["predicts"] & (found["partial_p_holm"] >= 0.05)]
    assert all("not after Holm" in words for words in doubtful["verdict"])
    firm = found[found["predicts"] & (found["partial_p_holm"] < 0.05)]
    assert not any("Holm" in words for words in firm["verdict"])


def test_the_choice_of_a_variant_is_judged_on_the_other_half():
    found = validate([joined(0)], target="ap", seed=0).held_out.set_index("metric")
    assert found.loc["planted", "held_out"] > 0.4
    assert found.loc["planted", "chosen_most"].startswith("planted at latent")
    assert "chance" not in found.index  # one of its variants lacks classes: a single one is no choice


def test_several_models_are_averaged_within_and_compared_across():
    found = validate([joined(seed, name=f"model {seed}") for seed in range(3)], target="ap", seed=0)
    assert row(found, "planted")["models"] == 3
    assert set(found.across["models"]) == {3}
    assert found.across["p"].between(0, 1).all()
    assert list(dict.fromkeys(found.classes["model"])) == ["model 0", "model 1", "model 2"]
    assert len(found.classes) == 72


def test_models_are_compared_only_under_one_threat_and_by_what_has_no_scale():
    runs = [joined(seed, name=f"model {seed}") for seed in range(4)]
    runs[3] = replace(runs[3], threat="another")
    for run in runs:
        run.measures.append(measure("entropy", np.arange(24.0), np.random.default_rng(0)))
    found = validate(runs, target="ap", seed=0)
    assert set(found.across["models"]) == {3}
    assert "entropy" not in set(found.across["metric"])
    assert "entropy" in set(found.table["metric"])
    apart = [replace(run, threat=str(i)) for i, run in enumerate(runs)]
    assert validate(apart, target="ap", seed=0).across.empty


def test_without_a_permutation_there_is_no_unqualified_verdict():
    one, other = joined(0, name="a"), joined(1, name="b")
    for run, lacking in ((one, slice(0, 12)), (other, slice(12, 24))):
        values = run.measured.robust.values.copy()
        values[lacking] = np.nan
        run.measures.append(measure("half", values, np.random.default_rng(0)))
    found = row(validate([one, other], target="ap", seed=0), "half")
    assert np.isnan(found["partial_p"])
    assert not found["predicts"] or "not after Holm" in found["verdict"]


def test_models_that_share_a_name_are_told_apart():
    assert validate([joined(0), joined(1)], target="ap", seed=0).models == ("model 1", "model 2")


def test_a_metric_that_one_model_lacks_is_judged_on_the_others():
    lacking = joined(1)
    without = Joined(
        "b", lacking.view, lacking.measured, lacking.measures[:1] + lacking.measures[2:], "audio", False, "", ""
    )
    found = validate([joined(0), without], target="ap", seed=0)
    assert row(found, "planted")["models"] == 1
    assert np.isfinite(row(found, "planted")["partial_p"])


def test_models_of_other_classes_are_refused():
    other = joined(1)
    view = view_of(CLASSES[::-1])
    with pytest.raises(ValueError, match="the same classes, but those of b differ"):
        validate(
            [joined(0, name="a"), Joined("b", view, other.measured, other.measures, "audio", False, "", "")],
            target="ap",
            seed=0,
        )


def test_the_report_says_what_was_not_shown_and_warns_of_shared_clips():
    for same in (False, True):
        runs = [joined(0, same=same)]
        report = validation_report(runs, validate(runs, target="ap", seed=0))
        text = FORMATS["md"](report)
        assert "not shown to predict" in text
        assert ("WARNING: metric and target are measured on the same clips" in text) == same
        assert "across models nothing can be claimed" in text
        for render in FORMATS.values():
            assert "planted" in render(report)


def test_the_terminal_gets_the_headlines_and_the_kept_formats_everything():
    run = joined(0)
    draw = np.random.default_rng(0)
    run.measures.extend(measure(name, draw.normal(size=24), draw) for name in ("relative density", "entropy"))
    report = validation_report([run], validate([run], target="ap", seed=0))
    brief = {row[0][0] for grid in report.grids if grid.brief and grid.title == "metrics" for row in grid.body}
    assert brief == {"relative density"}
    assert "entropy" in FORMATS["md"](report)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A run on 24 of 60 clips, found again by the survey."""
    samples, model = TinySamples(60), tiny_fusion()
    rows = conditions({"noise": Noise(), "pgd": PGD(steps=3)}, parse_epsilons(["0.02,0.1"], model.specs), Untargeted())
    ledger = evaluate(model, samples, rows, Untargeted(), tmp_path / "run", limit=24)
    monkeypatch.setattr(survey_module, "load_samples", lambda *_: (samples, None))
    return ledger, model


def no_metrics(view, progress):
    return []


def test_metrics_are_measured_on_clips_that_the_run_did_not_attack(tiny):
    ledger, model = tiny
    attacked = set(ledger.read("clean")["sample"])
    found = join(ledger, no_metrics, Survey(resamples=50), targets=["hit"], model=model)["hit"]
    assert not found.same_clips
    assert len(found.view.latents) == 36
    assert not attacked & set(found.view.latents.ids)
    assert found.measured.clips == 24
    assert found.attacked == "audio+visual"
    assert {m.metric for m in found.measures} >= {"clean score", "logit margin", "first-order margin", "noise score x1"}


def test_the_same_clips_share_their_resamples(tiny):
    ledger, model = tiny
    found = join(
        ledger, no_metrics, Survey(resamples=50), targets=["hit"], model=model, clips="same", attacked="audio"
    )["hit"]
    assert list(found.view.latents.ids) == list(ledger.read("clean")["sample"])
    (clean,) = (m for m in found.measures if m.metric == "clean score")
    np.testing.assert_array_equal(clean.values, found.measured.clean.values)
    np.testing.assert_array_equal(clean.resampled, found.measured.clean.resampled)
    (margin,) = (m for m in found.measures if m.metric == "logit margin")
    np.testing.assert_allclose(margin.values, found.measured.margin.values, rtol=1e-4)


def test_other_weights_are_refused(tiny):
    ledger, _ = tiny
    other = tiny_fusion()
    other.head.weight.data += 1
    with pytest.raises(ValueError, match="made with other weights"):
        join(ledger, no_metrics, Survey(resamples=50), targets=["hit"], model=other)


def test_other_data_are_refused(tiny, monkeypatch):
    ledger, model = tiny
    monkeypatch.setattr(survey_module, "load_samples", lambda *_: (TinySamples(61), None))
    with pytest.raises(ValueError, match=r"data of .* are not those found now"):
        join(ledger, no_metrics, Survey(resamples=50), targets=["hit"], model=model)


def test_unknown_targets_and_clips_are_refused(tiny):
    ledger, model = tiny
    with pytest.raises(ValueError, match="no target 'map': there are ap, hit, kept"):
        validate_runs([ledger.folder], Survey(resamples=50), Wanted(), targets=["map"], model=model)
    with pytest.raises(ValueError, match="`clips` must be one of auto, other, same, got 'none'"):
        validate_runs([ledger.folder], Survey(resamples=50), Wanted(), clips="none", model=model)


def test_one_model_is_no_two_models(tiny):
    ledger, model = tiny
    with pytest.raises(ValueError, match="is of a model that another run is of already"):
        validate_runs([ledger.folder, ledger.folder], Survey(resamples=50), Wanted(), model=model)


def test_from_run_to_report_and_figures(tiny, tmp_path):
    ledger, model = tiny
    wanted = Wanted(ks=(2,), spaces=("raw",), segments=Segments(pairs=10, k=2))
    survey = Survey(resamples=50, layers=("features", "latent"))
    found = validate_runs([ledger.folder], survey, wanted, model=model, targets=["kept"])["kept"]
    files = found.save(tmp_path / "out")
    assert {file.suffix for file in files} == {".md", ".tex", ".csv", ".json", ".png"}
    assert all(file.stat().st_size > 300 for file in files)
    assert "relative density" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_finds_model_and_data_of_the_run(tmp_path):
    runner = CliRunner()
    attack = [
        "attack",
        "--model",
        "visual-cnn",
        "--limit",
        "20",
        "--attacks",
        "fgsm",
        "--eps",
        "0.01",
        "--out",
        str(tmp_path / "run"),
    ]
    assert runner.invoke(app, attack).exit_code == 0
    command = [
        "metrics",
        "validate",
        str(tmp_path / "run"),
        "--layers",
        "latent",
        "--k",
        "2",
        "--pairs",
        "20",
        "--resamples",
        "50",
    ]
    result = runner.invoke(app, [*command, "--spaces", "raw", "--format", "md"])
    assert result.exit_code == 0, result.output
    assert "relative density" in result.stdout
    assert "20 clips attacked, metrics on 980 others" in result.stdout
