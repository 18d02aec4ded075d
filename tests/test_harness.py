"""The harness: resumes to the same bytes, trusts no attack, counts what it spends, and leaves the model as it was."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, TinySamples, few_steps, tiny_fusion, tiny_specs
from torch import nn

from robustav import harness, judge, keep
from robustav.attacks import FGSM, PGD, MomentumFGSM, Noise
from robustav.classifier import LateFusion, Wrapped
from robustav.data.samples import Sample
from robustav.goals import PushLatent, Untargeted
from robustav.harness import Settings, choose, evaluate
from robustav.ledger import Ledger, failures, skipped, write_atomically
from robustav.plan import CLEAN, Condition, conditions
from robustav.threat import Budget, ThreatModel, parse_epsilons

SPECS = tiny_specs()
GOAL = Untargeted()


def rows_for(attacks=None, eps=("0.05",), goal=GOAL, attacked=None):
    few = {"noise": Noise(), "fgsm": FGSM(), "pgd": PGD(), "momentum": MomentumFGSM()}
    return conditions(attacks or few, parse_epsilons(list(eps), SPECS), goal, attacked)


def run(out, model=None, samples=None, rows=None, goal=GOAL, **settings):
    options = {k: settings.pop(k) for k in ("seed", "limit") if k in settings}
    return evaluate(
        model or tiny_fusion(),
        samples or TinySamples(),
        rows or rows_for(goal=goal),
        goal,
        out,
        settings=Settings(device="cpu", **{"probed": 0, **settings}),
        **options,
    )


def contents(folder, *parts):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in parts or ("ledger", "kept")
        for path in sorted((Path(folder) / part).rglob("*"))
        if path.is_file()
    }


def test_one_row_for_each_clip_and_condition(tmp_path):
    ledger = run(tmp_path, rows=rows_for(few_steps()))
    keys = list(ledger.record()["identity"]["conditions"])
    assert keys[0] == "clean"
    assert len(keys) == 1 + 3 * len(few_steps())
    for key in keys:
        rows = ledger.read(key)
        assert list(rows["sample"]) == list(TinySamples().ids)
        assert (rows["violation"] == "").all()
        assert (rows["gauge"] <= 1).all()


def test_untouched_modalities_are_reported_untouched(tmp_path):
    rows = run(tmp_path).read("pgd-audio-0")
    assert (rows["max_abs_visual"] == 0).all()
    assert np.isinf(rows["snr_db_visual"]).all()
    assert (rows["max_abs_audio"] > 0.04).all()


def test_verdicts_are_those_of_the_untouched_model_on_what_came_back(tmp_path):
    model = tiny_fusion()
    ledger = run(tmp_path, model, keep=10)
    for key in ("clean", "pgd-audio+visual-0", "fgsm-visual-0"):
        for _, row in ledger.read(key).iterrows():
            inputs = {m: x[None] for m, x in keep.load(keep.folder_of(tmp_path, key, row["sample"])).items()}
            logits = model(inputs)[0].detach().numpy()
            np.testing.assert_allclose(row["logits"], logits, rtol=1e-5, atol=1e-5)
            assert row["reached"] == (logits.argmax() not in row["labels"])


def test_passes_are_counted(tmp_path):
    ledger = run(tmp_path, rows=rows_for({"noise": Noise(), "fgsm": FGSM(), "pgd": PGD(steps=7)}))
    for key, passes in (("noise-audio-0", (0, 0)), ("fgsm-audio-0", (1, 1)), ("pgd-audio+visual-0", (8, 7))):
        rows = ledger.read(key)
        assert set(zip(rows["forwards"], rows["backwards"], strict=True)) == {passes}


def test_passes_that_end_at_the_latent_are_counted(tmp_path):
    goal = PushLatent()
    rows = run(tmp_path, rows=rows_for({"pgd": PGD(steps=3)}, goal=goal), goal=goal).read("pgd-audio-0")
    assert set(zip(rows["forwards"], rows["backwards"], strict=True)) == {(4, 3)}


def test_the_held_modality_is_encoded_once_a_batch(tmp_path):
    model, calls = tiny_fusion(), []
    encode = type(model).encode

    def counted(self, modality, x):
        calls.append((modality, x.requires_grad))
        return encode(self, modality, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "encode", counted)
        run(tmp_path, model, rows=rows_for({"pgd": PGD(steps=9)}, attacked=[("audio",)]), batch_size=10)
    # clean and its second look (in two halves), the check of the prepared copy (two), once held, the check of the view
    # (two), verdict and its second look (two); and nine steps of the attack, with the prepared copy's trial before them
    assert sum(modality == "visual" for modality, _ in calls) == 11
    assert sum(modality == "audio" and graph for modality, graph in calls) == 10


def test_decisions_do_not_depend_on_batch_size_or_shards(tmp_path):
    """Another batch size may move the last bits of a score, never a draw and never a decision."""
    reference = run(tmp_path / "8", samples=TinySamples(13), batch_size=8)
    for size in (1, 3, 13):
        other = run(tmp_path / str(size), samples=TinySamples(13), batch_size=size)
        for key in reference.record()["identity"]["conditions"]:
            left, right = reference.read(key), other.read(key)
            assert list(left["reached"]) == list(right["reached"])
            np.testing.assert_allclose(np.stack(left["logits"]), np.stack(right["logits"]), rtol=1e-3, atol=1e-3)
            if key.startswith("noise"):
                np.testing.assert_array_equal(left["snr_db_audio"], right["snr_db_audio"])
    # Parts are at least 32 clips: 70 clips are three parts for two shards.
    run(tmp_path / "whole", samples=TinySamples(70))
    for shard in (1, 0):
        run(tmp_path / "shards", samples=TinySamples(70), shard=(shard, 2))
    assert contents(tmp_path / "whole") == contents(tmp_path / "shards")


CHILD = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import test_harness
    from test_harness import run, TinySamples
    left = int(sys.argv[2])
    def counted(fsync=os.fsync):
        def dying(file):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)  # a temporary file is written, its name not yet given
            return fsync(file)
        return dying
    os.fsync = counted()
    run(sys.argv[1], samples=TinySamples(70), keep=2)
""")


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    """V1: kill at random points, between writing and naming a file, until it gets through."""
    run(tmp_path / "whole", samples=TinySamples(70), keep=2)
    chance = random.Random(os.urandom(4))
    ends = []
    for left in [1, chance.randrange(2, 30), chance.randrange(2, 30), 10_000]:  # the first of all files, and two others
        arguments = [str(tmp_path / "killed"), str(left)]
        child = [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent)), *arguments]
        done = subprocess.run(child, check=False, capture_output=True, text=True)
        ends.append((left, done.returncode, done.stderr[-500:]))
    assert [code for _, code, _ in ends] == [-signal.SIGKILL] * 3 + [0], ends
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(judge.Judge, "judge", lambda *_: pytest.fail("computed a part that was there"))
    run(tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds another run; they differ in seed \(seed: 0 there, 1 now\): choose another --out"
    ):
        run(tmp_path, seed=1)
    other = tiny_fusion()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(ValueError, match="differ in weights"):
        run(tmp_path, other)


def test_a_model_whose_code_changed_is_noticed(tmp_path):
    """The same weights and names, another computation: resuming would mix two models in one table."""
    rows = rows_for({"fgsm": FGSM()})
    run(tmp_path, rows=rows)
    ledger = Ledger(tmp_path)
    ledger.part("fgsm-audio-0", 0).unlink()
    changed = tiny_fusion()
    changed.fuse = lambda features: 2 * torch.cat([features[m] for m in sorted(features)], 1)
    with pytest.raises(ValueError, match="gave other scores than today's"):
        run(tmp_path, changed, rows=rows)


@dataclass(frozen=True)
class Cheat:
    """An attack that breaks one rule."""

    how: str

    def __call__(self, model, inputs, labels, threat, *, draws):
        x = inputs["audio"]
        match self.how:
            case "over budget":
                return {"audio": threat.budgets["audio"].project(x, x + 1) + 0.001}
            case "outside the range":
                return {"audio": x.sign() * 1.5}
            case "not finite":
                return {"audio": x * float("nan")}
            case "another shape":
                return {"audio": x[:, :-1]}
            case "a box around the iterate":
                for _ in range(4):
                    x = threat.budgets["audio"].project(x, x + 1)
                return {"audio": x}
            case "a running sum":
                delta = sum((threat.budgets["audio"].project(x, x + 1) - x) / 2 for _ in range(6))
                return {"audio": (x + delta).clamp(-1, 1)}
            case "another modality":
                return {"audio": x, "visual": torch.zeros(len(x), *SPECS["visual"].shape)}
            case "writes into its inputs":
                x += 0.01
                return {"audio": x}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("over budget", "audio: length over budget is 1.0"),
        ("outside the range", r"audio leaves \[-1, 1\]"),
        ("a box around the iterate", r"audio: length over budget is [34]"),  # V9: four steps, four budgets
        ("a running sum", r"audio: length over budget is [23]"),  # V10: never projected
        ("another modality", "visual was changed, though the threat does not include it"),
    ],
)
def test_the_audit_finds_what_left_the_threat(tmp_path, how, message):
    """V3, V9, V10: every returned point is measured in input units against its own budget and box."""
    ledger = run(tmp_path, rows=rows_for({"cheat": Cheat(how)}, attacked=[("audio",)]))
    assert ledger.read("cheat-audio-0")["violation"].str.contains(message).all()
    assert list(failures(ledger)) == ["cheat-audio-0"]


def test_what_cannot_be_scored_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="scores of clip 'clip 0' are not finite"):
        run(tmp_path / "nan", rows=rows_for({"cheat": Cheat("not finite")}, attacked=[("audio",)]))
    with pytest.raises(
        ValueError, match=r"the attack returned audio as torch.float32 \[8, 63\] for torch.float32 \[8, 64\]"
    ):
        run(tmp_path / "shape", rows=rows_for({"cheat": Cheat("another shape")}, attacked=[("audio",)]))


def test_an_attack_that_writes_into_its_inputs_cannot_move_the_clean_clips(tmp_path):
    rows = rows_for({"cheat": Cheat("writes into its inputs"), "fgsm": FGSM()}, attacked=[("audio",)])
    ledger = run(tmp_path, rows=rows)
    assert (ledger.read("cheat-audio-0")["max_abs_audio"] > 0.009).all()
    assert (ledger.read("fgsm-audio-0")["max_abs_audio"] <= 0.05).all()


class Noisy(nn.Module):
    def forward(self, inputs):
        flat = torch.cat([inputs[m].flatten(1) for m in sorted(inputs)], 1)
        return flat[:, :3] + 0.5 * torch.randn(len(flat), 3)


class Mates(nn.Module):
    """A score that depends on batch mates."""

    def forward(self, inputs):
        flat = inputs["visual"].flatten(1)[:, :3]
        return flat - flat[:1]


class Mean(nn.Module):
    """A score that depends on the mean of its batch, as batch norm in train mode does: the order does not show it."""

    def forward(self, inputs):
        flat = inputs["visual"].flatten(1)[:, :3]
        return flat - flat.mean(0)


@pytest.mark.parametrize("network", [Noisy(), Mates(), Mean()], ids=["random", "batch mates", "batch mean"])
def test_scores_that_do_not_hold_are_found(tmp_path, network):
    model = Wrapped(network, specs=SPECS, classes=CLASSES, label_kind="multilabel")
    ledger = run(tmp_path, model, rows=rows_for({"noise": Noise()}))
    assert ledger.read("clean")["violation"].str.contains("scored again, a logit changed by").any()


def test_an_honest_run_has_no_findings(tmp_path):
    assert failures(run(tmp_path, keep=3)) == {}


def test_the_model_comes_back_as_it_was(tmp_path):
    model = tiny_fusion().train()
    model.head.bias.requires_grad_(False)
    model.encoders["audio"][2].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    run(tmp_path, model)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_changes_itself_is_an_error(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, inputs):
            self.seen += 1
            return inputs["visual"].flatten(1)[:, :3]

    class Training(nn.Module):
        def forward(self, inputs):
            self.train()
            return inputs["visual"].flatten(1)[:, :3]

    for network, message in (
        (Counting(), "changed while it was evaluated"),
        (Training(), "put itself into train mode"),
    ):
        model = Wrapped(network, specs=SPECS, classes=CLASSES, label_kind="multilabel")
        with pytest.raises(ValueError, match=message):
            run(tmp_path / message, model, rows=[CLEAN])


def test_bad_clips_are_rows_with_a_reason_and_nothing_else_is_lost(tmp_path):
    samples = TinySamples(12, broken={"clip 3": "no audio track", "clip 11": "silent"})
    ledger = run(tmp_path, samples=samples)
    assert skipped(ledger) == {"clip 3": "no audio track", "clip 11": "silent"}
    assert len(ledger.read("pgd-audio-0").query("skipped.isna()")) == 10
    with pytest.raises(ValueError, match="clip 'clip 3' cannot be used: no audio track"):
        run(tmp_path / "strict", samples=samples, strict=True)


def test_unlabelled_clips_are_judged_by_the_models_own_prediction(tmp_path):
    class Unlabelled(TinySamples):
        def load(self, index):
            return super().load(index)._replace(labels=None)

    rows = run(tmp_path, samples=Unlabelled()).read("clean")
    assert not rows["labelled"].any()
    assert not rows["reached"].any()
    for labels, logits in zip(rows["labels"], rows["logits"], strict=True):
        assert logits.argmax() in labels
        assert set(np.flatnonzero(logits >= 0)) <= set(labels)


def test_padding_is_kept_silent(tmp_path):
    class Short(TinySamples):
        def load(self, index):
            sample = super().load(index)
            signal = torch.arange(64) < (40 if index % 2 else 64)
            return Sample(
                sample.id, {**sample.inputs, "audio": sample.inputs["audio"] * signal}, sample.labels, {"audio": signal}
            )

    ledger = run(tmp_path, samples=Short(), keep=10)
    assert failures(ledger) == {}
    for i in (1, 3):
        stored = keep.load(keep.folder_of(tmp_path, "pgd-audio+visual-0", f"clip {i}"))
        assert not stored["audio"][40:].any()


def test_multiclass_models(tmp_path):
    goal = Untargeted("multiclass")
    samples = TinySamples(label_kind="multiclass")
    ledger = run(tmp_path, tiny_fusion("multiclass"), samples, rows_for(goal=goal), goal)
    rows = ledger.read("pgd-audio+visual-0")
    assert all(len(labels) == 1 for labels in rows["labels"])
    assert list(rows["reached"]) == [
        logits.argmax() != labels[0] for logits, labels in zip(rows["logits"], rows["labels"], strict=True)
    ]


def test_a_limit_is_drawn_by_seed_and_keeps_the_order():
    samples = TinySamples(50)
    first = choose(samples, 10, 0)
    assert first == sorted(first)
    assert len(set(first)) == 10
    assert first != choose(samples, 10, 1)
    assert set(first) < set(choose(samples, 20, 0))
    assert choose(samples, None, 0) == choose(samples, 99, 0) == list(range(50))
    with pytest.raises(ValueError, match="`limit` must be at least 1, got 0"):
        choose(samples, 0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda out: run(out, samples=TinySamples(label_kind="multiclass")),
            "the model is multilabel, but tiny is labelled multiclass",
        ),
        (lambda out: Settings(batch_size=0), "`batch_size` must be at least 1, got 0"),
        (lambda out: Settings(shard=(2, 2)), r"`shard` must be \(index, count\)"),
        (lambda out: Settings(keep=-1), "`keep` must not be negative"),
        (
            lambda out: harness.pick_device("gramophone"),
            "`device` must be 'auto', 'cpu' or a CUDA device that is there, got 'gramophone'",
        ),
        (
            lambda out: rows_for(eps=["audio=0.1"], attacked=[("visual",)]),
            r"no budget for visual: --eps has \['audio'\]",
        ),
    ],
)
def test_what_does_not_fit_says_so(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_clips_of_the_wrong_shape_or_range_are_named(tmp_path):
    class Loud(TinySamples):
        def load(self, index):
            sample = super().load(index)
            return sample._replace(inputs={**sample.inputs, "audio": sample.inputs["audio"] * 9})

    class Long(TinySamples):
        def load(self, index):
            sample = super().load(index)
            return sample._replace(inputs={**sample.inputs, "audio": torch.zeros(99)})

    class Deaf(TinySamples):
        def load(self, index):
            sample = super().load(index)
            return sample._replace(inputs={"visual": sample.inputs["visual"]})

    with pytest.raises(ValueError, match=r"`inputs\['audio'\]` must lie in \[-1, 1\] \(amplitude\), got values from"):
        run(tmp_path / "1", samples=Loud())
    with pytest.raises(
        ValueError, match=r"clip \'clip 0\': `inputs\[\'audio\'\]` must have shape \[batch, 64\], got \[1, 99\]"
    ):
        run(tmp_path / "2", samples=Long())
    with pytest.raises(ValueError, match=r"must have the modalities \['audio', 'visual'\], got \['visual'\]"):
        run(tmp_path / "3", samples=Deaf())


def test_score_falls_as_epsilon_grows_and_a_huge_one_reaches_every_clip(tmp_path):
    """The whole box at once: an attack that cannot win there is broken."""
    ledger = run(tmp_path, rows=rows_for({"pgd": PGD(steps=20)}, eps=["0.01,0.1,2.0"], attacked=[("audio", "visual")]))
    reached = [ledger.read(f"pgd-audio+visual-{level}")["reached"].to_numpy(bool) for level in range(3)]
    assert reached[0].sum() <= reached[1].sum() <= reached[2].sum()
    assert reached[2].all()


def test_conditions_are_a_product():
    budgets = {"audio": Budget("linf", 0.1), "visual": Budget("linf", 0.2, low=0.0)}
    rows = conditions({"fgsm": FGSM()}, [budgets, {"audio": budgets["audio"]}], GOAL)
    assert [row.key for row in rows] == [
        "clean",
        "fgsm-audio-0",
        "fgsm-visual-0",
        "fgsm-audio+visual-0",
        "fgsm-audio-1",
    ]
    assert rows[3].threat == ThreatModel(budgets, GOAL)
    assert Condition("clean").describe(SPECS)["attacked"] == []


def test_an_unsound_run_makes_no_report(tmp_path):
    """Found out at the end, when every part is written: the second command must not print what the first refused."""

    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, inputs):
            self.scale.data.mul_(1.00001)
            return self.scale * inputs["visual"].flatten(1)[:, :3]

    model = Wrapped(Drifting(), specs=SPECS, classes=CLASSES, label_kind="multilabel")
    with pytest.raises(ValueError, match="changed while it was evaluated: no score can be trusted"):
        run(tmp_path, model, rows=rows_for({"fgsm": FGSM()}))
    with pytest.raises(ValueError, match="cannot be trusted: the model's parameters or buffers changed"):
        Ledger(tmp_path).record()


def test_everything_that_decides_a_number_is_in_the_identity(tmp_path):
    rows = rows_for({"fgsm": FGSM()})
    run(tmp_path, rows=rows)
    goal = Untargeted(threshold=0.9)
    with pytest.raises(ValueError, match=r"differ in goal \(goal: "):
        run(tmp_path, rows=rows_for({"fgsm": FGSM()}, goal=goal), goal=goal)
    wider = tiny_fusion()
    wider.specs = {**SPECS, "visual": replace(SPECS["visual"], high=5.0)}
    with pytest.raises(ValueError, match="differ in specs"):
        run(tmp_path, wider, rows=rows)


def test_a_finished_run_is_looked_into_once(tmp_path):
    """The same weights under other code: printing the old table would be a wrong number."""
    rows = rows_for({"fgsm": FGSM()})
    run(tmp_path, rows=rows)
    changed = tiny_fusion()
    changed.classify = lambda latent: -changed.head(latent)
    with pytest.raises(ValueError, match="gave other scores than today's"):
        run(tmp_path, changed, rows=rows)


def test_buffers_that_are_not_saved_count_as_weights(tmp_path):
    class Gain(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.register_buffer("gain", torch.tensor(gain), persistent=False)

        def forward(self, inputs):
            return self.gain * inputs["visual"].flatten(1)[:, :3]

    def wrapped(gain):
        return Wrapped(Gain(gain), specs=SPECS, classes=CLASSES, label_kind="multilabel")

    run(tmp_path, wrapped(1.0), rows=rows_for({"fgsm": FGSM()}))
    with pytest.raises(ValueError, match="differ in weights"):
        run(tmp_path, wrapped(1.0001), rows=rows_for({"fgsm": FGSM()}))


def test_what_lies_between_the_stages_would_be_attacked_blindly(tmp_path):
    class Hidden(LateFusion):
        def trace(self, inputs):
            return super().trace({**inputs, "audio": inputs["audio"].flip(1)})

    model = tiny_fusion()
    model.__class__ = Hidden
    with pytest.raises(ValueError, match=r"stages \(front_end, encode, fuse, classify\) give other scores"):
        run(tmp_path, model)


def test_a_model_that_writes_into_what_it_fuses_is_attacked_all_the_same(tmp_path):
    class InPlace(LateFusion):
        def fuse(self, features):
            features["visual"].mul_(1.5)
            return super().fuse(features)

    rows = rows_for({"pgd": PGD(5)}, attacked=[("audio",)])
    model = tiny_fusion()
    with torch.no_grad():
        model.head.weight[:, 60:] *= 1.5  # the same classifier, written without the factor
    plain = run(tmp_path / "plain", model, rows=rows).read("pgd-audio-0")
    model = tiny_fusion()
    model.__class__ = InPlace
    written = run(tmp_path / "written", model, rows=rows).read("pgd-audio-0")
    np.testing.assert_allclose(plain["loss"], written["loss"], rtol=1e-3)


def test_a_model_that_writes_into_its_inputs_is_an_error(tmp_path):
    class Rude(nn.Module):
        def forward(self, inputs):
            return inputs["visual"].mul_(0.5).flatten(1)[:, :3]

    model = Wrapped(Rude(), specs=SPECS, classes=CLASSES, label_kind="multilabel")
    with pytest.raises(ValueError, match=r"the model writes into its inputs \(visual\)"):
        run(tmp_path, model)


def test_one_class_cannot_lose_its_top_hit(tmp_path):
    class One(TinySamples):
        def load(self, index):
            sample = super().load(index)
            return sample._replace(labels=sample.labels[:1])

    samples = One()
    samples.classes = ("bell",)
    model = Wrapped(nn.Identity(), specs=SPECS, classes=("bell",), label_kind="multilabel",
                    call=lambda _, given: given["visual"].flatten(1)[:, :1] - 0.5)  # fmt: skip
    with pytest.raises(ValueError, match="with one class the highest-scoring class is always that one"):
        run(tmp_path, model, samples)
    goal = Untargeted(success="label-set")
    assert (
        run(tmp_path, model, samples, rows_for({"fgsm": FGSM()}, eps=["0.6"], goal=goal), goal)
        .read("fgsm-visual-0")["reached"]
        .any()
    )


def test_rows_and_goal_must_agree(tmp_path):
    with pytest.raises(ValueError, match="must attack with the goal that is judged"):
        run(tmp_path, rows=rows_for(goal=Untargeted(success="misclassified")))
    with pytest.raises(ValueError, match="the goal is made for multilabel labels, but the model is multiclass"):
        run(tmp_path, tiny_fusion("multiclass"), TinySamples(label_kind="multiclass"))
    with pytest.raises(ValueError, match="must hold the clean condition and no condition twice"):
        run(tmp_path, rows=[CLEAN, CLEAN])
    with pytest.raises(ValueError, match="needs both an attack and a threat, or neither"):
        Condition("pgd", ("audio",), 0, PGD())
    with pytest.raises(ValueError, match="`seed` must not be negative, got -1"):
        run(tmp_path, seed=-1)


def test_folders_that_are_no_run_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('["another tool"]')
    for name, message in (
        ("file", "is a file: choose another --out"),
        ("full", "holds other files"),
        ("foreign", "is not the record of a run"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / name)


def test_a_half_written_file_never_has_its_name(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "part", b"content")
    assert not (tmp_path / "part").exists()


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    run(tmp_path)
    (tmp_path / "ledger" / "clean" / ".000000.parquet.1.unfinished").write_bytes(b"half")
    run(tmp_path)
    assert not list(tmp_path.rglob(".*"))


def test_clips_that_went_missing_do_not_spoil_a_run(tmp_path):
    rows = rows_for({"fgsm": FGSM()})
    run(tmp_path, rows=rows)
    Ledger(tmp_path).part("fgsm-audio-0", 0).unlink()
    gone = TinySamples(broken=dict.fromkeys(TinySamples().ids, "file missing"))
    with pytest.raises(ValueError, match="gave other scores than today's"):
        run(tmp_path, samples=gone, rows=rows)
    run(tmp_path, rows=rows)
    assert failures(Ledger(tmp_path)) == {}


@pytest.mark.parametrize("network", [
    nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv3d(2, 2, 1), nn.Flatten(), nn.Linear(96, 3)),
], ids=["Conv3d"])  # fmt: skip
def test_models_that_the_faster_arrangement_does_not_fit_are_attacked_plainly(tmp_path, network):
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.head = nn.Conv2d(6, 4, 1), nn.Linear(64, 3)

        def forward(self, frames):
            maps = self.convolution(frames.flatten(1, 2))
            return self.head(maps.view(len(maps), -1))

    for name, net, call in (
        ("view", View(), lambda net, given: net(given["visual"])),
        ("conv3d", network, lambda net, given: net(given["visual"].flatten(1, 2))),
    ):
        model = Wrapped(net, specs={"visual": SPECS["visual"]}, classes=CLASSES, label_kind="multilabel", call=call)
        rows = conditions({"fgsm": FGSM()}, parse_epsilons(["0.1"], {"visual": SPECS["visual"]}), GOAL)
        ledger = run(tmp_path / name, model, rows=rows)
        assert (ledger.read("fgsm-visual-0")["loss"] > ledger.read("clean")["loss"]).all()
