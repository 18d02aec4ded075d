"""Reports: every number recomputable from the ledger, and renderers that print what the table holds."""

import csv as csv_module
import io
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, Linear, TinySamples, tiny_fusion, tiny_specs
from rich.console import Console
from sklearn.metrics import average_precision_score, roc_auc_score
from test_harness import GOAL, Cheat, Mates, rows_for, run
from torch import nn

from robustav.attacks import FGSM, PGD, Noise
from robustav.classifier import Wrapped
from robustav.goals import Untargeted
from robustav.ledger import Ledger
from robustav.metrics.intervals import wilson
from robustav.plan import conditions
from robustav.report import FORMATS, build, print_terminal, worst_case
from robustav.report.figures import draw
from robustav.threat import parse_epsilons

ATTACKED = {"noise": Noise(), "fgsm": FGSM(), "pgd": PGD(steps=5)}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return run(
        tmp_path_factory.mktemp("run"), samples=TinySamples(30), rows=rows_for(ATTACKED, eps=["0.02,0.2"]), keep=1
    )


@pytest.fixture(scope="module")
def report(ledger):
    return build([ledger])


def one(report, condition, attacked="", level=-1):
    table = report.table
    rows = table[(table["condition"] == condition) & (table["attacked"] == attacked) & (table["level"] == level)]
    assert len(rows) == 1
    return rows.iloc[0]


def matrix(rows):
    labels = np.zeros((len(rows), 3), dtype=int)
    for i, classes in enumerate(rows["labels"]):
        labels[i, classes] = 1
    return np.stack(rows["logits"].to_list()), labels


def test_a_row_for_each_condition_and_a_worst_case_for_each_epsilon_and_set(report):
    assert len(report.table) == 1 + 2 * 3 * (3 + 1)
    assert report.table["condition"].iloc[0] == "clean"
    assert (report.table["clips"] == 30).all()
    assert not report.failed


@pytest.mark.parametrize(("condition", "attacked", "level", "key"), [
    ("clean", "", -1, "clean"), ("pgd", "audio+visual", 1, "pgd-audio+visual-1"), ("fgsm", "visual", 0, "fgsm-visual-0"),
])  # fmt: skip
def test_scores_follow_from_the_ledger(ledger, report, condition, attacked, level, key):
    rows = ledger.read(key)
    scores, labels = matrix(rows)
    row = one(report, condition, attacked, level)
    assert row["mAP"] == pytest.approx(np.mean([average_precision_score(labels[:, c], scores[:, c]) for c in range(3)]))
    assert row["AUC"] == pytest.approx(np.mean([roc_auc_score(labels[:, c], scores[:, c]) for c in range(3)]))
    hits = labels[np.arange(30), scores.argmax(1)]
    assert row["top1"] == pytest.approx(hits.mean())
    assert (row["top1_low"], row["top1_high"]) == pytest.approx(wilson(int(hits.sum()), 30))
    for score in ("mAP", "AUC", "d_prime"):
        assert row[f"{score}_low"] <= row[score] <= row[f"{score}_high"]


def test_success_counts_where_it_was_to_be_had(ledger, report):
    """Clips that the goal had reached already, on the clean input, are in neither count."""
    fair = ~ledger.read("clean")["reached"].to_numpy(bool)
    reached = ledger.read("pgd-audio-1")["reached"].to_numpy(bool)
    row = one(report, "pgd", "audio", 1)
    assert row["success_of"] == fair.sum() < 30
    assert row["success"] == pytest.approx((reached & fair).sum() / fair.sum())


def test_the_drop_is_paired(report):
    clean, row = one(report, "clean"), one(report, "noise", "visual", 0)
    assert row["drop"] == pytest.approx(clean["mAP"] - row["mAP"])
    unpaired = clean["mAP_high"] - clean["mAP_low"] + row["mAP_high"] - row["mAP_low"]
    assert row["drop_high"] - row["drop_low"] < unpaired / 2


def test_the_worst_case_is_taken_clip_by_clip_before_averaging(ledger, report):
    members = ["clean", "noise-audio-1", "fgsm-audio-1", "pgd-audio-1"]
    reached = np.any([ledger.read(key)["reached"].to_numpy(bool) for key in members], axis=0)
    fair = ~ledger.read("clean")["reached"].to_numpy(bool)
    assert one(report, "worst case", "audio", 1)["success"] == pytest.approx(reached[fair].mean())
    for level in (0, 1):
        joint = one(report, "worst case", "audio+visual", level)
        assert joint["forwards"] == 3 * (0 + 1 + 6), "attacks on one modality are candidates of the joint worst case"
        for attacked in ("audio", "visual"):
            assert joint["success"] >= one(report, "worst case", attacked, level)["success"]


def test_the_worse_row_reaches_the_goal_or_has_the_larger_loss():
    def frame(reached, loss):
        return pd.DataFrame(
            {
                "sample": ["a", "b", "c"],
                "reached": reached,
                "loss": loss,
                "forwards": 2,
                "backwards": 1,
                "violation": "",
            }
        )

    worst = worst_case([frame([False, True, False], [1.0, 1, 5]), frame([False, False, True], [2.0, 9, 1])])
    assert worst["loss"].tolist() == [2.0, 1.0, 1.0]
    assert worst["reached"].tolist() == [False, True, True]
    assert worst["forwards"].tolist() == [4, 4, 4]


def test_sizes_and_passes_are_in_the_table(report):
    row = one(report, "pgd", "audio", 1)
    assert row["max_abs_audio"] == pytest.approx(0.2, rel=1e-3)
    assert row["max_abs_visual"] == 0
    assert (row["forwards"], row["backwards"]) == (6, 5)
    assert row["seconds"] > 0
    assert np.isfinite(row["snr_db_audio"])


def test_the_header_says_what_was_run(report):
    header = next(iter(report.headers.values()))
    assert "0.02 amplitude" in header["threat"]
    assert "0.2 pixel value" in header["threat"]
    assert "top-1 hit lost" in header["goal"]
    assert "30 of 30 clips" in header["data"]
    assert "seed 0" in header["run"]
    assert header["audit"] == "passed"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_number(report, name):
    text = FORMATS[name](report)
    value = one(report, "pgd", "audio+visual", 1)["mAP"]
    assert (f"{value:.3f}" if name in ("md", "tex") else str(value)) in text


def test_csv_and_json_are_read_back(report):
    rows = list(csv_module.DictReader(io.StringIO(FORMATS["csv"](report))))
    whole = json.loads(FORMATS["json"](report), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(rows) == len(whole["rows"]) == len(report.table)
    assert whole["audit"] == "passed"
    assert whole["rows"][0]["drop"] is None
    assert float(rows[3]["mAP"]) == whole["rows"][3]["mAP"] == report.table["mAP"].iloc[3]


def test_markdown_tables_have_one_width(report):
    lines = [line for line in FORMATS["md"](report).splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


def test_latex_compiles_in_spirit(report):
    text = "\n".join(line for line in FORMATS["tex"](report).splitlines() if not line.startswith("%"))
    assert text.count(r"\\") == len(report.table) + 1
    assert text.count("{") == text.count("}")
    assert "_" not in text.replace(r"\_", "")


def test_the_terminal_table_fits_and_says_everything(report):
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    print_terminal(report, console)
    text = console.export_text()
    for word in ("clean", "worst case", "both", "mAP", "Wilson", "audit", "bwd"):
        assert word in text


def test_a_row_that_fails_the_audit_is_no_number(tmp_path):
    attacks = {"fgsm": FGSM(), "cheat": Cheat("over budget")}
    cheated = build([run(tmp_path, rows=rows_for(attacks, attacked=[("audio",)]))])
    assert cheated.failed
    assert any(
        note.startswith("AUDIT: cheat on audio is not valid: 10 of 10 clips, such as clip 0: audio: length over")
        for note in cheated.notes
    )
    row = next(line for line in FORMATS["md"](cheated).splitlines() if line.startswith("| cheat"))
    assert row.count("not valid") == 8
    rows = json.loads(FORMATS["json"](cheated))["rows"]
    assert [r["mAP"] is None for r in rows] == [False, False, True, True]
    assert [r["valid"] for r in rows] == [True, True, False, False], (
        "a worst case over an invalid row is not valid either"
    )


def test_an_attack_weaker_than_noise_is_pointed_out(tmp_path):
    """C.6: same-budget noise is the control that every attack must beat."""
    rows = rows_for({"noise": Noise(), "pgd": PGD(steps=1, relative_step=1e-6, random_start=False)}, eps=["2.0"])
    report = build([run(tmp_path, samples=TinySamples(30), rows=rows)])
    found = report.flags[report.flags["name"] == "NOISE-WINS"]
    assert "pgd-audio+visual-0" in set(found["condition"])
    assert "FLAG NOISE-WINS: " in FORMATS["md"](report)
    assert "NOISE-WINS" in {flag["name"] for flag in json.loads(FORMATS["json"](report))["flags"]}


def test_skipped_and_unlabelled_clips_are_reported(tmp_path):
    class Unlabelled(TinySamples):
        unknown_labels = {"Whistle": ["clip 1"]}

        def load(self, index):
            return super().load(index)._replace(labels=None)

    report = build(
        [run(tmp_path, samples=Unlabelled(12, broken={"clip 3": "silent"}), rows=rows_for({"fgsm": FGSM()}))]
    )
    assert report.skipped.to_dict("records") == [{"run": "LateFusion", "sample": "clip 3", "reason": "silent"}]
    notes = " ".join(report.notes)
    assert "11 of 11 clips have no usable label" in notes
    assert "Label 'Whistle' (1 clip) is no class of the model" in notes
    assert "Fewer than 20 clips: no bootstrap intervals" in notes
    assert "silent" in FORMATS["md"](report)
    assert np.isnan(one(report, "clean")["mAP_low"])


def test_a_run_without_a_usable_clip_is_an_empty_report(tmp_path):
    samples = TinySamples(2, broken={"clip 0": "silent", "clip 1": "no audio track"})
    report = build([run(tmp_path, samples=samples, rows=rows_for({"fgsm": FGSM()}))])
    assert report.table.empty
    assert len(report.skipped) == 2
    for render in FORMATS.values():
        assert render(report)
    print_terminal(report, Console(file=io.StringIO()))


def test_multiclass_reports_the_drop_of_top1(tmp_path):
    goal = Untargeted("multiclass")
    samples, rows = TinySamples(30, "multiclass"), rows_for({"pgd": PGD(3)}, goal=goal)
    report = build([run(tmp_path, tiny_fusion("multiclass"), samples, rows, goal)])
    clean, row = one(report, "clean"), one(report, "pgd", "audio+visual", 0)
    assert row["drop"] == pytest.approx(clean["top1"] - row["top1"])
    assert row["drop_low"] <= row["drop"] <= row["drop_high"]


def test_several_runs_stand_in_one_table_each_under_its_own_name_and_epsilon(ledger, tmp_path):
    other = run(tmp_path, samples=TinySamples(20), rows=rows_for({"fgsm": FGSM()}, eps=["0.3"]))
    both = build([ledger, other])
    assert len(both.table) == len(build([ledger]).table) + len(build([other]).table)
    assert both.table.groupby("run")["clips"].unique().map(list).tolist() in ([[30], [20]], [[20], [30]])
    assert set(both.headers) == set(both.table["run"]) == {f"LateFusion ({r.folder})" for r in (ledger, other)}
    whole = json.loads(FORMATS["json"](both))
    assert [run["data"].split(", ")[-1] for run in whole["runs"].values()] == ["30 of 30 clips", "20 of 20 clips"]
    for row in FORMATS["md"](both).splitlines():
        if row.startswith(f"| LateFusion ({other.folder}) | fgsm | both"):
            assert "0.3 pixel value" in row
            break
    else:
        pytest.fail("the other run's row is not there with its budget")
    console = Console(width=150, record=True, file=io.StringIO(), force_terminal=True)
    print_terminal(both, console)
    text = console.export_text()
    assert text.count("audit") == 2
    assert text.index("epsilon: audio linf, 0.2") < text.rindex("audit"), "each run's tables stand under its header"
    with pytest.raises(ValueError, match="the same run is named twice"):
        build([ledger, ledger])
    other.part("fgsm-audio-0", 0).unlink()
    rest = build([ledger, other])
    assert any(note.startswith("WARNING") and "is left out" in note for note in rest.notes)
    assert set(rest.headers) == {f"LateFusion ({ledger.folder})"}


def test_probabilities_in_place_of_logits_are_pointed_out(tmp_path):
    model = tiny_fusion()
    head = model.head
    model.head = nn.Sequential(head, nn.Sigmoid())
    ledger = run(tmp_path, model, TinySamples(30), rows_for({"fgsm": FGSM()}), probed=16)
    assert "PROBABILITIES" in set(build([ledger]).flags["name"])
    assert "PROBABILITIES" in {flag[0] for flag in json.loads((tmp_path / "flags.json").read_text())}
    assert not any("was not looked at" in note for note in build([ledger]).notes)
    (tmp_path / "flags.json").unlink()
    assert any("The model itself was not looked at" in note for note in build([ledger]).notes)


def test_a_ranking_loss_under_a_top1_rule_is_pointed_out(tmp_path):
    goal = Untargeted(loss_name="ranking")
    notes = build([run(tmp_path, rows=rows_for({"fgsm": FGSM()}, goal=goal), goal=goal)]).notes
    assert any("climb bce or top1 instead" in note for note in notes)


def test_a_blind_attack_is_pointed_out(tmp_path):
    model = tiny_fusion()
    model.encoders["audio"].register_forward_hook(lambda module, given, out: out.detach())
    flags = build([run(tmp_path, model, rows=rows_for({"fgsm": FGSM()}))]).flags
    blind = flags[(flags["name"] == "ZERO-GRAD") & (flags["condition"] == "fgsm-audio-0")]
    assert "100 % of its gradients by audio were exactly zero" in blind["sentence"].item()


def test_clips_of_no_class_have_no_hit_to_lose(tmp_path):
    class Empty(TinySamples):
        def load(self, index):
            sample = super().load(index)
            return sample if index % 2 else sample._replace(labels=torch.zeros(3))

    ledger = run(tmp_path, samples=Empty(40), rows=rows_for({"fgsm": FGSM()}))
    report = build([ledger])
    scores, labels = matrix(ledger.read("clean"))
    row = one(report, "clean")
    assert row["top1_of"] == 20
    assert row["top1"] == pytest.approx(labels[np.arange(40), scores.argmax(1)][1::2].mean())
    assert any("20 clips are labelled with no class" in note for note in report.notes)


def test_nothing_is_valid_where_the_clean_row_is_not(tmp_path):
    model = Wrapped(Mates(), specs=tiny_specs(), classes=CLASSES, label_kind="multilabel")
    ledger = run(tmp_path, model, rows=rows_for({"noise": Noise()}))
    assert (build([ledger]).table["violations"] > 0).all()


def test_an_unfinished_run_says_so(tmp_path):
    ledger = run(tmp_path, rows=rows_for({"fgsm": FGSM()}))
    ledger.part("fgsm-audio-0", 0).unlink()
    with pytest.raises(FileNotFoundError, match="holds no rows of 'fgsm-audio-0'"):
        build([ledger])
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no run.json"):
        build([Ledger(tmp_path / "elsewhere")])


def test_figures_are_drawn_for_curves_dots_and_examples(ledger, report, tmp_path):
    files = draw(report, [ledger], tmp_path)
    names = {file.name for file in files}
    assert {"mAP.png", "top1.png"} < names
    assert sum(name.startswith("pgd-audio+visual-1-clip_0") for name in names) == 1
    assert not any(name.startswith("noise") for name in names)
    single = run(tmp_path / "single", rows=rows_for({"fgsm": FGSM()}))
    assert len(draw(build([single]), [single], tmp_path / "dots")) == 2
    falling = run(tmp_path / "falling", rows=rows_for({"fgsm": FGSM()}, eps=["0.2,0.02"]))
    assert len(draw(build([falling]), [falling], tmp_path / "curves")) == 2
    assert all(file.stat().st_size > 5000 for file in files)
    assert tiny_specs().keys() == {"audio", "visual"}


def test_what_hides_labels_shows_in_the_hide_rate_and_not_in_map(tmp_path):
    """All scores of a class sink together: ranks stay, and a detector is silent."""

    @dataclass(frozen=True)
    class Quiet:
        def __call__(self, model, inputs, labels, threat, *, draws):
            return threat.project(inputs, {m: x - 0.5 for m, x in inputs.items()})

    specs = {"audio": tiny_specs()["audio"]}

    class Louder(Linear):
        def encode(self, modality, x):
            return x.mean(1, keepdim=True) * 10 + torch.tensor([0.0, 1.0, 2.0])

    class Ramp(TinySamples):
        def load(self, index):
            sample = super().load(index)
            level = torch.full((64,), 0.02 * index - 0.2)
            return sample._replace(inputs={"audio": level}, labels=(torch.arange(3) < index / 10).float())

    model = Louder(specs, 3)
    model.classes = CLASSES
    rows = conditions({"quiet": Quiet()}, parse_epsilons(["0.3"], specs), GOAL)
    report = build([run(tmp_path, model, Ramp(30), rows)])
    before, after = one(report, "clean"), one(report, "quiet", "audio", 0)
    assert after["mAP"] == pytest.approx(before["mAP"])
    assert after["hidden"] > 0.3
    assert after["hidden_low"] <= after["hidden"] <= after["hidden_high"]
    assert after["LRAP"] == pytest.approx(before["LRAP"])
    assert pd.isna(before["hidden"])
