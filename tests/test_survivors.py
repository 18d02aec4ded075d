"""Attacks run on what cheaper ones left, transfer from a second model, and smallest budgets."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinySamples, batch_of, tiny_fusion, tiny_specs

from robustav.attacks import EOT, FGSM, PGD, Noise
from robustav.attacks.ascent import look
from robustav.attacks.universal import Universal
from robustav.classifier import LateFusion
from robustav.evaluation import Evaluation
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.ledger import digest_of_model
from robustav.plan import CLEAN, Member, Source, conditions, within
from robustav.report import as_json, build, markdown
from robustav.report.smallest import median_interval
from robustav.threat import Budget, ThreatModel, parse_epsilons

SPECS = tiny_specs()
COSTS = ["forwards", "backwards", "seconds", "zero_gradients"]


@dataclass(frozen=True)
class Search:
    """PGD that only looks for a success, and remembers whom it was given."""

    steps: int = 6
    survivors: ClassVar[bool] = True
    given: ClassVar[list[int]] = []

    def __call__(self, model, inputs, labels, threat, *, draws):
        self.given.append(len(labels))
        return PGD(self.steps)(model, inputs, labels, threat, draws=draws)


@dataclass(frozen=True)
class Bisection:
    """The smallest multiple of the budget at which FGSM breaks a clip, to a factor of 1.1."""

    def smallest(self, model, inputs, labels, threat, *, draws):
        best = {m: inputs[m].clone() for m in threat.budgets}
        open_ = ~look(model, inputs, labels, threat).reached
        for power in range(-40, 80):
            grown = threat.scaled(1.1**power)
            moved = FGSM()(model, inputs, labels, grown, draws=draws)
            now = look(model, moved, labels, grown).reached & open_
            for m, x in best.items():
                x[now] = moved[m][now]
            open_ &= ~now
        return best

    def __call__(self, model, inputs, labels, threat, *, draws):
        raise NotImplementedError


def evaluated(out, members, eps=("0.05",), score="mAP", label_kind="multilabel", attacked=None, model=None, **settings):
    goal = Untargeted(label_kind)
    rows = conditions(members, parse_epsilons(list(eps), SPECS), goal, attacked, score)
    samples = TinySamples(44, label_kind)
    made = Settings(device="cpu", batch_size=8, probed=0, **settings)
    return evaluate(model or tiny_fusion(label_kind), samples, rows, goal, out, settings=made)


ATTACKS = {"noise": Noise(), "fgsm": FGSM(), "pgd": PGD(4), "search": Search(), "last": Search(9)}


@pytest.mark.parametrize(
    ("score", "label_kind"), [("mAP", "multilabel"), ("hits", "multilabel"), ("hits", "multiclass")]
)
def test_sparing_broken_clips_changes_no_reported_number(tmp_path, score, label_kind):
    options = {"eps": ["0.02", "0.05", "0.1"], "score": score, "label_kind": label_kind}
    Search.given.clear()
    spared = build([evaluated(tmp_path / "spared", ATTACKS, **options)])
    few = sum(Search.given)
    Search.given.clear()
    whole = build([evaluated(tmp_path / "whole", ATTACKS, spare=False, **options)])
    assert few < sum(Search.given) == 44 * 2 * 9
    left, right = (report.table.drop(columns=COSTS) for report in (spared, whole))
    pd.testing.assert_frame_equal(left, right, rtol=1e-5, atol=1e-6)
    worst = left[left["condition"] == "worst case"]["success"]
    assert 0 < worst.min() < 1  # something is broken, and something is left


def test_under_map_every_ascent_sees_every_clip_and_a_search_only_what_is_left(tmp_path):
    Search.given.clear()
    ledger = evaluated(tmp_path, ATTACKS, attacked=[("audio",)], eps=["0.05"])
    for name in ("noise", "fgsm", "pgd"):
        assert (ledger.read(f"{name}-audio-0")["settled"] == "").all()
    clean, fgsm, pgd = (ledger.read(key).set_index("sample") for key in ("clean", "fgsm-audio-0", "pgd-audio-0"))
    search = ledger.read("search-audio-0").set_index("sample")
    broken = clean["reached"] | fgsm["reached"] | pgd["reached"]
    assert 0 < broken.sum() < 44
    assert ((search["settled"] != "") == broken).all()
    assert Search.given[: -(-(~broken).sum() // 8)] and sum(Search.given) >= (~broken).sum()
    assert (search.loc[broken, ["forwards", "backwards"]] == 0).all(axis=None)
    # A clip stands as the first condition left it that broke it.
    for name, row in search[broken].iterrows():
        first = (
            "clean" if clean.loc[name, "reached"] else "fgsm-audio-0" if fgsm.loc[name, "reached"] else "pgd-audio-0"
        )
        assert row["settled"] == first
        np.testing.assert_array_equal(row["logits"], ledger.read(first).set_index("sample").loc[name, "logits"])


def test_under_hits_a_larger_epsilon_spares_what_a_smaller_one_broke(tmp_path):
    ledger = evaluated(tmp_path, {"pgd": PGD(4)}, score="hits", eps=["0.03", "0.08"], attacked=[("audio",)])
    small, large = (ledger.read(f"pgd-audio-{level}").set_index("sample") for level in (0, 1))
    assert (large["reached"] | ~small["reached"]).all()  # monotone by construction
    again = small["reached"] & (large["settled"] == "pgd-audio-0")
    assert again.sum() + (large["settled"] == "clean").sum() == small["reached"].sum() > 0
    assert set(large["condition"]) == {"pgd-audio-1"}, "a row is of the condition that it stands under"


def test_epsilons_that_do_not_contain_each_other_settle_nothing():
    rows = conditions({"pgd": PGD(4)}, parse_epsilons(["0.5", "0.1"], SPECS), Untargeted(), [("audio",)], "hits")
    assert [row.after for row in rows] == [(), ("clean",), ("clean",)]
    audio, both = ThreatModel({"audio": Budget("linf", 0.1)}), {m: Budget("linf", 0.2) for m in ("audio", "visual")}
    assert within(audio, ThreatModel(both))
    assert not within(ThreatModel(both), audio)
    assert not within(ThreatModel({"audio": Budget("l2", 0.1)}), ThreatModel(both))
    decibels = [ThreatModel({"audio": Budget("l2", snr_db=ratio)}) for ratio in (30.0, 20.0)]
    assert within(*decibels)
    assert not within(*reversed(decibels))


def test_noise_is_a_control_and_settles_nothing():
    rows = conditions(ATTACKS, parse_epsilons(["0.1"], SPECS), Untargeted(), [("audio",)], "hits")
    assert not any("noise" in key for row in rows for key in row.after)
    assert next(row for row in rows if row.name == "noise").after == ()


def test_what_is_no_score_where_clips_were_spared_is_left_out(tmp_path):
    made = build([evaluated(tmp_path, ATTACKS, attacked=[("audio",)], eps=["0.05"])])
    table = made.table.set_index("condition")
    assert table.loc[["search", "last"], ["mAP", "AUC", "d_prime", "drop"]].isna().all(axis=None)
    assert table.loc["worst case", ["mAP", "top1", "success"]].notna().all()
    assert table.loc["search", "success"] >= table.loc["pgd", "success"]
    assert table.loc["search", "top1"] == pytest.approx(1 - (1 - table.loc["clean", "top1"]) - (
        table.loc["search", "success"] * table.loc["clean", "top1"]), abs=1e-9)  # fmt: skip
    assert "| + search |" in markdown(made)
    assert "| worst case |" in markdown(made)


@pytest.mark.parametrize(("score", "printed"), [("mAP", True), ("hits", False)])
def test_the_worst_case_has_an_map_only_where_every_ascent_saw_every_clip(tmp_path, score, printed):
    goal = Untargeted()
    rows = conditions({"pgd": PGD(2), "search": Search()}, parse_epsilons(["0.05"], SPECS), goal, [("audio",)], score)
    universal = Universal({"audio": torch.full((64,), 0.05)})
    rows.append(replace(CLEAN, name="universal", attacked=("audio",), attack=universal, threat=rows[1].threat))
    ledger = evaluate(tiny_fusion(), TinySamples(44), rows, goal, tmp_path, settings=Settings(device="cpu", probed=0))
    table = build([ledger]).table.set_index("condition")
    assert pd.notna(table.loc["worst case", "mAP"]) == printed
    assert pd.notna(table.loc["universal", "mAP"])
    assert pd.notna(table.loc["worst case", "success"])


def test_a_point_that_failed_the_audit_settles_nothing(tmp_path):
    @dataclass(frozen=True)
    class Cheat:
        def __call__(self, model, inputs, labels, threat, *, draws):
            return {m: x.clamp(-1, 1) * 0 for m, x in inputs.items()}

    Search.given.clear()
    ledger = evaluated(tmp_path, {"cheat": Cheat(), "search": Search()}, attacked=[("audio",)])
    cheat, search = ledger.read("cheat-audio-0"), ledger.read("search-audio-0")
    assert cheat["reached"].any()
    assert (cheat["violation"] != "").all()
    assert not search["settled"].isin(["cheat-audio-0"]).any()


def test_a_run_with_spared_clips_goes_on_to_the_same_bytes(tmp_path):
    whole = evaluated(tmp_path / "whole", ATTACKS)
    broken = evaluated(tmp_path / "broken", ATTACKS)
    for key in ("pgd-audio-0", "search-audio+visual-0"):
        broken.part(key, 1).unlink()
    evaluated(tmp_path / "broken", ATTACKS)
    for path in sorted((tmp_path / "whole" / "ledger").rglob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "broken" / path.relative_to(tmp_path / "whole")).read_bytes()
    assert whole.record()["identity"] == broken.record()["identity"]


def other_fusion() -> LateFusion:
    """Another model for the same task: the same network, its weights a little apart."""
    model = tiny_fusion()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def test_transfer_attacks_the_source_and_is_judged_on_the_model(tmp_path):
    source = other_fusion()
    member = Member("transfer", PGD(8), Source("other", source, digest_of_model(source)))
    own = Member("pgd", PGD(8))
    ledger = evaluated(tmp_path, [own, member], attacked=[("audio",)], eps=["0.05"], keep=44)
    rows = ledger.read("transfer-audio-0").set_index("sample")
    described = ledger.record()["identity"]["conditions"]["transfer-audio-0"]
    assert described["knowledge"] == "transfer"
    assert described["source"].startswith("other (")
    from robustav import keep

    inputs = [keep.load(keep.folder_of(tmp_path, "transfer-audio-0", name)) for name in rows.index]
    stacked = {m: torch.stack([x[m] for x in inputs]) for m in SPECS}
    labels = [list(row) for row in rows["labels"]]
    fooled = [top not in known for top, known in zip(source(stacked).argmax(1).tolist(), labels, strict=True)]
    judged = [top not in known for top, known in zip(tiny_fusion()(stacked).argmax(1).tolist(), labels, strict=True)]
    samples = TinySamples(44)
    clean = torch.stack([source({m: x[None] for m, x in samples.load(i).inputs.items()})[0] for i in range(44)])
    wrong = [top not in known for top, known in zip(clean.argmax(1).tolist(), labels, strict=True)]
    expected = [None if before else now for before, now in zip(wrong, fooled, strict=True)]
    assert [None if pd.isna(value) else bool(value) for value in rows["reached_source"]] == expected
    assert True in expected
    assert not rows["ever_reached"].any(), "what it met on the way was the source's"
    assert rows["reached"].tolist() == judged
    assert fooled != judged
    assert ledger.read("pgd-audio-0")["reached_source"].isna().all()


def test_a_source_that_does_not_fit_is_refused_before_anything_runs(tmp_path):
    other = tiny_fusion("multiclass")
    member = Member("transfer", PGD(2), Source("other", other, "0" * 12))
    with pytest.raises(ValueError, match="the source other must have the model's classes and kind of labels"):
        evaluated(tmp_path / "a", [member])
    other = tiny_fusion()
    other.specs = {**other.specs, "audio": replace(other.specs["audio"], low=-2.0)}
    with pytest.raises(ValueError, match="the source other reads audio as"):
        evaluated(tmp_path / "b", [Member("transfer", PGD(2), Source("other", other, "0" * 12))])
    assert not (tmp_path / "a").exists()


def test_the_smallest_budget_of_every_clip_gives_the_curve(tmp_path):
    member = Member("smallest", Bisection(), smallest=True)
    ledger = evaluated(tmp_path, [Member("fgsm", FGSM()), member], attacked=[("audio",)], eps=["0.1"])
    rows, fgsm = ledger.read("smallest-audio-0"), ledger.read("fgsm-audio-0")
    assert (rows["violation"] == "").all()
    assert (rows["gauge"] > 1).any()
    sizes = np.where(rows["reached"], rows["gauge"], np.inf)
    assert (fgsm["reached"] <= (sizes <= 1.1)).all()
    report = build([ledger])
    assert "smallest" not in set(report.table["condition"])
    line = report.smallest.iloc[0]
    right = np.sort(sizes[sizes > 0])
    assert (line["clips"], line["wrong"]) == (len(right), (sizes == 0).sum())
    assert line["broken"] == np.isfinite(right).sum()
    assert line["at_50"] == right[-(-len(right) // 2) - 1]
    assert line["at_50_low"] <= line["at_50"] <= line["at_50_high"]
    assert "smallest budget" in markdown(report)
    assert '"at_95"' in as_json(report)


@dataclass(frozen=True)
class Hair(Bisection):
    """What it finds, a hair short of the boundary: as if its copy of the model had rounded otherwise."""

    short: float = 0.998
    roams: ClassVar[bool] = True

    def smallest(self, model, inputs, labels, threat, *, draws):
        found = Exact().smallest(model, inputs, labels, threat, draws=draws)
        return {m: x + self.short * (found[m] - x) for m, x in inputs.items()}


@dataclass(frozen=True)
class Exact:
    """The boundary along the FGSM direction, to a millionth."""

    def smallest(self, model, inputs, labels, threat, *, draws):
        low, high = torch.zeros(len(labels)), torch.full((len(labels),), 40.0)
        step = FGSM()(model, inputs, labels, threat, draws=draws)

        def along(share):
            return {m: (x + share.reshape(-1, *[1] * (x.ndim - 1)) * (step[m] - x)) for m, x in inputs.items()}

        for _ in range(30):
            middle = (low + high) / 2
            now = look(model, along(middle), labels, threat).reached
            low, high = torch.where(now, low, middle), torch.where(now, middle, high)
        return along(high)


def test_a_smallest_budget_a_hair_short_is_lengthened_until_the_model_agrees(tmp_path):
    """Or a clip that breaks under a tiny budget would stand under every."""
    model = tiny_fusion()
    wide = {m: replace(spec, low=-99.0, high=99.0) for m, spec in model.specs.items()}
    model.specs = wide
    rows = conditions(
        [Member("smallest", Hair(), smallest=True)], parse_epsilons(["0.1"], wide), Untargeted(), [("audio",)]
    )
    ledger = evaluate(
        model, TinySamples(44), rows, Untargeted(), tmp_path / "a", settings=Settings(device="cpu", probed=0)
    )
    found = ledger.read("smallest-audio-0")
    rows = conditions(
        [Member("smallest", Hair(1.00001), smallest=True)], parse_epsilons(["0.1"], wide), Untargeted(), [("audio",)]
    )
    true = evaluate(
        model, TinySamples(44), rows, Untargeted(), tmp_path / "b", settings=Settings(device="cpu", probed=0)
    ).read("smallest-audio-0")
    breakable = true["reached"] & (true["gauge"] > 0)
    assert breakable.sum() > 10
    assert found.loc[breakable, "reached"].all()
    ratio = found.loc[breakable, "gauge"] / true.loc[breakable, "gauge"]
    assert ((ratio >= 0.9999) & (ratio < 1.012)).all()


def test_an_attack_that_cannot_look_for_the_smallest_budget_says_so():
    with pytest.raises(ValueError, match="looks for the smallest budget, but its attack cannot"):
        conditions([Member("smallest", PGD(), smallest=True)], parse_epsilons(["0.1"], SPECS), Untargeted())


def test_one_curve_is_measured_once():
    member = Member("smallest", Bisection(), smallest=True)
    rows = conditions([member], parse_epsilons(["0.1,0.2", "audio=0.1,visual=0.4"], SPECS), Untargeted())
    assert [row.key for row in rows[1:]] == [
        "smallest-audio-0",
        "smallest-visual-0",
        "smallest-audio+visual-0",
        "smallest-audio+visual-2",
    ]


def test_the_median_interval_covers():
    generator = np.random.default_rng(0)
    inside = [low <= 0 <= high for low, high in (median_interval(generator.standard_normal(25)) for _ in range(2000))]
    assert 0.95 <= np.mean(inside) <= 0.98
    assert np.isnan(median_interval(np.arange(5.0))).all()


def test_a_stochastic_model_is_judged_by_the_mean_of_its_draws_and_runs_repeat(tmp_path):
    class Noisy(LateFusion):
        stochastic = True

        def front_end(self, modality, raw):
            return super().front_end(modality, raw + 0.3 * torch.randn_like(raw))

    def noisy():
        model = tiny_fusion()
        model.__class__ = Noisy
        return model

    models = {name: noisy() for name in "ab"}
    before = torch.get_rng_state()
    members = Evaluation(attacks="pgd", steps=3).members(models["a"], Untargeted(), "mAP")
    assert [member.attack for member in members] == [EOT(PGD(3), 20)]
    one, two = (
        evaluated(tmp_path / name, members, attacked=[("audio",)], model=model) for name, model in models.items()
    )
    assert torch.equal(torch.get_rng_state(), before)
    for key in one.record()["identity"]["conditions"]:
        left, right = one.read(key), two.read(key)
        np.testing.assert_array_equal(np.stack(left["logits"]), np.stack(right["logits"]))
        assert (left["violation"] == "").all()
        assert (left["rescore_gap"] > 0).all()
    with pytest.raises(ValueError, match="a stochastic model has no smallest budget"):
        evaluated(tmp_path / "c", [Member("smallest", Bisection(), smallest=True)], model=models["a"])
    inputs = batch_of(SPECS, 1)
    spread = torch.stack([models["a"](inputs) for _ in range(100)]).std(0).mean().item()
    assert one.read(CLEAN.key)["rescore_gap"].mean() < 2.5 * spread  # means over 20 draws, the largest of 3 classes
