"""Goals: losses worked out by hand, verdicts by their rules, and label kinds that are checked, never guessed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustav.classifier import Trace
from robustav.goal_names import parse_goal
from robustav.goals import (
    GOALS,
    CorpusAP,
    Hide,
    Inject,
    PushLatent,
    Stealth,
    Steered,
    Targeted,
    TopK,
    Untargeted,
)
from robustav.losses import bce, cross_entropy, margin, ranking_margin, top1_margin
from robustav.threat import Budget, ThreatModel

NAMES = ("bell", "clap", "kick")
LOGITS = torch.tensor([[2.0, -1, 0], [-3, -2, -1]])
HOT = torch.tensor([[1.0, 0, 0], [0, 1, 1]])


def trace(logits, latent=None):
    return Trace({}, logits if latent is None else latent, logits)


def test_losses_by_hand():
    def softplus(x):
        return math.log1p(math.exp(x))

    expected = [softplus(-2) + softplus(-1) + softplus(0), softplus(-3) + softplus(2) + softplus(1)]
    torch.testing.assert_close(bce(LOGITS, HOT), torch.tensor(expected))
    torch.testing.assert_close(ranking_margin(LOGITS, HOT), torch.tensor([-2.0, -1.0]))
    total = math.exp(2) + math.exp(-1) + 1
    torch.testing.assert_close(cross_entropy(LOGITS[:1], torch.tensor([1])), torch.tensor([1 + math.log(total)]))
    torch.testing.assert_close(margin(LOGITS, torch.tensor([0, 0])), torch.tensor([-2.0, 2.0]))


def test_the_top1_margin_is_positive_exactly_when_the_hit_is_lost():
    torch.testing.assert_close(top1_margin(LOGITS, HOT), torch.tensor([-2.0, -2.0]))
    torch.testing.assert_close(top1_margin(LOGITS, torch.tensor([[0.0, 0, 0], [1, 1, 1]])), torch.tensor([2.0, 1.0]))
    logits, labels = torch.randn(200, 5), (torch.rand(200, 5) < 0.4).float()
    labels = labels[(some := labels.any(1) & ~labels.all(1))]
    lost = Untargeted().reached(trace(logits[some]), labels)
    assert torch.equal(top1_margin(logits[some], labels) > 0, lost)


def test_ranking_margin_without_and_with_only_positives():
    labels = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    assert ranking_margin(LOGITS, labels).tolist() == [2.0, 3.0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 8))
def test_the_ranking_margin_tells_whether_a_label_is_outranked(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, classes, generator=generator)
    labels = (torch.rand(5, classes, generator=generator) < 0.5).float()
    for value, row, hot in zip(ranking_margin(logits, labels), logits, labels, strict=True):
        if 0 < hot.sum() < classes:
            outranked = max(row[hot == 0]) > min(row[hot == 1])
            assert bool(value > 0) == bool(outranked)


def test_a_lost_top1_hit():
    goal = Untargeted()
    assert goal.reached(trace(LOGITS), HOT).tolist() == [False, False]
    assert goal.reached(trace(-LOGITS), HOT).tolist() == [True, True]
    assert Untargeted("multiclass").reached(trace(LOGITS), torch.tensor([0, 0])).tolist() == [False, True]


def test_label_set_changed_compares_with_the_clean_prediction():
    goal = Untargeted(success="label-set").given(trace(LOGITS))
    moved = LOGITS.clone()
    moved[0, 1] = 0.5
    assert goal.reached(trace(LOGITS), HOT).tolist() == [False, False]
    assert goal.reached(trace(moved), HOT).tolist() == [True, False]
    with pytest.raises(ValueError, match="compares with the clean prediction"):
        Untargeted(success="label-set").reached(trace(LOGITS), HOT)


def test_misclassified_compares_with_the_labels_at_the_threshold():
    assert Untargeted(success="misclassified").reached(trace(LOGITS), HOT).tolist() == [True, True]
    strict = Untargeted(success="misclassified", threshold=0.6)
    assert strict.reached(trace(LOGITS), HOT).tolist() == [False, True]  # sigmoid(0) = 0.5 no longer counts
    multiclass = Untargeted("multiclass", success="misclassified")
    assert multiclass.reached(trace(LOGITS), torch.tensor([0, 1])).tolist() == [False, True]


def test_hide_and_inject():
    hide, inject = Hide(chosen=(0, 1)), Inject(chosen=(0, 2))
    assert hide.reached(trace(LOGITS), HOT).tolist() == [False, True]
    assert inject.reached(trace(LOGITS), HOT).tolist() == [True, False]
    for goal, sign in ((hide, -1), (inject, 1)):
        x = LOGITS.clone().requires_grad_()
        goal.loss(trace(x), HOT).sum().backward()
        assert (x.grad[:, list(goal.chosen)] * sign > 0).all()
        assert not x.grad[:, [c for c in range(3) if c not in goal.chosen]].any()


def test_targeted():
    goal = Targeted("multiclass", target=2)
    assert goal.reached(trace(LOGITS), torch.tensor([0, 0])).tolist() == [False, True]
    torch.testing.assert_close(goal.loss(trace(LOGITS), torch.tensor([0, 0])), torch.tensor([-2.0, 1.0]))


def test_pushing_the_latent_is_a_distance_with_a_gradient_at_the_clean_point():
    latent = torch.tensor([[3.0, 4.0]])
    goal = PushLatent().given(trace(torch.zeros(1, 3), latent))
    z = latent.clone().requires_grad_()
    loss = goal.loss(trace(torch.zeros(1, 3), z), HOT[:1])
    assert loss.item() == pytest.approx(0.05)
    loss.sum().backward()
    assert z.grad.norm() == pytest.approx(1)
    with pytest.raises(ValueError, match="needs the clean latent"):
        PushLatent().loss(trace(LOGITS), HOT)


@pytest.mark.parametrize(
    ("kind", "labels", "error", "message"),
    [
        (
            "multilabel",
            torch.tensor([0, 1]),
            ValueError,
            r"must be floats \[batch, 3\], got torch.int64 \[2\]: declare",
        ),
        ("multilabel", HOT.long(), ValueError, "must be floats"),
        ("multilabel", HOT * 0.5, ValueError, "must be zeros and ones"),
        ("multilabel", torch.ones(2, 4), ValueError, r"got torch.float32 \[2, 4\]"),
        ("multiclass", HOT, ValueError, r"must be class indices \[batch\], got torch.float32 \[2, 3\]: declare"),
        ("multiclass", torch.tensor([0, 3]), ValueError, r"must lie in 0..2, got 0..3"),
    ],
)
def test_the_wrong_kind_of_labels_is_an_error(kind, labels, error, message):
    """V4: multi-hot labels must not pass silently into a cross-entropy."""
    with pytest.raises(error, match=message):
        Untargeted(kind).check(labels, 3)


def test_the_right_kind_passes():
    Untargeted("multilabel").check(HOT, 3)
    Untargeted("multiclass").check(torch.tensor([0, 2]), 3)


def test_goals_as_people_write_them():
    assert parse_goal("untargeted", NAMES, "multilabel") == Untargeted("multilabel", loss_name="bce")
    assert parse_goal("untargeted", NAMES, "multiclass").loss_name == "ce"
    assert parse_goal("hide:bell,Kick", NAMES, "multilabel").chosen == (0, 2)
    assert parse_goal("inject:1", NAMES, "multilabel").chosen == (1,)
    assert parse_goal("targeted:clap", NAMES, "multiclass").target == 1
    assert parse_goal("push-latent", NAMES, "multilabel", success="label-set").success == "label-set"
    digits = ("3", "4", "0", "bell")
    assert parse_goal("hide:3,4", digits, "multilabel").chosen == (0, 1)
    assert parse_goal("hide:1", digits, "multilabel").chosen == (1,)
    comma = ("Speech", "Male speech, man speaking")
    assert parse_goal("hide:Male speech, man speaking", comma, "multilabel").chosen == (1,)
    assert set(GOALS) == {
        "untargeted",
        "targeted",
        "hide",
        "inject",
        "push-latent",
        "top-k",
        "corpus-ap",
        "stealth",
    }


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("wreck", {}, "`goal` must be one of .*, got 'wreck'"),
        ("hide", {}, "goal 'hide' needs a class, as in 'hide:bell'"),
        ("hide:gong", {}, "no class 'gong'; the model has bell, clap, kick"),
        ("targeted:bell,clap", {}, "takes one class, got 'bell,clap'"),
        ("untargeted:bell", {}, "takes no classes, got 'bell'"),
        ("untargeted", {"loss": "ce"}, r"`loss_name` must be one of \['bce', .*'top1'.*\], got 'ce'"),
        ("untargeted", {"success": "luck"}, "`success` must be one of .*, got 'luck'"),
        ("hide:bell", {"loss": "bce"}, "goal 'hide' has its own loss: leave 'bce' out"),
        ("untargeted", {"threshold": 1.5}, "`threshold` must be a probability between 0 and 1, got 1.5"),
    ],
)
def test_goals_that_are_none(text, settings, message):
    with pytest.raises(ValueError, match=message):
        parse_goal(text, NAMES, "multilabel", **settings)


def test_hiding_is_for_several_labels():
    with pytest.raises(ValueError, match="Hide needs a multilabel model"):
        parse_goal("hide:bell", NAMES, "multiclass")


@pytest.mark.parametrize(
    "goal", [Untargeted(), Targeted(target=1), Hide(chosen=(0,)), Inject(chosen=(1, 2)), PushLatent()], ids=repr
)
def test_every_goal_says_what_success_is(goal):
    assert "success" in goal.words(NAMES) or "predicted" in goal.words(NAMES)


def batch_of_scores(batch=40, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator)
    return logits, (torch.rand(batch, classes, generator=generator) < 0.4).float()


def test_out_of_the_top_k():
    logits = torch.tensor([[3.0, 2, 1, 0]])
    for k, label, expected in ((1, 0, False), (1, 1, True), (2, 1, False), (2, 2, True), (3, 3, True)):
        hot = torch.nn.functional.one_hot(torch.tensor([label]), 4).float()
        assert TopK(k=k).reached(trace(logits), hot).item() is expected
        assert TopK("multiclass", k=k).reached(trace(logits), torch.tensor([label])).item() is expected
    logits, labels = batch_of_scores()
    untied = Untargeted().reached(trace(logits), labels)
    assert torch.equal(TopK(k=1).reached(trace(logits), labels), untied)
    lost = [TopK(k=k).reached(trace(logits), labels) for k in (1, 2, 3)]
    assert (lost[0] | ~lost[1]).all() and (lost[1] | ~lost[2]).all(), "out of the top 3 is out of the top 2"


def test_k_lies_below_the_number_of_classes():
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        TopK(k=0)
    with pytest.raises(ValueError, match="`k` must be below the model's 3 classes, got 3"):
        TopK(k=3).check_model(3, "multilabel")
    TopK(k=2).check_model(3, "multilabel")


def test_the_corpus_is_learnt_once_and_is_no_setting():
    logits, labels = batch_of_scores()
    goal = CorpusAP(temperature=0.5)
    assert goal.needs_corpus and not any(g.needs_corpus for g in (Untargeted(), Hide(chosen=(0,)), TopK()))
    with pytest.raises(ValueError, match=r"call `goal.learned\(logits, labels\)` of all clips first"):
        goal.loss(trace(logits), labels)
    learned = goal.learned(logits, labels)
    assert learned.settings() == goal.settings() and "corpus" not in goal.settings()
    assert learned == goal and repr(learned) == repr(goal)
    whole = learned.loss(trace(logits), labels)
    rows = torch.tensor([7, 3, 3])
    part = learned.given(trace(logits)).at(rows)
    torch.testing.assert_close(part.loss(trace(logits[rows]), labels[rows]), whole[rows])
    assert torch.equal(goal.reached(trace(logits), labels), Untargeted().reached(trace(logits), labels))
    assert Untargeted().learned(logits, labels) == Untargeted()


def test_a_steered_goal_learns_for_the_goal_it_pursues():
    logits, labels = batch_of_scores()
    steered = Steered(goal=CorpusAP())
    assert steered.needs_corpus and not Steered().needs_corpus
    assert steered.learned(logits, labels).goal.corpus is not None


def test_stealth_hides_and_changes_nothing_else():
    clean = torch.tensor([[2.0, -1, 1]] * 4)
    now = torch.tensor([[2.0, -1, 1], [-1, -1, 1], [-1, 1, 1], [-1, -2, 5]])
    labels = torch.ones(4, 3)
    goal = Stealth(chosen=(0,)).given(trace(clean))
    assert goal.reached(trace(now), labels).tolist() == [False, True, False, True]
    assert Hide(chosen=(0,)).reached(trace(now), labels).tolist() == [False, True, True, True]
    loss = goal.loss(trace(now), labels)
    assert loss.argmax().item() == 1, "hidden, and nothing else moved"
    assert goal.at(torch.tensor([2, 1])).reached(trace(now[[2, 1]]), labels[:2]).tolist() == [False, True]
    for question in (Stealth(chosen=(0,)).loss, Stealth(chosen=(0,)).reached):
        with pytest.raises(ValueError, match="stealth compares with the clean scores"):
            question(trace(now), labels)
    with pytest.raises(ValueError, match="`weight` must be a finite number at or above 0, got -1"):
        Stealth(chosen=(0,), weight=-1)


def test_each_clips_own_labels_may_be_hidden():
    logits = torch.tensor([[-1.0, 2, 2], [2, -1, -1], [2, 2, 2]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    assert Hide(chosen="labels").reached(trace(logits), labels).tolist() == [True, True, True]
    assert Hide(chosen="labels").reached(trace(-logits), labels).tolist() == [False, False, True]
    x = logits.clone().requires_grad_()
    Hide(chosen="labels").loss(trace(x), labels).sum().backward()
    assert torch.equal(x.grad < 0, labels > 0)
    for row, classes in enumerate(((0,), (1, 2))):
        one = slice(row, row + 1)
        chosen = Hide(chosen=classes).loss(trace(logits[one]), labels[one])
        torch.testing.assert_close(Hide(chosen="labels").loss(trace(logits[one]), labels[one]), chosen)
    goal = Stealth(chosen="labels").given(trace(-logits))
    assert goal.reached(trace(logits), labels).tolist() == [False, False, False]
    assert goal.reached(trace(torch.tensor([[-1.0, -2, -2], [-2, -1, -1], [-2, -2, -2]])), labels).all()
    with pytest.raises(ValueError, match="`chosen` must be class indices, or 'labels' for each clip's own, got 'mine'"):
        Hide(chosen="mine")


@pytest.mark.parametrize("goal", [Hide, Inject, Stealth])
def test_chosen_classes_lie_among_the_models(goal):
    with pytest.raises(ValueError, match=r"`chosen` must lie in 0..2, got \(1, 3\)"):
        goal(chosen=(1, 3)).check_model(3, "multilabel")
    with pytest.raises(ValueError, match="`chosen` must name at least one class index"):
        goal()


def test_new_goals_as_people_write_them():
    assert parse_goal("top-k:2", NAMES, "multilabel") == TopK(k=2)
    assert parse_goal("top-k:1", NAMES, "multiclass") == TopK("multiclass", k=1)
    assert parse_goal("corpus-ap", NAMES, "multilabel", success="label-set") == CorpusAP(success="label-set")
    assert parse_goal("stealth:bell,kick", NAMES, "multilabel").chosen == (0, 2)
    assert parse_goal("stealth:labels", NAMES, "multilabel") == Stealth(chosen="labels")
    assert parse_goal("hide:labels", NAMES, "multilabel") == Hide(chosen="labels")
    assert parse_goal("hide:labels", ("labels", "others"), "multilabel").chosen == (0,), "a class of that name is meant"


@pytest.mark.parametrize(
    ("text", "kind", "settings", "message"),
    [
        ("top-k", "multilabel", {}, "goal 'top-k' needs a number from 1 to 2, .* as in 'top-k:1', got ''"),
        ("top-k:3", "multilabel", {}, "needs a number from 1 to 2, below the number of classes, .* got '3'"),
        ("top-k:0", "multilabel", {}, "needs a number from 1 to 2, .* got '0'"),
        ("top-k:bell", "multilabel", {}, "needs a number from 1 to 2, .* got 'bell'"),
        ("top-k:2", "multilabel", {"success": "top1"}, "goal 'top-k' has its own success: leave 'top1' out"),
        ("corpus-ap:bell", "multilabel", {}, "goal 'corpus-ap' takes no classes, got 'bell'"),
        ("corpus-ap", "multilabel", {"success": "luck"}, "`success` must be one of .*, got 'luck'"),
        ("corpus-ap", "multilabel", {"loss": "bce"}, "goal 'corpus-ap' has its own loss: leave 'bce' out"),
        ("corpus-ap", "multiclass", {}, "CorpusAP needs a multilabel model"),
        ("stealth", "multilabel", {}, "goal 'stealth' needs a class, as in 'stealth:bell'"),
        ("stealth:bell", "multiclass", {}, "Stealth needs a multilabel model"),
        ("inject:labels", "multilabel", {}, "goal 'inject': no class 'labels'"),
    ],
)
def test_new_goals_that_are_none(text, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        parse_goal(text, NAMES, kind, **settings)


def test_temperatures_are_above_zero():
    with pytest.raises(ValueError, match="`temperature` must be a finite number above 0, got 0"):
        CorpusAP(temperature=0)


@pytest.mark.parametrize(
    "goal", [TopK(k=2), CorpusAP(), Stealth(chosen=(0, 2)), Stealth(chosen="labels"), Hide(chosen="labels")], ids=repr
)
def test_every_new_goal_says_what_success_is(goal):
    words = goal.words(NAMES)
    assert "success: " in words
    assert ("own labels" in words) == (getattr(goal, "chosen", None) == "labels")
    assert goal.settings()["goal"] == type(goal).__name__


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
def test_a_changed_label_set_is_climbed_for_from_the_clean_prediction(label_kind):
    """From the labels, a clip that the model has wrong would be pushed towards what it says already."""
    clean = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
    labels = torch.tensor([1, 0]) if label_kind == "multiclass" else torch.tensor([[0.0, 1, 0], [1, 0, 0]])
    said = torch.tensor([0, 1]) if label_kind == "multiclass" else torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    goal = Untargeted(label_kind, success="label-set").given(Trace({}, clean, clean))
    now = Trace({}, clean + 0.3, clean + 0.3)
    plain = Untargeted(label_kind)
    assert torch.equal(goal.loss(now, labels), plain.loss(now, said))
    steered = ThreatModel({"audio": Budget("linf", 0.1)}, goal).steered(
        lambda logits, away: away.double().reshape(2, -1).sum(1)
    )
    assert torch.equal(steered.goal.loss(now, labels), said.double().reshape(2, -1).sum(1))
