"""The bridges to other libraries, as far as that needs none of them: what is mapped, what is refused."""

import ast
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import Linear, batch_of, tiny_fusion, tiny_specs
from torch.nn import functional

import robustav.bridges
from robustav import audit
from robustav.attacks.ascent import Pursuit
from robustav.bridges import SingleInput, UnitBox, parse_bridge
from robustav.bridges.bridge import Bridge, Kind, read, repaired, undisturbed
from robustav.bridges.single import Clips, picture_shape
from robustav.bridges.torchattacks import question
from robustav.classifier import InputSpec, Trace
from robustav.goals import Hide, Inject, PushLatent, Targeted, Untargeted
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

WIDE = InputSpec((64,), -2.0, 5.0, "amplitude")


@pytest.mark.parametrize(
    ("shape", "picture"),
    [
        ((64,), (1, 8, 8)),
        ((32_000,), (1, 160, 200)),
        ((7,), (1, 1, 7)),
        ((3, 5), (1, 3, 5)),
        ((3, 8, 9), (3, 8, 9)),
        ((10, 3, 48, 40), (30, 48, 40)),
    ],
    ids=str,
)
def test_every_shape_has_a_picture(shape, picture):
    assert picture_shape(shape) == picture
    box, x = UnitBox(InputSpec(shape, -1.0, 1.0, "")), torch.rand(2, *shape)
    assert box.pack(x).shape == (2, *picture)
    torch.testing.assert_close(box.unpack(box.pack(x)), x, rtol=0, atol=1e-6)


def test_the_box_maps_ends_to_ends_and_lengths_with_them():
    box = UnitBox(WIDE)
    x = torch.linspace(-2, 5, 128).reshape(2, 64)
    assert box.pack(x).min() == 0
    assert box.pack(x).max() == 1
    moved = box.pack(x) * 0.5
    for p in (1, 2, float("inf")):
        there = (moved - box.pack(x)).flatten(1).norm(p=p, dim=1)
        here = (box.unpack(moved) - x).norm(p=p, dim=1)
        assert torch.allclose(there, torch.stack([torch.as_tensor(box.length(h)) for h in here.tolist()]), rtol=1e-5)


def test_what_did_not_move_comes_back_bit_for_bit():
    box, x = UnitBox(WIDE), 0.01 * torch.randn(3, 64)
    unit = box.pack(x)
    unit[0, 0, 2, 3] = 0.5
    back = box.unpack(unit, x)
    assert (back != x).nonzero().tolist() == [[0, 19]]
    assert back[0, 19].item() == pytest.approx(1.5, abs=1e-6)
    assert (box.unpack(unit) != x).sum() > 1, "the plain way back would do as well"


def test_a_range_without_end_is_refused():
    with pytest.raises(ValueError, match=r"bounded range, got \[-inf, inf\] \(feature\)"):
        UnitBox(InputSpec((4,), float("-inf"), float("inf"), "feature"))


@pytest.mark.parametrize("size", [1, 6])
def test_one_tensor_in_scores_as_the_model_does(size, fusion, inputs):
    held = {"visual": inputs["visual"][:size]}
    whole = {"audio": inputs["audio"], "visual": held["visual"].expand(6, -1, -1, -1, -1)}
    for box in (None, UnitBox(fusion.specs["audio"])):
        single = SingleInput(fusion, "audio", held, box)
        x = inputs["audio"] if box is None else box.pack(inputs["audio"])
        torch.testing.assert_close(single(x), fusion(whole), rtol=1e-5, atol=1e-5)
        assert single.tally.forwards.tolist() == ([6] if size == 1 else [1] * 6)


def test_some_clips_of_a_batch_are_refused_for_nobody_knows_which(fusion, inputs):
    single = SingleInput(fusion, "audio", {"visual": inputs["visual"]})
    with pytest.raises(ValueError, match="expected all 6 clips in their order, got 2"):
        single(inputs["audio"][:2])


@pytest.mark.parametrize(
    ("modality", "held", "message"),
    [
        ("smell", {}, r"`modality` must be one of \['audio', 'visual'\], got 'smell'"),
        ("audio", {}, r"must have the modalities \['audio', 'visual'\], got \['audio'\]"),
        ("audio", {"visual": torch.full((1, 2, 3, 4, 4), 2.0)}, r"must lie in \[0, 1\]"),
    ],
)
def test_what_is_held_is_checked(modality, held, message, fusion):
    with pytest.raises(ValueError, match=message):
        SingleInput(fusion, modality, held)


def test_held_modalities_are_as_many(inputs):
    specs = {**tiny_specs(), "depth": InputSpec((4,), 0.0, 1.0, "metres")}
    with pytest.raises(ValueError, match=r"as many clips in every modality, got \[1, 6\]"):
        SingleInput(Linear(specs).eval(), "audio", {"visual": inputs["visual"], "depth": torch.zeros(1, 4)})


def test_a_model_in_train_mode_is_refused(fusion, inputs):
    with pytest.raises(ValueError, match=r"`model` must be in eval mode"):
        SingleInput(fusion.train(), "audio", {"visual": inputs["visual"]})


def pursuit_of(model, inputs, labels, budget=None, goal=None):
    threat = ThreatModel({"audio": budget or Budget("linf", 0.1)}, goal or Untargeted())
    return Pursuit(model, inputs, labels, threat, draws_for(0, "abcdef"))


def test_the_view_counts_notes_and_keeps_padding(fusion, inputs):
    tally = Tally(6, ("audio",))
    held = {"visual": fusion.encode("visual", inputs["visual"])}
    view = AttackView(fusion, ("audio",), held, tally)
    writable = torch.arange(64).expand(6, 64) < 40
    pursuit = pursuit_of(
        view, {"audio": inputs["audio"]}, torch.eye(3).repeat(2, 1), Budget(epsilon=0.1, writable=writable)
    )
    clips = Clips(pursuit, "audio", UnitBox(fusion.specs["audio"]))
    unit = clips.box.pack(inputs["audio"]).requires_grad_()
    (gradient,) = torch.autograd.grad(clips(unit).sum(), unit)
    assert (gradient.flatten(1)[:, 40:] == 0).all()
    assert (gradient.flatten(1)[:, :40] != 0).any(1).all()
    assert (tally.forwards.tolist(), tally.backwards.tolist(), tally.looks.tolist()) == ([1] * 6, [1] * 6, [1] * 6)
    assert torch.equal(clips.raw(torch.ones_like(unit), pursuit)[:, 40:], inputs["audio"][:, 40:])
    clips.train()
    assert not any(module.training for module in clips.modules())


def test_one_clip_may_be_sent_many_times(fusion, inputs):
    one = {m: x[2:3] for m, x in inputs.items()}
    clips = Clips(pursuit_of(fusion, one, torch.eye(3)[:1]), "audio", None)
    torch.testing.assert_close(clips(one["audio"].expand(5, -1)), fusion(one).expand(5, -1), rtol=1e-5, atol=1e-5)


LABELS = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("goal", "sign"),
    [(Untargeted(), 1), (Hide(chosen=(0, 2)), 1), (Inject(chosen=(1,)), -1)],
    ids=lambda goal: repr(goal),
)
def test_two_columns_a_label_make_a_cross_entropy_binary(goal, sign):
    """Loss and gradient, up to the mean that torchattacks takes."""
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    asked = question(goal, LABELS)
    theirs = sign * functional.cross_entropy(asked.present(logits), asked.labels) * asked.labels.numel()
    ours = goal.loss(Trace({}, logits, logits), LABELS).sum()
    torch.testing.assert_close(theirs, ours)
    assert asked.targeted == (sign < 0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*gradients)


def test_goals_without_words():
    assert question(Hide(chosen="labels"), LABELS) is None
    assert question(PushLatent(), LABELS) is None
    assert question(Targeted(target=1), LABELS) is None
    asked = question(Targeted("multiclass", target=1), torch.tensor([0, 2]))
    assert (asked.labels.tolist(), asked.targeted) == ([1, 1], True)
    logits = torch.randn(2, 3)
    assert asked.present(logits) is logits


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("PGD", ("PGD", {})),
        ("PGD()", ("PGD", {})),
        (" PGD(steps=20, alpha=1e-1) ", ("PGD", {"steps": 20, "alpha": 0.1})),
        ("PGD(random_start=False,steps=-3)", ("PGD", {"random_start": False, "steps": -3})),
    ],
)
def test_settings_are_read(text, read_as):
    name, settings = read(text)
    assert (name, settings) == read_as
    assert [type(value) for value in settings.values()] == [type(value) for value in read_as[1].values()]


@pytest.mark.parametrize("text", ["PGD(steps=__import__('os'))", "PGD(steps)", "PGD(loss=ce)"])
def test_settings_are_numbers_and_nothing_else(text):
    with pytest.raises(ValueError, match="a setting is written as key=number"):
        read(text)


@pytest.mark.parametrize("text", ["", "PGD(steps=3", "PGD steps=3", "os.system(1)"])
def test_attacks_are_names(text):
    with pytest.raises(ValueError, match=r"NAME or NAME\(key=number, ...\), got"):
        read(text)


@pytest.mark.parametrize("text", ["pgd", "targeted:bell", "foolbox:PGD"])
def test_what_names_no_peer_may_be_ours(text):
    assert parse_bridge(text) is None


@pytest.mark.parametrize("peer", ["torchattacks", "art"])
def test_a_peer_that_is_not_there_is_named_with_its_extra(peer, monkeypatch):
    monkeypatch.setattr("robustav.bridges.bridge.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{peer} is not installed: pip install 'robustav\[{peer}\]'"):
        parse_bridge(f"{peer}:PGD")


def test_the_core_does_not_import_them():
    """torchattacks alone would drag torchvision in."""
    files = list(Path(robustav.bridges.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert len(files) == 5
    assert not {name.partition(".")[0] for name in named} & {"torchattacks", "art", "torchvision"}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_rounding_is_repaired_and_nothing_else(norm):
    clean = torch.rand(4, 64) - 0.5
    budget = Budget(norm, 0.25)
    delta = torch.ones_like(clean)
    delta = delta / budget.rules.length(delta)[:, None] * 0.25
    x = clean + delta * torch.tensor([0.5, 1 + 1e-6, 1.001, torch.nan])[:, None]
    got = repaired(clean, x, budget)
    assert torch.equal(got[0], x[0])
    specs, threat = {"audio": InputSpec((64,), -1.0, 1.0, "")}, ThreatModel({"audio": budget})
    found = audit.violations({"audio": clean}, {"audio": got}, threat, specs)
    assert [bool(words) for words in found] == [False, False, True, True]
    assert torch.equal(got[2], x[2])


def test_a_hair_outside_the_range_is_repaired_and_more_is_not():
    clean = torch.ones(2, 4)
    x = clean + torch.tensor([[2e-7], [1e-4]])
    got = repaired(clean, x, Budget("linf", 0.1))
    assert (got[0] == 1).all()
    assert torch.equal(got[1], x[1])


def global_generators():
    """What the next draws of all three would be."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def test_generators_weights_and_modes_are_put_back(fusion):
    fusion.encoders["audio"].train()
    modes = [module.training for module in fusion.modules()]
    before, drawn = global_generators(), []

    def failing_peer():
        with undisturbed(fusion, 7, torch.device("cpu")):
            drawn.append(global_generators())
            fusion.train()
            assert not any(p.requires_grad for p in fusion.parameters())
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            failing_peer()
        assert global_generators() == before
        torch.rand(1)
        before = global_generators()
    assert drawn[0] == drawn[1]
    assert drawn[0] != before
    assert [module.training for module in fusion.modules()] == modes
    assert all(p.requires_grad for p in fusion.parameters())


class Lax(Bridge):
    """A peer that does what it is told in `found`, to try what is done around it."""

    peer, module, refused = "lax", "lax", {"Odd": "it is odd"}
    kinds = {
        "Far": Kind(("linf",), "loss", random=False, whole=True),
        "Drawn": Kind(("linf",), "loss", random="noisy", whole=True),
        "Alone": Kind(("linf",), "scores", random=False, classes=3),
        "Tiled": Kind(("linf",), "scores", tiles=True),
        "Wide": Kind(("linf",), "loss", square=True),
        "Small": Kind(("linf",), "verdicts", epsilon=None),
        "Gone": Kind(("linf",), "loss"),
    }
    sizes: list[int] = []

    def _run(self, part, modality, radius, seed):
        self.sizes.append(len(part.labels))
        epsilon = self._arguments(radius, seed, 3).get("eps", 0.5)
        return part.inputs[modality] + epsilon * (1 + 1e-7) + self._setting("noisy") * torch.rand(())


@pytest.fixture
def lax(monkeypatch):
    class Peer:
        def __init__(self, model, eps=0.3, noisy=False, steps=4, p_init=0.8, kappa=0, seed=0): ...

    module = ModuleType("lax")
    for name in Lax.kinds:
        if name != "Gone":
            setattr(module, name, Peer)
    monkeypatch.setitem(sys.modules, "lax", module)
    monkeypatch.setattr("robustav.bridges.bridge.find_spec", lambda name: name == "lax")
    monkeypatch.setattr(Lax, "sizes", [])
    return Lax


def attack(bridge, model, inputs, **changes):
    specs = tiny_specs()
    modality, epsilon = changes.get("modality", "audio"), changes.get("epsilon", 0.01)
    kind = model.label_kind
    labels = model(inputs).argmax(1) if kind == "multiclass" else torch.eye(3).repeat(2, 1)
    threat = ThreatModel(
        {modality: Budget("linf", epsilon, low=specs[modality].low)}, changes.get("goal", Untargeted(kind))
    )
    threat = threat.given(clean=model.trace(inputs), writable=changes.get("writable"))
    out = bridge(model, inputs, labels, threat, draws=draws_for(0, "abcdef"))
    assert audit.violations(inputs, out, threat, specs, changes.get("writable")) == [""] * 6
    return out


def test_clips_go_together_only_where_that_changes_nothing(lax, fusion, inputs):
    for bridge, sizes in [
        (lax("Far"), [6]),
        (lax("Drawn"), [6]),
        (lax("Drawn", {"noisy": False}), [6]),
        (lax("Small"), [1] * 6),
    ]:
        lax.sizes.clear()
        attack(bridge, fusion, inputs, goal=Hide(chosen=(0,), threshold=1e-6))
        assert lax.sizes == sizes, bridge
    for together, sizes in [(False, [1] * 6), (True, [6])]:
        lax.sizes.clear()
        with pytest.raises(AssertionError, match="length over budget"):
            attack(lax("Drawn", {"noisy": True}, together), fusion, inputs)
        assert lax.sizes == sizes


def test_a_radius_of_its_own_goes_to_each_clip_and_zero_to_none(lax, fusion, inputs):
    radius = torch.tensor([0.0, 0.01, 0.02, 0.02, 0.03, 0.0])
    out = attack(lax("Far"), fusion, inputs, epsilon=radius)
    torch.testing.assert_close((out["audio"] - inputs["audio"]).abs().amax(1), radius, rtol=0, atol=1e-6)
    assert torch.equal(out["audio"][0], inputs["audio"][0])
    assert out["visual"] is inputs["visual"]
    assert lax.sizes == [1] * 4


def test_what_an_attack_with_a_radius_does_beyond_it_is_left_for_the_audit(lax, fusion, inputs):
    with pytest.raises(AssertionError, match="length over budget"):
        attack(lax("Drawn", {"noisy": True}), fusion, inputs)


def test_the_smallest_perturbation_is_projected_and_none_where_none_is_needed(lax, fusion, inputs):
    bridge = lax("Small")
    assert (bridge.roams, bridge.survivors, lax("Far").roams) == (True, True, False)
    out = attack(bridge, fusion, inputs, goal=Hide(chosen=(0,), threshold=1e-6))
    torch.testing.assert_close(
        (out["audio"] - inputs["audio"]).abs().amax(1), torch.full((6,), 0.01), rtol=0, atol=1e-6
    )
    out = attack(bridge, fusion, inputs, goal=Hide(chosen=(0,), threshold=1 - 1e-6))
    assert torch.equal(out["audio"], inputs["audio"])


def test_the_repr_is_the_settings_and_they_are_values(lax):
    bridge = lax("Far", {"steps": 5, "noisy": True})
    assert repr(bridge) == "Lax(name='Far', settings=(('noisy', True), ('steps', 5)), together=False)"
    assert bridge == lax("Far", (("steps", 5), ("noisy", True)))
    assert hash(bridge) == hash(lax("Far", {"noisy": True, "steps": 5}))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Odd", {}, "lax's Odd cannot be judged by a budget: it is odd"),
        ("Gone", {}, "has no attack 'Gone' that robustav knows, only Far, Drawn, Alone, Tiled, Wide, Small$"),
        ("Elsewhere", {}, "has no attack 'Elsewhere' that robustav knows"),
        ("Far", {"eps": 0.1}, r"no setting 'eps' that is free, only \['kappa', 'noisy', 'p_init', 'steps'\]"),
        ("Far", {"steps": 2.5}, "`steps` of Far must be like 4, got 2.5"),
        ("Far", {"steps": True}, "`steps` of Far must be like 4, got True"),
        ("Far", {"noisy": 1}, "`noisy` of Far must be like False, got 1"),
    ],
)
def test_names_and_settings_are_checked_when_made(lax, name, settings, message):
    with pytest.raises(ValueError, match=message):
        lax(name, settings)


def test_a_whole_number_may_stand_for_a_real_one_and_the_other_way_where_that_is_meant(lax):
    assert lax("Far", {"kappa": 0.5}).settings == (("kappa", 0.5),)
    assert lax("Far", {"p_init": 1}).settings == (("p_init", 1),)


@pytest.mark.parametrize(
    ("name", "budgets", "kind", "goal", "message"),
    [
        ("Far", {"audio": Budget("l2", 0.1)}, "multilabel", None, "lax's Far works in linf, not in l2"),
        (
            "Far",
            {"audio": Budget("linf", 0.1), "visual": Budget("linf", 0.1, low=0.0)},
            "multilabel",
            None,
            r"lax's Far attacks one modality at a time, got \['audio', 'visual'\]",
        ),
        (
            "Far",
            {"visual": Budget("linf", 0.1)},
            "multilabel",
            None,
            r"range \[-1, 1\] must be that of 'visual', \[0, 1\]",
        ),
        ("Alone", {"audio": Budget("linf", 0.1)}, "multilabel", None, "it cannot attack a multilabel model"),
        (
            "Alone",
            {"audio": Budget("linf", 0.1)},
            "multiclass",
            PushLatent("multiclass"),
            "cannot pursue the goal: push the latent",
        ),
        ("Tiled", {"visual": Budget("linf", 0.1, low=0.0)}, "multiclass", None, "must fit into its 4 x 4, 10 at least"),
    ],
)
def test_what_a_peer_cannot_do_is_said_before_anything_runs(lax, name, budgets, kind, goal, message):
    model = tiny_fusion(kind)
    threat = ThreatModel(budgets, goal or Untargeted(kind))
    with pytest.raises(ValueError, match=message):
        lax(name).check(model, threat)
    assert lax.sizes == []


def test_models_must_have_the_classes_and_pictures_the_shape(lax):
    model = Linear({"audio": InputSpec((128,), -1.0, 1.0, "amplitude")}, 2)
    threat = ThreatModel({"audio": Budget("linf", 0.1)})
    with pytest.raises(ValueError, match="needs at least 3 classes, the model has 2"):
        lax("Alone").check(model, threat)
    with pytest.raises(ValueError, match="needs pictures as high as wide, 'audio' makes 8 x 16"):
        lax("Wide").check(model, threat)
    large = Linear({"audio": InputSpec((32_000,), -1.0, 1.0, "amplitude")}, 2)
    large.label_kind = "multiclass"
    threat = ThreatModel({"audio": Budget("linf", 0.1)}, Untargeted("multiclass"))
    with pytest.raises(ValueError, match=r"`p_init` = 0\.8 of the picture, which must fit into its 160 x 200"):
        lax("Tiled").check(large, threat)
    assert lax("Tiled", {"p_init": 0.3}).check(large, threat) == "audio"
    assert batch_of(large.specs, 1)["audio"].shape == (1, 32_000)
