import copy
import csv
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from conftest import CLASSES, TinySamples, batch_of, tiny_fusion, tiny_specs
from safetensors.torch import load_file
from torch import Tensor, nn
from training_tools import TinyClips

from robustav.audio import LogMel, hertz_to_mel
from robustav.classifier import AtFeatures, Classifier, InputSpec, waveform
from robustav.data.av_events import AvEvents, AvEventsConfig
from robustav.ledger import digest_of_model
from robustav.models.checkpoints import read_checkpoint
from robustav.models.zoo import EMBEDDED, build_model, load_model
from robustav.training import augment, loop, states
from robustav.training.augment import AUGMENTATIONS, Augmentation, parse_augmentation
from robustav.training.data import Loaded, Scenes, balanced_weights, batches_of, order_of, training_set
from robustav.training.logs import log_lines, tensorboard_scalars
from robustav.training.loop import follow, train
from robustav.training.method import Batch, Method, Work
from robustav.training.methods import METHODS, code_of, described, parse_method
from robustav.training.recipe import SCORES, Recipe, scores_of
from robustav.training.settings import parse_call, read_settings, settings_of
from robustav.training.trained import CARD, Trained, initial, load_trained, read_trained
from robustav.training.weight_perturbation import matrices, perturb


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Settings


@dataclass(frozen=True)
class Settings:
    count: int = 3
    share: float = 0.5
    wanted: bool = True
    place: Literal["any", "input"] = "any"
    inner: str = "pgd"
    most: int | None = None


def test_settings_are_read_by_their_annotations() -> None:
    text = "it(count=4, share=4/8, wanted=no, place=input, inner=pgd(steps=1,reach=2), most=7)"
    name, given = parse_call(text, "method")
    assert name == "it"
    assert read_settings(Settings, given, name) == {
        "count": 4,
        "share": 0.5,
        "wanted": False,
        "place": "input",
        "inner": "pgd(steps=1,reach=2)",
        "most": 7,
    }
    assert read_settings(Settings, {"most": "none"}, name) == {"most": None}
    assert parse_call(" it ", "method") == ("it", {}) == parse_call("it()", "method")
    assert settings_of(Settings) == "count=3, share=0.5, wanted=True, place=any, inner=pgd, most=None"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("it(count=4.5)", r"`count` of it must be a whole number, got '4.5'"),
        ("it(share=much)", r"`share` of it must be a number, got 'much'"),
        ("it(wanted=maybe)", r"`wanted` of it must be true or false, got 'maybe'"),
        ("it(place=latent)", r"`place` of it must be one of any, input, got 'latent'"),
        ("it(cuont=4)", r"it has no setting 'cuont'; it has count=3, share=0.5"),
        ("it(count=4", r"`method` is written as NAME or NAME\(key=value, ...\), got 'it\(count=4'"),
        ("it(count)", r"got 'count' in 'it\(count\)'"),
        ("it(count=1,count=2)", r"a setting is given once, got 'count' twice"),
        ("", r"`method` is written as NAME"),
    ],
)
def test_bad_settings_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(Settings, parse_call(text, "method")[1], "it")


# Augmentation


def tones(batch: int = 4, time: int = 800) -> Tensor:
    return torch.rand(batch, time, generator=generator(3)) - 0.5


def test_a_louder_clip_is_the_same_clip_within_its_decibels() -> None:
    x = tones(200)
    gain = augment.louder(x, 6.0, generator()) / x
    torch.testing.assert_close(gain, gain[:, :1].expand_as(gain))
    decibels = 20 * gain[:, 0].log10()
    assert -6 <= decibels.min() < -5.5 and 5.5 < decibels.max() <= 6.0


def test_a_shift_in_time_is_circular_and_within_its_share() -> None:
    x = torch.zeros(300, 100).index_fill(1, torch.tensor(50), 1.0)
    moved = augment.shifted_in_time(x, 0.2, generator()).argmax(1) - 50
    assert moved.min() == -10 and moved.max() == 10
    anywhere = augment.shifted_in_time(x, 1.0, generator())
    assert anywhere.argmax(1).unique().numel() > 80 and torch.equal(anywhere.sum(1), x.sum(1))
    ramp = torch.arange(100.0)[None]
    shift = int(augment.shifted_in_time(ramp, 1.0, generator(5))[0, 0])
    assert torch.equal(augment.shifted_in_time(ramp, 1.0, generator(5)), ramp.roll(-shift, 1))


def test_a_silenced_stretch_is_one_stretch_and_within_its_share() -> None:
    x = torch.ones(4000, 100)
    silent = augment.silenced(x, 0.3, generator()) == 0
    length = silent.sum(1)
    assert length.max() <= 31 and length.max() > 25 and length.float().mean() == pytest.approx(15, abs=2)
    edges = (silent.int().diff(dim=1) != 0).sum(1)
    assert edges.max() <= 2, "more than one stretch"
    assert silent.any(0).all(), "some place is never silenced"


def test_a_stopped_band_is_gone_and_the_rest_is_as_it_was() -> None:
    rate, x = 16_000, tones(64, 4000)
    before, after = (torch.fft.rfft(y).abs() for y in (x, augment.band_stopped(x, 0.3, rate, generator())))
    gone = after < 1e-3 * before.mean()
    torch.testing.assert_close(after[~gone], before[~gone], rtol=1e-3, atol=1e-3)
    mel = hertz_to_mel(torch.linspace(0, rate / 2, before.shape[1])) / hertz_to_mel(rate / 2)
    widths = [mel[row].max() - mel[row].min() for row in gone if row.any()]
    assert 0.25 < max(widths) <= 0.3
    assert (gone.int().diff(dim=1) != 0).sum(1).max() <= 2, "more than one band"


def test_what_a_mask_on_a_spectrogram_hides_is_hidden_from_any_front_end() -> None:
    x = tones(16, 16_000)
    plain, masked = (LogMel()(y) for y in (x, augment.band_stopped(x, 0.4, 16_000, generator(1))))
    fallen = (plain - masked).mean(2)[:, 0]  # [clip, mel]
    assert (fallen.amax(1) > 0.5).any() and fallen.median().abs() < 0.05


def test_a_shift_in_space_moves_all_frames_alike() -> None:
    x = torch.rand(300, 2, 3, 6, 7, generator=generator(1))
    moved = augment.shifted_in_space(x, 1, generator())
    seen = set()
    for before, after in zip(x, moved, strict=True):
        found = [s for s in itertools.product((-1, 0, 1), repeat=2) if torch.equal(before.roll(s, (-2, -1)), after)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 9


def test_half_the_pictures_are_flipped() -> None:
    x = torch.rand(200, 2, 3, 4, 5, generator=generator(1))
    flipped = augment.flipped(x, generator())
    same = (flipped == x).flatten(1).all(1)
    assert torch.equal(flipped[~same], x[~same].flip(-1)) and 70 < same.sum() < 130


def test_augmentation_stays_in_range_and_depends_on_nothing_but_its_draws() -> None:
    specs = tiny_specs()
    x = {m: y * 0 + specs[m].high for m, y in batch_of(specs).items()}
    full = AUGMENTATIONS["full"]
    assert all(spec.low <= y.min() and y.max() <= spec.high for spec, y in _zipped(specs, full(x, specs, generator())))
    x = batch_of(specs)
    first, turned = full(x, specs, generator(4)), full(dict(reversed(list(x.items()))), specs, generator(4))
    assert all(torch.equal(first[m], turned[m]) and not torch.equal(first[m], x[m]) for m in x)
    assert list(first) == list(x)


def _zipped(specs: dict[str, InputSpec], x: dict[str, Tensor]) -> Iterator[tuple[InputSpec, Tensor]]:
    return ((specs[m], x[m]) for m in x)


@pytest.mark.parametrize("part", ["gain_db", "time_shift", "time_mask", "band_mask", "pixels", "flip"])
def test_each_part_of_the_augmentation_is_switched_by_its_setting(part: str) -> None:
    specs, x = tiny_specs(), batch_of(tiny_specs(), 16)
    on = getattr(AUGMENTATIONS["full"], part)
    changed = parse_augmentation(f"none({part}={on})")(x, specs, generator())
    assert torch.equal(changed["audio"], x["audio"]) == (part in ("pixels", "flip"))
    assert torch.equal(changed["visual"], x["visual"]) == (part not in ("pixels", "flip"))
    nothing = AUGMENTATIONS["none"](x, specs, generator())
    assert all(torch.equal(nothing[m], x[m]) for m in x)


def test_features_are_not_augmented() -> None:
    spec = {"audio": InputSpec((8,), -math.inf, math.inf, "feature")}
    x = {"audio": torch.randn(3, 8)}
    assert torch.equal(AUGMENTATIONS["full"](x, spec, generator())["audio"], x["audio"])


def test_bad_augmentations_are_refused() -> None:
    with pytest.raises(ValueError, match="`augment` must be one of none, light, full, got 'heavy'"):
        parse_augmentation("heavy")
    with pytest.raises(ValueError, match=r"`time_mask` is a share and must lie in \[0, 1\], got 2"):
        Augmentation(time_mask=2)
    with pytest.raises(ValueError, match="`pixels` must not be negative, got -1"):
        Augmentation(pixels=-1)


# Data

SMALL = AvEventsConfig(seconds=0.25, frames=2, frame_size=16, train=12, validation=4, test=4)


def test_scenes_are_what_the_samples_are() -> None:
    samples = AvEvents("train", SMALL)
    scenes = Scenes(samples, ["audio", "visual"])
    inputs = scenes.inputs(torch.tensor([3, 0]))
    for place, row in enumerate((3, 0)):
        sample = samples.load(row)
        assert all(torch.equal(inputs[m][place], sample.inputs[m]) for m in inputs)
        assert torch.equal(scenes.targets[row], sample.labels)
    some = Scenes(samples, ["visual"], [2, 5])
    assert some.ids == (samples.ids[2], samples.ids[5]) and list(some.inputs(torch.tensor([1]))) == ["visual"]
    assert torch.equal(some.inputs(torch.tensor([1]))["visual"][0], samples.load(5).inputs["visual"])
    assert torch.equal(some.targets, samples.labels[[2, 5]].float()) and some.digest == samples.digest


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("memory", [0, 2000, 2**30])
def test_loaded_clips_are_the_samples_to_16_and_8_bits_kept_or_not(label_kind: str, memory: int) -> None:
    samples = TinySamples(7, label_kind, broken={"clip 2": "its file is empty"})
    loaded = Loaded(samples, tiny_specs(), memory=memory)
    assert loaded.skipped == {"clip 2": "its file is empty"} and "clip 2" not in loaded.ids
    rows = torch.tensor([5, 0, 2])
    inputs = loaded.inputs(rows)
    for place, row in enumerate(rows.tolist()):
        sample = samples.load(int(loaded.ids[row].split()[1]))
        torch.testing.assert_close(inputs["audio"][place], sample.inputs["audio"], rtol=0, atol=0.51 / 32768)
        torch.testing.assert_close(inputs["visual"][place], sample.inputs["visual"], rtol=0, atol=0.51 / 255)
    assert loaded.targets.shape == (6, 3) and torch.equal(loaded.targets.sum(1), torch.ones(6))
    assert [int(row.argmax()) for row in loaded.targets] == [0, 1, 0, 1, 2, 0]


def test_loaded_clips_do_not_depend_on_whether_they_were_kept() -> None:
    rows = torch.arange(5)
    kept, read_again = (Loaded(TinySamples(5), tiny_specs(), memory=m).inputs(rows) for m in (2**30, 0))
    assert all(torch.equal(kept[m], read_again[m]) for m in kept)


def test_clips_that_nobody_labelled_are_left_out_with_the_reason() -> None:
    class Unlabelled(TinySamples):
        def load(self, index: int):
            sample = super().load(index)
            return sample._replace(labels=None) if self.kept != index else sample

    samples = Unlabelled(3)
    samples.kept, samples.unknown_labels = 0, {"tap": ["clip 1", "clip 2"]}
    loaded = Loaded(samples, tiny_specs())
    assert loaded.ids == ("clip 0",) and loaded.unknown_labels == {"tap": 2}
    assert loaded.skipped == dict.fromkeys(("clip 1", "clip 2"), "it has no label that the model knows")
    with pytest.raises(ValueError, match=r"no clip of tiny can be trained on \(clip 0: torn; clip 1: torn\)$"):
        Loaded(TinySamples(2, broken={"clip 0": "torn", "clip 1": "torn"}), tiny_specs())
    samples.kept = None
    with pytest.raises(
        ValueError, match=r"clip 2: it has no label that .*\): the model's classes are bell, clap, kick$"
    ):
        Loaded(samples, tiny_specs())


def test_a_clip_that_went_away_is_named() -> None:
    samples = TinySamples(2)
    loaded = Loaded(samples, tiny_specs(), memory=0)
    samples.broken["clip 1"] = "no such file"
    with pytest.raises(ValueError, match="clip 1 could be read before and cannot any more: no such file"):
        loaded.inputs(torch.tensor([1]))


def test_balanced_draws_show_every_class_alike() -> None:
    targets = torch.zeros(400, 4)
    targets[:300, 0], targets[300:330, 1], targets[330:340, 2], targets[:5, 3] = 1, 1, 1, 1  # 60 clips without labels
    weights = balanced_weights(targets)
    assert weights[0] == pytest.approx(1 / 300 + 1 / 5) and weights[320] == pytest.approx(1 / 30)
    assert weights[340:].sum() == pytest.approx(1)
    drawn = targets[torch.cat([order_of(targets, True, generator(s)) for s in range(50)])]
    shares = drawn.mean(0)
    assert shares[1] == pytest.approx(0.2, abs=0.02) and shares[2] == pytest.approx(0.2, abs=0.02)
    assert drawn.sum(1).eq(0).float().mean() == pytest.approx(0.2, abs=0.02)
    plain = order_of(targets, False, generator())
    assert torch.equal(plain.sort().values, torch.arange(400)) and not torch.equal(plain, torch.arange(400))


def test_processes_share_every_batch_and_what_fills_none_sits_out() -> None:
    order = order_of(torch.ones(22, 1), False, generator())
    alone = list(batches_of(order, 4))
    assert [len(rows) for rows in alone] == [4] * 5
    shared = [list(batches_of(order, 4, rank, 2)) for rank in (0, 1)]
    for whole, first, second in zip(alone, *shared, strict=True):
        assert len(first) == len(second) == 2
        assert set(whole.tolist()) == {*first.tolist(), *second.tolist()}
    assert len(torch.cat(alone).unique()) == 20


# Methods


def test_methods_are_parsed_by_name_and_described() -> None:
    assert parse_method("erm") == METHODS["erm"]()
    assert repr(parse_method("pgd-at(steps=3)")).startswith("PGDTraining(steps=3")
    with pytest.raises(ValueError, match=r"no method 'pgd': there are erm, "):
        parse_method("pgd")
    with pytest.raises(ValueError, match=r"erm has no setting 'steps'; it has none"):
        parse_method("erm(steps=3)")
    for name, (words, _) in described().items():
        assert words and "\n" not in words, f"{name} has no docstring"
        assert isinstance(parse_method(name), Method)


OWN = """
from dataclasses import dataclass
from robustav.training.method import Method

@dataclass(frozen=True)
class Scaled(Method):
    \"\"\"A loss times something.\"\"\"
    times: float = 2.0

    def losses(self, work, batch):
        return self.times * super().losses(work, batch)

def function():
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user's own method, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    path = tmp_path / "own_method.py"
    path.write_text(OWN)
    return path


def test_a_method_of_the_users_own_is_named_by_its_place(own: Path) -> None:
    method = parse_method("own_method.py:Scaled(times=3)")
    assert repr(method) == "Scaled(times=3.0)" and isinstance(method, Method)
    assert repr(parse_method("own_method:Scaled")) == "Scaled(times=2.0)"
    assert code_of("own_method:Scaled") == code_of("own_method.py:Scaled(times=3)") != {} == code_of("pgd-at(steps=3)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own_method.py:Scaled(much=3)", r"own_method.py:Scaled has no setting 'much'; it has times=2.0"),
        (
            "own_method.py:Other",
            r"method 'own_method.py:Other': own_method.py has no callable 'Other'; it has .*Scaled",
        ),
        ("other.py:Scaled", r"method 'other.py:Scaled': there is no file 'other.py'"),
        ("others.code:Scaled", r"method 'others.code:Scaled': cannot import 'others'"),
        (
            "own_method.py:function",
            r"method 'own_method.py:function' must be a class made from .*Method, got <function",
        ),
        ("own_method.py:dataclass", r"must be a class made from .*Method, got <function"),
    ],
)
def test_what_is_no_method_is_refused(own: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


# Recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "no method 'magic'"),
        ({"augment": "heavy"}, "`augment` must be one of"),
        ({"optimizer": "adam"}, "`optimizer` must be one of adamw, sgd, got 'adam'"),
        ({"precision": "16"}, "`precision` must be one of 32, bf16, got '16'"),
        ({"keep": "first"}, "`keep` must be one of last, best, got 'first'"),
        ({"score": "accuracy"}, "`score` must be one of mAP, top1, got 'accuracy'"),
        ({"epochs": 0}, "`epochs` must be above 0, got 0"),
        ({"learning_rate": math.nan}, "`learning_rate` must be above 0, got nan"),
        ({"clip_norm": -1.0}, "`clip_norm` must be at least 0, got -1.0"),
        ({"momentum": 0.5}, "`momentum` is of sgd, got 0.5 with adamw"),
        ({"ema": 1.0}, "`ema` must be at least 0 and below 1, got 1.0"),
        ({"ramp": -0.1}, "`ramp` must be at least 0 and below 1, got -0.1"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"data": "av-events/test"}, "`data` must be clips that no attack is judged on, av-events/train"),
        ({"data": "av-events"}, "`data` must be clips that no attack is judged on"),
        ({"validation": "av-events/test"}, "`validation` must be clips that no attack is judged on, av-events/valid"),
        ({"validation": "av-events"}, "`validation` must be clips that no attack is judged on"),
        ({"validation": "av-events/train"}, "`validation` must be other clips than `data`"),
        ({"data": "av-events/validation", "keep": "best"}, "`keep` needs a score on clips not trained on"),
        ({"method": "guided-mixup(start=3)", "epochs": 3}, "`start` must be below the number of epochs, 3, .* got 3"),
        ({"method": "guided-fgsm", "balanced": True}, "`balanced` does nothing where guided mix-up draws its clips"),
        ({"method": "crmt", "epochs": 1}, "`epochs` must be at least 2, one for each step of crmt, got 1"),
        ({"method": "gaussian-noise(sigma=nan)"}, "`sigma` of gaussian-noise must be a number, got 'nan'"),
        ({"method": "awp(gamma=inf)"}, "`gamma` of awp must be a number, got 'inf'"),
        ({"data": "my.csv", "patience": 2}, "`patience` needs a score on clips not trained on"),
        ({"data": "my.csv", "keep": "best"}, "`keep` needs a score on clips not trained on"),
    ],
)
def test_contradictory_recipes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_what_is_validated_on() -> None:
    assert Recipe().validates == "av-events/validation"
    assert Recipe(data="my.csv").validates is None
    assert Recipe(data="my.csv", validation="other.csv", patience=2).validates == "other.csv"


def test_top1_is_of_clips_that_have_labels() -> None:
    logits, targets = (
        torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
    )
    assert scores_of(logits, targets, "multilabel") == {"mAP": pytest.approx((1 / 2 + 1 / 3) / 2), "top1": 0.5}
    assert scores_of(logits, targets, "multiclass") == {"top1": 0.5}


def test_learning_rates_rise_then_fall_along_a_cosine() -> None:
    recipe, steps = Recipe(learning_rate=2.0, warmup=0.25), 400
    rates = [recipe.rate(step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(2 / 101) and rates[100] == 2.0 == max(rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:101])) and all(
        a > b for a, b in itertools.pairwise(rates[100:])
    )
    assert rates[250] == pytest.approx(1.0) and 0 < rates[-1] < 1e-3
    flat = Recipe(learning_rate=2.0, warmup=0.0, cosine=False)
    assert {flat.rate(step, steps) for step in range(steps)} == {2.0}
    assert Recipe(learning_rate=2.0, warmup=0.0).rate(0, steps) == 2.0


def test_budgets_grow_over_the_ramp_and_are_whole_after_it() -> None:
    recipe, steps = Recipe(ramp=0.25), 400
    shares = [recipe.share(step, steps) for step in range(steps)]
    assert shares[0] == pytest.approx(1 / 101) and set(shares[100:]) == {1.0}
    assert all(a < b for a, b in itertools.pairwise(shares[:101]))
    assert Recipe().share(0, steps) == 1.0


def test_budgets_are_those_of_the_command_line() -> None:
    model = tiny_fusion()
    budgets = Recipe(eps="audio=0.002,visual=4/255").budgets(model)
    assert float(budgets["audio"].epsilon) == 0.002 and float(budgets["visual"].epsilon) == 4 / 255
    assert set(Recipe(attacked="audio").budgets(model)) == {"audio"}
    assert set(Recipe(attacked="both").budgets(model)) == {"audio", "visual"} == set(Recipe().budgets(model))
    assert Recipe(eps="30dB").budgets(model)["audio"].snr_db == 30
    assert Recipe(norm="l2").budgets(model)["audio"].norm == "l2"
    with pytest.raises(ValueError, match="`eps` must be one epsilon"):
        Recipe(eps="0.1,0.2").budgets(model)
    with pytest.raises(ValueError, match=r"`attacked` must name modalities .* audio or visual .* got 'smell'"):
        Recipe(attacked="smell").budgets(model)
    with pytest.raises(ValueError, match=r"`attacked` must name modalities .* got 'visual'"):
        Recipe(attacked="both", eps="audio=0.1").budgets(model)


def test_scores_go_with_the_labels() -> None:
    assert Recipe().declared_score("multilabel") == "mAP" and Recipe().declared_score("multiclass") == "top1"
    assert Recipe(score="top1").declared_score("multilabel") == "top1"
    with pytest.raises(ValueError, match="`score` of a multiclass model must be top1, got 'mAP'"):
        Recipe(score="mAP").declared_score("multiclass")


# The loop


class Tiny:
    """Random clips in place of named data, a tiny fusion in place of named models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.label_kind, self.methods, self.read, self.dropout = "multilabel", METHODS.copy(), 0, 0.2
        monkeypatch.setattr(loop, "training_set", self.training_set)
        monkeypatch.setattr("robustav.training.trained.build_model", lambda name: self.model())
        monkeypatch.setattr("robustav.training.methods.METHODS", self.methods)

    def model(self) -> Classifier:
        seed = torch.randint(1000, ()).item()  # tiny_fusion sets the global generator's seed to 3
        model = tiny_fusion(self.label_kind)
        model.encoders["audio"].append(nn.Dropout(self.dropout))
        with torch.no_grad():
            model.head.weight.normal_(generator=generator(seed), std=0.1)
        return model

    def training_set(self, source: str, model: Classifier, **_: object) -> TinyClips:
        self.read += 1
        return TinyClips(24 if source.endswith("train") else 11, self.label_kind, model.specs)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Tiny:
    return Tiny(monkeypatch)


def short(**changes: object) -> Recipe:
    return Recipe(**{"epochs": 3, "batch_size": 6, "augment": "none", **changes})


def lines_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


class Killed(Exception):
    pass


def kill_at(step: int):
    def progress(what: str, done: int, total: int) -> None:
        if what == "training" and done == step:
            raise Killed

    return progress


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
def test_a_training_learns_and_says_what_it_did(tiny: Tiny, tmp_path: Path, label_kind: str) -> None:
    tiny.label_kind = label_kind
    trained = train(short(epochs=12, learning_rate=0.02, warmup=0.1), tmp_path / "a")
    lines = lines_of(tmp_path / "a")
    assert len(lines) == 12 and float(lines[-1]["loss"]) < 0.6 * float(lines[0]["loss"])
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"model.safetensors", "card.json", "log.csv"}
    card = json.loads((tmp_path / "a/card.json").read_text())
    assert card == trained.card and card["recipe"]["epochs"] == 12 and card["label_kind"] == label_kind
    assert {k: trained.cost[k] for k in ("clips", "forwards", "backwards")} == dict.fromkeys(
        ("clips", "forwards", "backwards"), 12 * 24
    )
    assert trained.cost["forwards_a_clip"] == trained.cost["backwards_a_clip"] == 1
    assert trained.cost["peak_memory_mib"] > 50 and 0 < trained.cost["seconds"] < 60
    assert trained.cost["cpu_seconds"] > 0
    names = ("mAP", "top1") if label_kind == "multilabel" else ("top1",)
    assert trained.scores == {name: float(lines[-1][name]) for name in names}
    assert card["data"]["train"] == {"name": "tiny", "sha256": "24".rjust(64, "0"), "clips": 24}
    assert card["budgets"] == {}  # nobody asked for them


def test_the_trained_model_scores_as_the_card_says(tiny: Tiny, tmp_path: Path) -> None:
    from robustav.metrics.tagging import mean_average_precision

    trained = train(short(learning_rate=0.02), tmp_path / "a")
    model, clips = trained.model(), TinyClips(11)
    with torch.no_grad():
        logits = model(clips.inputs(torch.arange(11)))
    assert not model.training
    assert mean_average_precision(logits.double().numpy(), clips.targets.numpy()) == pytest.approx(
        trained.scores["mAP"]
    )


def test_plain_training_is_what_a_hand_written_loop_does(tiny: Tiny, tmp_path: Path) -> None:
    tiny.dropout = 0.0
    recipe = short(optimizer="sgd", momentum=0.5, ema=0.0, weight_decay=0.0, clip_norm=0.7, epochs=2)
    train(recipe, tmp_path / "a")
    from robustav.randomness import draw_for, seeded

    with seeded(0, "weights"):
        model = tiny.model().train()
    clips, step = TinyClips(24), 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    for epoch in range(2):
        for rows in torch.randperm(24, generator=draw_for(0, "order", str(epoch))).split(6):
            optimizer.param_groups[0]["lr"] = recipe.rate(step, 8)
            logits = model(clips.inputs(rows))
            loss = (
                torch.nn.functional.binary_cross_entropy_with_logits(logits, clips.targets[rows], reduction="sum") / 6
            )
            optimizer.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for p in model.parameters():
                p.grad *= min(1, 0.7 / norm)
            optimizer.step()
            step += 1
    found = load_file(tmp_path / "a/model.safetensors")
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_the_running_mean_follows_weights_and_statistics() -> None:
    model = tiny_fusion()
    averaged = copy.deepcopy(model)
    before = {name: x.clone() for name, x in averaged.state_dict().items()}
    with torch.no_grad():
        for x in model.state_dict().values():
            x.add_(2)
    follow(averaged, model, 0.75)
    for name, x in averaged.state_dict().items():
        if x.is_floating_point():
            torch.testing.assert_close(x, before[name] + 0.5)
        else:
            assert torch.equal(x, before[name] + 2)
    follow(averaged, model, 0.0)
    assert digest_of_model(averaged) == digest_of_model(model)


def test_the_running_mean_is_kept_and_soon_leaves_the_random_weights(tiny: Tiny, tmp_path: Path) -> None:
    kept = [load_file(train(short(ema=e), tmp_path / str(e)).folder / "model.safetensors") for e in (0.0, 0.5, 0.999)]
    last = kept[0]["head.weight"]
    apart = [(one["head.weight"] - last).norm() for one in kept]
    path = (initial(short(), Method()).state_dict()["head.weight"] - last).norm()
    assert apart[0] == 0 < apart[1] < apart[2] < 0.7 * path


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("erm", 1),
        ("erm", 12),
        ("manifold-mixup", 7),
        ("fgsm-rs", 4),
        ("fgsm-rs", 7),
        ("remembered", 7),
        ("guided-remembered", 12),
    ],
)
def test_a_killed_training_ends_with_the_same_bytes(tiny: Tiny, tmp_path: Path, method: str, step: int) -> None:
    recipe = short(method=method, augment="full", keep="best", balanced="guided" not in method)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        train(recipe, tmp_path / "killed", progress=kill_at(step))
    assert not (tmp_path / "killed/model.safetensors").exists()
    again = train(recipe, tmp_path / "killed")
    assert bytes_of(again.folder) == bytes_of(whole.folder)
    assert {k: again.cost[k] for k in ("clips", "forwards", "backwards")} == {
        k: whole.cost[k] for k in ("clips", "forwards", "backwards")
    }
    logs = [lines_of(whole.folder), lines_of(again.folder)]
    for line in itertools.chain(*logs):
        line.pop("seconds")
    assert logs[0] == logs[1]
    assert not list(again.folder.glob("state*"))


def test_a_killed_training_repeats_no_finished_epoch(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(short(), tmp_path / "a", progress=kill_at(6))
    steps: list[int] = []
    train(short(), tmp_path / "a", progress=lambda what, done, total: steps.append(done))
    assert steps == list(range(5, 13))


def test_a_kill_while_saving_leaves_the_epoch_before(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(short(), tmp_path / "whole")
    real, saved = states.write_atomically, []

    def torn(path: Path, content: bytes) -> None:
        if path.name.startswith("state"):
            saved.append(path)
            if len(saved) == 2:
                raise Killed
        real(path, content)

    monkeypatch.setattr(states, "write_atomically", torn)
    with pytest.raises(Killed):
        train(short(), tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").glob("state*")] == ["state-00001-0.pt"]
    assert bytes_of(train(short(), tmp_path / "a").folder) == bytes_of(whole.folder)


def test_the_seed_decides_and_no_global_generator_moves(tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train(short(augment="full"), tmp_path / "first")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert bytes_of(train(short(augment="full"), tmp_path / "second").folder) == bytes_of(first.folder)
    other = train(short(augment="full", seed=1), tmp_path / "other")
    assert bytes_of(other.folder) != bytes_of(first.folder)
    assert other.card["initial_weights"] != first.card["initial_weights"]


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "light"},
        {"balanced": True},
        {"learning_rate": 0.01},
        {"weight_decay": 0.5},
        {"warmup": 0.0},
        {"cosine": False},
        {"clip_norm": 0.1},
        {"optimizer": "sgd"},
        {"batch_size": 8},
        {"method": "mixup"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_each_setting_changes_the_weights(tiny: Tiny, tmp_path: Path, changes: dict) -> None:
    plain, other = train(short(), tmp_path / "a"), train(short(**changes), tmp_path / "b")
    assert bytes_of(plain.folder) != bytes_of(other.folder)


def test_the_adversary_of_a_step_has_the_budget_of_the_ramp(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(self: object, work: Work, batch: Batch) -> Tensor:
        seen.append({m: budget.radius(batch.inputs[m]) for m, budget in work.budgets.items()})
        return work.loss(work.trace(batch.inputs).logits, batch.targets)

    monkeypatch.setattr(Method, "losses", watched)
    recipe = short(eps="audio=0.01,visual=0.02", ramp=0.5)
    train(recipe, tmp_path / "a")
    steps = len(seen)
    assert [radii["audio"] for radii in seen] == pytest.approx([0.01 * recipe.share(s, steps) for s in range(steps)])
    assert all(radii["visual"] == pytest.approx(2 * radii["audio"]) for radii in seen) and seen[0]["audio"] < 0.01


def test_half_precision_learns_at_the_weights_of_the_step(tiny: Tiny, tmp_path: Path) -> None:
    recipe = {"epochs": 2, "batch_size": 2, "learning_rate": 0.03}
    fine, coarse = (lines_of(train(short(**recipe, precision=p), tmp_path / p).folder) for p in ("32", "bf16"))
    losses = [[float(line["loss"]) for line in lines] for lines in (fine, coarse)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_half_precision_sees_weights_that_are_perturbed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    def watched(self: object, work: Work, batch: Batch) -> Tensor:
        plain = work.loss(work.trace(batch.inputs).logits, batch.targets).mean()
        weights = matrices(work.model)
        restore = perturb(weights, torch.autograd.grad(plain, weights, allow_unused=True), 0.2)
        moved = work.loss(work.trace(batch.inputs).logits, batch.targets)
        seen.append((plain.item(), moved.mean().item()))
        restore()
        return moved

    monkeypatch.setattr(Method, "losses", watched)
    train(short(precision="bf16"), tmp_path / "a")
    assert all(moved > plain + 0.01 for plain, moved in seen)


@pytest.mark.parametrize(("method", "ramp", "first"), [("pgd-at(steps=1)", 0.5, 5), ("crmt(second=0.5)", 0.0, 5)])
def test_the_best_weights_are_of_epochs_that_train_in_earnest(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, ramp: float, first: int
) -> None:
    scores = iter(range(9, 0, -1))
    monkeypatch.setitem(SCORES, "mAP", lambda *_: next(scores) / 10)
    recipe = short(method=method, ramp=ramp, epochs=8, keep="best", patience=2, eps="0.1")
    trained = train(recipe, tmp_path / "a")
    assert f"epoch {first} of 8" in trained.card["weights"]
    assert len(lines_of(tmp_path / "a")) == first + 2  # then out of patience


def test_a_training_is_not_gone_on_with_by_another_version(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        train(short(), tmp_path / "a", progress=kill_at(6))
    monkeypatch.setattr("robustav.__version__", "0.0.0")
    with pytest.raises(ValueError, match="began otherwise; they differ in versions"):
        train(short(), tmp_path / "a")


def test_a_model_draws_other_numbers_than_its_method(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = []

    def watched(self: object, work: Work, batch: Batch) -> Tensor:
        same.append(torch.equal(torch.randn(8), torch.randn(8, generator=work.generator)))
        return work.loss(work.trace(batch.inputs).logits, batch.targets)

    monkeypatch.setattr(Method, "losses", watched)
    train(short(), tmp_path / "a")
    assert same and not any(same)


def test_budgets_are_told_of_methods_that_ask_for_them(tiny: Tiny, tmp_path: Path) -> None:
    card = train(short(method="n-fgsm", ramp=0.5), tmp_path / "a").card
    assert card["budgets"]["audio"].startswith("linf, 0.003 amplitude")


def test_momentum_is_that_of_sgd(tiny: Tiny, tmp_path: Path) -> None:
    kept = [bytes_of(train(short(optimizer="sgd", momentum=m), tmp_path / str(m)).folder) for m in (0.0, 0.9)]
    assert kept[0] != kept[1]


def test_a_method_of_the_users_own_trains_and_its_file_may_not_change(tiny: Tiny, own: Path) -> None:
    recipe = short(method="own_method.py:Scaled(times=3)")
    trained = train(recipe, "a")
    assert bytes_of(trained.folder) != bytes_of(train(short(), "b").folder)
    assert load_trained("a").training is False
    with pytest.raises(Killed):
        train(recipe, "c", progress=kill_at(6))
    with pytest.raises(Killed):
        train(recipe, "c", progress=kill_at(10))
    assert train(recipe, "a") == trained
    own.write_text(OWN.replace("self.times *", "2 * self.times *"))
    for folder in ("a", "c"):
        with pytest.raises(ValueError, match=r"holds a training by own_method.* as its file was before it changed"):
            train(recipe, folder)


def test_a_finished_folder_returns_at_once(tiny: Tiny, tmp_path: Path) -> None:
    first = train(short(), tmp_path / "a")
    before = tiny.read
    assert train(short(), tmp_path / "a") == first and tiny.read == before


def test_a_folder_holds_one_recipe(tiny: Tiny, tmp_path: Path) -> None:
    train(short(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds another training; they differ in epochs \(3 there, 4 now\): choose"):
        train(short(epochs=4), tmp_path / "a")
    with pytest.raises(Killed):
        train(short(), tmp_path / "b", progress=kill_at(5))
    with pytest.raises(ValueError, match=r"they differ in method \('erm' there, 'mixup' now\)"):
        train(short(method="mixup"), tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files: choose another --out"):
        train(short(), tmp_path / "c")
    with pytest.raises(ValueError, match="is a file: choose another --out"):
        train(short(), tmp_path / "c/notes.txt")


def test_a_killed_training_goes_on_only_with_the_same_data(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(Killed):
        train(short(), tmp_path / "a", progress=kill_at(5))
    monkeypatch.setattr(loop, "training_set", lambda source, model, **_: TinyClips(30))
    with pytest.raises(ValueError, match="holds a training that began otherwise; they differ in data"):
        train(short(), tmp_path / "a")


def test_early_stopping_and_the_best_weights(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.5, 0.4, 0.45, 0.3, 0.6])
    monkeypatch.setattr(loop, "scores_of", lambda *_: {"mAP": next(scores), "top1": 0.0})
    stopped = train(short(epochs=6, patience=2, keep="best"), tmp_path / "a")
    assert stopped.scores["mAP"] == 0.5 and stopped.card["weights"].startswith("best by mAP, epoch 2 of 6")
    assert len((tmp_path / "a/log.csv").read_text().splitlines()) == 1 + 4
    assert stopped.cost["clips"] == 4 * 24
    scores = iter([0.2, 0.5, 0.4, 0.45])
    monkeypatch.setattr(loop, "scores_of", lambda *_: {"mAP": next(scores), "top1": 0.0})
    last = train(short(epochs=4, warmup=0.3 * 6 / 4), tmp_path / "b")
    assert last.scores["mAP"] == 0.45 and last.card["weights"].startswith("last, epoch 4 of 4")
    assert bytes_of(tmp_path / "a") != bytes_of(tmp_path / "b")


def test_the_best_weights_are_those_of_the_best_epoch(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    scores = iter([0.2, 0.5, 0.4])
    monkeypatch.setattr(loop, "scores_of", lambda *_: {"mAP": next(scores), "top1": 0.0})
    seen: list[Tensor] = []

    class Watching(Method):
        def begin_epoch(self, work: Work) -> None:
            seen.append(work.averaged.head.weight.clone())

    tiny.methods["watching"] = Watching
    train(short(method="watching", keep="best"), tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a/model.safetensors")["head.weight"], seen[2])


@dataclass(frozen=True)
class Broken(Method):
    """A loss that breaks at some step, or whose gradient does."""

    step: int = 5
    gradient: bool = False

    def losses(self, work: Work, batch: Batch) -> Tensor:
        values = super().losses(work, batch)
        if work.step + 1 != self.step:
            return values
        return (values - values.detach()).sqrt() if self.gradient else values * math.nan


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_step_and_clips(tiny: Tiny, tmp_path: Path, what: str) -> None:
    tiny.methods["broken"] = Broken
    recipe = short(method=f"broken(gradient={what == 'gradient'})")
    clips = r"clip \d+, clip \d+, clip \d+, clip \d+, clip \d+ and 1 more"
    with pytest.raises(ValueError, match=rf"the {what} of step 5 \(epoch 2\) is nan, with the clips {clips}: lower"):
        train(recipe, tmp_path / "a")
    assert not (tmp_path / "a/model.safetensors").exists()


@dataclass(frozen=True)
class Elsewhere(Method):
    """Learns from clips of its own choice, one of them twice, and breaks at once."""

    loads: ClassVar[bool] = False

    def losses(self, work: Work, batch: Batch) -> Tensor:
        own = work.batch(torch.tensor([7, 3, 7]))
        return super().losses(work, own) * math.nan


def test_a_loss_that_is_not_finite_names_the_clips_that_the_method_loaded(tiny: Tiny, tmp_path: Path) -> None:
    tiny.methods["elsewhere"] = Elsewhere
    with pytest.raises(
        ValueError, match=r"the loss of step 1 \(epoch 1\) is nan, with the clips clip 7, clip 3: lower"
    ):
        train(short(method="elsewhere"), tmp_path / "a")


@dataclass(frozen=True)
class Doubled(Method):
    """Trains a wrapping of the model, notes what it is called with, and has enough after two epochs."""

    def wrapped(self, model: Classifier) -> Classifier:
        return AtFeatures(model, low=-1.0, high=1.0)

    def begin(self, work: Work) -> None:
        work.memory["begun"] = work.memory.get("begun", torch.zeros(())) + 1

    def begin_epoch(self, work: Work) -> None:
        work.memory["epochs"] = work.memory.get("epochs", torch.zeros(())) + 1
        work.memory["table"] = torch.rand(3, generator=work.generator)

    def finished(self, work: Work) -> bool:
        return work.epoch == 2


def test_hooks_of_a_method_are_called_as_they_say(tiny: Tiny, tmp_path: Path) -> None:
    tiny.methods["doubled"] = Doubled
    with pytest.raises(Killed):
        train(short(method="doubled"), tmp_path / "a", progress=kill_at(6))
    trained = train(short(method="doubled"), tmp_path / "a")
    lines = lines_of(tmp_path / "a")
    assert [(line["begun"], line["epochs"]) for line in lines] == [("1.0", "1.0"), ("1.0", "2.0")]
    assert "table" not in lines[0]
    assert isinstance(trained.model(), AtFeatures) and trained.cost["clips"] == 2 * 24


def test_a_method_that_cannot_train_a_model_says_so_before_data_are_read(tiny: Tiny, tmp_path: Path) -> None:
    class Choosy(Method):
        def check(self, model: Classifier) -> None:
            raise ValueError("choosy needs a latent")

    tiny.methods["choosy"] = Choosy
    with pytest.raises(ValueError, match="choosy needs a latent"):
        train(short(method="choosy"), tmp_path / "a")
    assert tiny.read == 0 and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"batch_size": 25}, {}, "`batch_size` must be at most the 24 clips that there are to train on"),
        ({"eps": "smell=0.1"}, {}, "names .'smell'."),
        ({}, {"device": "tpu"}, "`device` must be 'auto', 'cpu' or a CUDA device"),
        ({}, {"devices": 0}, "`devices` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tiny: Tiny, tmp_path: Path, changes: dict, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(short(**changes), tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_validation_without_labels_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(source: str, model: Classifier, **_: object) -> TinyClips:
        clips = TinyClips(24)
        clips.targets = clips.targets * source.endswith("train")
        return clips

    monkeypatch.setattr(loop, "training_set", blank)
    with pytest.raises(ValueError, match="`validation` must have clips with labels, got none in tiny"):
        train(short(), tmp_path / "a")


def test_folders_without_a_trained_model_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no trained model: give the folder that `robustav train` wrote"):
        load_trained(tmp_path)
    with pytest.raises(Killed):
        train(short(), tmp_path / "a", progress=kill_at(5))
    with pytest.raises(ValueError, match="is not finished: the command that began it goes on"):
        read_trained(tmp_path / "a")
    train(short(), tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the file that its card describes: train again"):
        load_trained(tmp_path / "a")
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors is missing: train again, in a new folder"):
        load_trained(tmp_path / "a")
    for damaged, words in (
        (b'{"recipe": ', r"is damaged \(.*\): train again"),
        (b"[]", "is not the card of a training"),
    ):
        (tmp_path / "a" / CARD).write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            read_trained(tmp_path / "a")
        with pytest.raises(ValueError, match=words):
            train(short(), tmp_path / "a")


class Frozen(nn.Module):
    """Runs its network without gradients, as code for inference does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)


def test_models_that_cannot_learn_are_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_fusion().requires_grad_(False)
    monkeypatch.setattr(loop, "initial", lambda *_: model)
    with pytest.raises(ValueError, match="`model` must have parameters to train, got none that requires a gradient"):
        train(short(), tmp_path / "a")
    model = tiny_fusion()
    model.head = Frozen(model.head)
    with pytest.raises(ValueError, match="the loss does not depend on the model's parameters"):
        train(short(), tmp_path / "b")


def test_a_trained_folder_is_a_model_by_name(tiny: Tiny, tmp_path: Path) -> None:
    trained = train(short(), tmp_path / "a")
    before = torch.get_rng_state()
    model, about = load_model(f"trained:{tmp_path / 'a'}")
    assert digest_of_model(model) == digest_of_model(trained.model()) and not model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert about["summary"] == "av-fusion, ERM()" and about["training"]["scores"] == trained.scores
    assert about["checkpoint_sha256"] == trained.card["sha256"]
    assert isinstance(load_model(f"trained:{tmp_path / 'a'}(at=features)")[0], AtFeatures)
    with pytest.raises(ValueError, match="has its own weights"):
        load_model(f"trained:{tmp_path / 'a'}", tmp_path / "a/model.safetensors")
    with pytest.raises(ValueError, match="takes the settings at, got 'frames'"):
        load_model(f"trained:{tmp_path / 'a'}(frames=2)")


def test_models_to_train_have_weights_of_the_global_generator() -> None:
    digests = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        digests.append(digest_of_model(build_model("audio-cnn")))
    assert digests[0] == digests[1] != digests[2]
    assert isinstance(build_model("audio-cnn(at=features)"), AtFeatures)
    with pytest.raises(ValueError, match="no model 'audio-ccn'"):
        build_model("audio-ccn")


def test_training_goes_on_from_a_checkpoint() -> None:
    path = EMBEDDED["audio-cnn"].path
    model = initial(Recipe(model="audio-cnn", checkpoint=str(path)), Method())
    weights = read_checkpoint(path)
    assert all(torch.equal(x, weights[name].to(x)) for name, x in model.state_dict().items())


def test_named_data_are_scenes_of_the_modalities_that_a_model_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    small = AvEvents("validation", SMALL)
    monkeypatch.setattr("robustav.training.data.load_samples", lambda *_: (small, 100))
    model = tiny_fusion()
    model.specs = {"visual": small.specs["visual"]}
    found = training_set("av-events/validation", model, limit=3, seed=1)
    assert isinstance(found, Scenes) and len(found.targets) == 3 and list(found.specs) == ["visual"]
    nested = training_set("av-events/validation", model, limit=2, seed=1)
    assert set(nested.ids) < set(found.ids)
    model.label_kind = "multiclass"
    with pytest.raises(ValueError, match="the model is multiclass, but av-events/validation is labelled multilabel"):
        training_set("av-events/validation", model)


def test_other_data_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustav.training.data.load_samples", lambda *_: (TinySamples(5), None))
    found = training_set("my.csv", tiny_fusion())
    assert isinstance(found, Loaded) and len(found.ids) == 5 and found.classes == CLASSES


def test_logs_have_a_column_for_everything() -> None:
    assert log_lines([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "gap": 1.0}]) == (
        b"epoch,loss,gap\n1,0.5,\n2,0.25,1.0\n"
    )


def test_tensorboard_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustav.training.logs.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        tensorboard_scalars(tmp_path, 0)


def test_a_trained_folder_compares_by_what_it_holds(tmp_path: Path) -> None:
    assert Trained(tmp_path, {"scores": {}, "cost": {}}).scores == {}
    assert [field.name for field in fields(Recipe)][:2] == ["model", "method"]
    assert waveform(1.0).sample_rate == 16_000


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_gpu_trains_and_goes_on_as_a_cpu_does(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    recipe = short(method="fgsm-rs", augment="full", precision=precision)
    whole = train(recipe, tmp_path / "whole", device="cuda")
    assert whole.card["device"] == "cuda" and whole.cost["peak_memory_of"] == "tensors on the GPU"
    with pytest.raises(Killed):
        train(recipe, tmp_path / "killed", device="cuda", progress=kill_at(6))
    again = load_file(train(recipe, tmp_path / "killed", device="cuda").folder / "model.safetensors")
    for name, weights in load_file(whole.folder / "model.safetensors").items():
        torch.testing.assert_close(again[name], weights, rtol=1e-3, atol=1e-4)
