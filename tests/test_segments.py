"""Segments: pairs are uniform, points are where they should be, and no shortcut changes what comes out."""

from itertools import islice, permutations

import numpy as np
import pytest
import torch
from conftest import batch_of, tiny_fusion, tiny_specs
from scipy.stats import chisquare, kstest
from torch import nn

from robustav.metrics import segments, shortcuts
from robustav.metrics.pairs import Pairs, draw_flip_pairs, draw_pairs, ordered_pairs
from robustav.metrics.segments import (
    Noise,
    at_thresholds,
    class_margins,
    end_margins,
    margins_along,
    sample_logits,
    swapped_margins,
)
from robustav.prepare import quick_products

SAMPLES, DIM, CLASSES = 60, 8, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(*shape, samples=SAMPLES, seed=1, dtype=torch.float32):
    return torch.randn(samples, *(shape or (DIM,)), generator=seeded(seed), dtype=dtype)


def some_pairs(count=40, samples=SAMPLES, classes=CLASSES, seed=2):
    labels = torch.rand(samples, classes, generator=seeded(seed)) < 0.5
    return draw_pairs(labels, count, seeded(seed))


def some_weights(pairs, points=6, seed=3):
    return torch.rand(len(pairs.cls), points, generator=seeded(seed))


def one_class(members, samples=12):
    labels = torch.zeros(samples, 2, dtype=torch.bool)
    labels[members, 1] = True
    return labels


# Pairs


def test_pairs_are_uniform_over_ordered_pairs_of_different_members():
    members = [0, 2, 3, 7, 11]
    pairs = draw_pairs(one_class(members), 20 * 500, seeded())
    assert (pairs.cls == 1).all() and (pairs.first != pairs.second).all()
    drawn = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    counts = [drawn.count(pair) for pair in permutations(members, 2)]
    assert sum(counts) == len(drawn)
    assert chisquare(counts).pvalue > 0.01


def test_flip_pairs_are_uniform_from_inside_to_outside():
    members = [1, 4, 5]
    pairs = draw_flip_pairs(one_class(members, samples=7), 12 * 500, seeded())
    drawn = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    counts = [drawn.count((inside, outside)) for inside in members for outside in (0, 2, 3, 6)]
    assert sum(counts) == len(drawn) and (pairs.cls == 1).all()
    assert chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("draw", [draw_pairs, draw_flip_pairs])
def test_draws_depend_on_their_generator_alone(draw):
    labels, state = one_class([0, 3, 4]), torch.get_rng_state()
    first, again, other = (draw(labels, 50, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.first, other.first)


def test_pairs_come_in_order_of_class_and_as_many_of_each():
    pairs = some_pairs(count=7)
    assert torch.equal(pairs.cls, torch.arange(CLASSES).repeat_interleave(7))


def test_classes_too_small_get_no_pairs():
    labels = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)  # 3, 0, 1 and 1 members of 3
    assert draw_pairs(labels, 4, seeded()).cls.unique().tolist() == [0]
    assert ordered_pairs(labels, 4).cls.unique().tolist() == [0]
    assert draw_flip_pairs(labels, 4, seeded()).cls.unique().tolist() == [2, 3]
    assert [len(field) for field in draw_pairs(labels[:0], 4, seeded())] == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 5, 12, 100])
def test_ordered_pairs_are_the_first_permutations(count):
    labels = torch.rand(9, 4, generator=seeded()) < 0.5
    expected = [
        (*pair, cls) for cls in range(4) for pair in islice(permutations(np.flatnonzero(labels[:, cls]), 2), count)
    ]
    assert list(zip(*(field.tolist() for field in ordered_pairs(labels, count)), strict=True)) == expected


# Margins


def test_multiclass_margin_is_the_lead_over_the_best_other_class():
    logits = torch.randint(-3, 4, (200, 4), generator=seeded()).double()  # integers, so that classes tie
    cls = torch.randint(4, (200,), generator=seeded(1))
    expected = [row[c] - max(np.delete(row, c)) for row, c in zip(logits.numpy(), cls.tolist(), strict=True)]
    margins = class_margins(logits, cls, 0.5, "multiclass")
    np.testing.assert_array_equal(margins, expected)
    assert torch.equal(margins >= 0, logits.gather(1, cls[:, None]).squeeze(1) == logits.amax(1))


def test_multilabel_margin_has_the_sign_of_probability_less_threshold():
    logits, cls = latents(4, samples=500, dtype=torch.float64), torch.randint(4, (500,), generator=seeded(1))
    thresholds = torch.tensor([0.1, 0.4, 0.5, 0.9])
    margins = class_margins(logits, cls, thresholds, "multilabel")
    probabilities = logits.sigmoid().gather(1, cls[:, None]).squeeze(1)
    assert torch.equal(margins >= 0, probabilities >= thresholds.double()[cls])
    assert torch.equal(class_margins(logits, cls, 0.5, "multilabel"), logits.gather(1, cls[:, None]).squeeze(1))


def test_margins_let_gradients_through():
    logits = latents(3).requires_grad_()
    class_margins(logits, torch.zeros(SAMPLES, dtype=torch.int64), 0.5, "multiclass").sum().backward()
    assert (logits.grad[:, 0] == 1).all() and (logits.grad.sum(1) == 0).all()


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
def test_ends_are_the_margins_of_the_samples(label_kind):
    logits, pairs, thresholds = latents(CLASSES), some_pairs(), torch.linspace(0.1, 0.9, CLASSES)
    ends = end_margins(logits, pairs, label_kind=label_kind, thresholds=thresholds)
    for side, rows in enumerate(pairs[:2]):
        assert torch.equal(ends[:, side], class_margins(logits[rows], pairs.cls, thresholds, label_kind))
    along = margins_along(
        lambda parts: parts["logits"],
        {"logits": logits},
        pairs,
        torch.tensor([[1.0, 0.0]]).expand(len(pairs.cls), 2),
        label_kind=label_kind,
        thresholds=thresholds,
    )
    assert torch.equal(along, ends)


def test_other_thresholds_need_no_second_pass():
    z, pairs, thresholds = latents(CLASSES), some_pairs(), torch.linspace(0.1, 0.9, CLASSES)
    given = (lambda parts: parts["z"].sin(), {"z": z}, pairs, some_weights(pairs))
    expected = margins_along(*given, label_kind="multilabel", thresholds=thresholds)
    torch.testing.assert_close(
        at_thresholds(margins_along(*given, label_kind="multilabel"), pairs, thresholds), expected
    )


def test_sample_logits_are_those_of_a_single_pass(monkeypatch):
    head, z = mlp(), latents()
    expected = head(z).detach()
    monkeypatch.setattr(shortcuts, "CHUNK", {"cpu": (7, 10**6)})
    found = sample_logits(lambda parts: head(parts["z"]), {"z": z})
    torch.testing.assert_close(found, expected)
    assert not found.is_inference()


# Points


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("mixed", [None, ("audio",), ("visual",), ("audio", "visual"), ()])
def test_points_lie_where_the_weights_say(label_kind, mixed):
    parts = {"audio": latents(3, dtype=torch.float64), "visual": latents(2, 4, dtype=torch.float64, seed=5)}
    by_audio, by_visual = latents(CLASSES, samples=3).double(), latents(CLASSES, samples=8).double()

    def finish(given):
        return (given["audio"] @ by_audio).sin() + given["visual"].flatten(1).square() @ by_visual

    pairs = some_pairs(count=4)
    weights = some_weights(pairs, points=3).double()
    found = margins_along(finish, parts, pairs, weights, label_kind=label_kind, thresholds=0.3, mixed=mixed)
    for row, (i, j, c) in enumerate(zip(*(field.tolist() for field in pairs), strict=True)):
        for point, w in enumerate(weights[row].tolist()):
            at = {
                name: w * x[i] + (1 - w) * x[j] if mixed is None or name in mixed else x[i] for name, x in parts.items()
            }
            expected = class_margins(
                finish({name: x[None] for name, x in at.items()}), torch.tensor([c]), 0.3, label_kind
            )
            assert found[row, point].item() == pytest.approx(expected.item(), abs=1e-12)


def test_swapping_takes_whole_parts_from_the_second():
    parts = {"audio": latents(4), "visual": latents(4, seed=5)}

    def finish(given):
        return (given["audio"] * given["visual"]).sin()

    pairs = some_pairs(classes=4)
    logits = finish({"audio": parts["audio"][pairs.first], "visual": parts["visual"][pairs.second]})
    expected = class_margins(logits, pairs.cls, 0.2, "multilabel")
    found = swapped_margins(finish, parts, pairs, ["visual"], label_kind="multilabel", thresholds=0.2)
    torch.testing.assert_close(found, expected)


def test_constant_latents_give_the_same_margin_everywhere():
    head, z, pairs = mlp(), latents()[:1].expand(SAMPLES, DIM), some_pairs()
    margins = margins_along(
        lambda parts: head(parts["z"]), {"z": z}, pairs, some_weights(pairs), label_kind="multilabel", module=head
    )
    expected = head(z[:1])[0, pairs.cls].detach()[:, None]
    torch.testing.assert_close(margins, expected.expand_as(margins))


def test_nothing_to_do_gives_nothing():
    nobody = Pairs(*torch.zeros(3, 0, dtype=torch.int64))
    found = margins_along(lambda _: 1 / 0, {"z": latents()}, nobody, torch.zeros(0, 4), label_kind="multilabel")
    assert found.shape == (0, 4)


def test_results_are_ordinary_tensors_and_inputs_stay():
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, CLASSES), nn.Tanh()).eval()
    z, pairs = latents(), some_pairs()
    before = z.clone()
    finish = lambda parts: head(parts["z"])  # noqa: E731
    margins = margins_along(finish, {"z": z}, pairs, some_weights(pairs), label_kind="multilabel", module=head)
    logits = sample_logits(finish, {"z": z})
    assert torch.equal(z, before)
    for found in (margins, logits):
        assert not found.is_inference() and not found.requires_grad
        found += 1


# Noise


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("noisy", [None, {"z": 0.7}, {"y": 0.2, "z": 0.7}])
def test_chunks_change_nothing(points, noisy, monkeypatch):
    monkeypatch.setattr(segments, "NOISE_BLOCK", 1000)
    head, parts, pairs = mlp(), {"z": latents(), "y": latents(seed=9)}, some_pairs(count=150)

    def along(chunk):
        return margins_along(
            lambda given: head(given["z"]) + given["y"][:, :CLASSES],
            parts,
            pairs,
            some_weights(pairs, points),
            label_kind="multilabel",
            mixed=["z"],
            noise=noisy and Noise(noisy, seeded(4)),
            chunk=chunk,
        )

    for chunk in (1, 100, 333, 10**6):
        torch.testing.assert_close(along(chunk), along(None))


def test_noise_has_the_scale_asked_for_in_the_parts_asked_for():
    parts = {"loud": torch.zeros(3, 4, 5), "still": torch.zeros(3, 20)}
    cls = torch.arange(20).repeat(300)
    pairs = Pairs(torch.zeros_like(cls), torch.ones_like(cls), cls)
    noise = Noise({"loud": 3.0}, seeded())

    def values(part):
        given = (lambda x: x[part].flatten(1), parts, pairs, torch.full((len(cls), 1), 0.5))
        return margins_along(*given, label_kind="multilabel", noise=noise)

    state = torch.get_rng_state()
    assert kstest(values("loud").ravel().numpy() / 3 * np.sqrt(20), "norm").pvalue > 0.01
    assert (values("still") == 0).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_goes_on_top_of_the_mix():
    z, pairs = latents(CLASSES), some_pairs()
    given = (lambda parts: parts["z"], {"z": z}, pairs, some_weights(pairs))
    noiseless = margins_along(*given, label_kind="multilabel")
    one, two = (
        margins_along(*given, label_kind="multilabel", noise=Noise({"z": scale}, seeded())) for scale in (1.0, 2.0)
    )
    torch.testing.assert_close(two - noiseless, 2 * (one - noiseless))


# Shortcuts


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(DIM, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES)).eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, CLASSES)

    def forward(self, z):
        return self.last(z + self.inner(z).relu())


class Rarely(nn.Module):
    """Looks at the latent itself, where nobody would notice: far outside the data."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, CLASSES)

    def forward(self, z):
        return self.last(self.first(z).relu() + (z - 1e6).relu())


class AttentionPooling(nn.Module):
    """Probabilities of frames, weighed by a softmax over time."""

    def __init__(self):
        super().__init__()
        self.fc_prob, self.fc_att = nn.Linear(DIM, CLASSES), nn.Linear(DIM, CLASSES)

    def forward(self, frames):
        return (self.fc_prob(frames).sigmoid() * self.fc_att(frames).softmax(1)).sum(1).logit()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, CLASSES)

    def forward(self, z):
        return self.last(self.inner(self.inner(z).relu()).relu())


class Finicky(nn.Module):
    """Insists on all classes, and on latents of the usual size."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, CLASSES)

    def forward(self, z):
        if not (z.abs() < 5).all():
            raise ValueError("strange latents")
        logits = self.last(self.first(z).relu())
        if logits.shape[1] != CLASSES:
            raise ValueError("strange logits")
        return logits


def transformer():
    block = nn.TransformerEncoderLayer(DIM, 2, 16, 0.1, "gelu", batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks, self.last = nn.Linear(DIM, DIM), blocks, nn.Linear(DIM, CLASSES)

        def forward(self, tokens):
            return self.last(self.blocks(self.embed(tokens)).mean(1))

    return Pooled()


# head -> its latents, which layers are hoisted, and whether the logits' layer computes its own classes alone
HEADS = {
    "mlp": (mlp, (DIM,), ["1"], True),
    "linear": (lambda: nn.Linear(DIM, CLASSES), (DIM,), [""], True),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(DIM, 9, bias=False), nn.GELU(), nn.Linear(9, CLASSES, bias=False)),
        (DIM,),
        ["0"],
        True,
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * DIM, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES)),
        (3, DIM),
        ["1"],
        True,
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
        (DIM,),
        ["1"],
        True,
    ),
    "two linear": (lambda: nn.Sequential(nn.Linear(DIM, 9), nn.Linear(9, CLASSES)), (DIM,), ["0", "1"], True),
    "attention pooling": (AttentionPooling, (3, DIM), ["fc_att", "fc_prob"], False),
    "transformer": (transformer, (3, DIM), ["embed"], True),
    "residual": (Residual, (DIM,), [], True),
    "rarely residual": (Rarely, (DIM,), [], True),
    "normalised": (
        lambda: nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
        (DIM,),
        [],
        True,
    ),
    "rectified": (
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(DIM, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
        (DIM,),
        [],
        True,
    ),
    "squashed": (lambda: nn.Sequential(nn.Linear(DIM, CLASSES), nn.Tanh()), (DIM,), ["0"], False),
    "shared": (Twice, (DIM,), [], True),
    "finicky": (Finicky, (DIM,), [], False),
}


@pytest.fixture
def taken(monkeypatch):
    """The shortcuts that were found good, call by call."""
    found, search = [], segments.shortcuts_of

    def spy(*given, **options):
        found.append(search(*given, **options))
        return found[-1]

    monkeypatch.setattr(segments, "shortcuts_of", spy)
    return found


def untouched(module):
    return all("forward" not in layer.__dict__ and not layer._forward_hooks for layer in module.modules())


def names(module, shortcuts):
    return sorted(name for name, layer in module.named_modules() if layer in shortcuts.tables)


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("name", HEADS)
def test_shortcuts_change_nothing(name, label_kind, taken):
    torch.manual_seed(3)
    make, shape, hoisted, own = HEADS[name]
    head = make().eval()
    z, pairs = latents(*shape), some_pairs()
    if name == "rectified":
        z = z.abs()  # on which the first ReLU does nothing

    def along(**options):
        given = (lambda parts: head(parts["z"]), {"z": z}, pairs, some_weights(pairs))
        return margins_along(*given, label_kind=label_kind, thresholds=0.3, **options)

    quick, plain = along(module=head, chunk=100), along()
    torch.testing.assert_close(quick, plain, rtol=1e-5, atol=1e-5)
    assert names(head, taken[0]) == hoisted
    assert (taken[0].last is not None) == (own and label_kind == "multilabel")
    assert untouched(head)


@pytest.mark.parametrize("mixed", [("audio",), ("visual",), ("audio", "visual")])
def test_layers_behind_several_parts_are_hoisted_only_when_all_of_these_are_mixed(mixed, taken):
    model = tiny_fusion()
    inputs = batch_of(tiny_specs(), size=SAMPLES)
    features = model.features(inputs)
    features = {m: x.detach() for m, x in features.items()}
    pairs = some_pairs(classes=3)

    def along(**options):
        given = (lambda parts: model.finish(parts).logits, features, pairs, some_weights(pairs))
        return margins_along(*given, label_kind="multilabel", mixed=mixed, **options)

    torch.testing.assert_close(along(module=model), along(), rtol=1e-5, atol=1e-5)
    assert names(model, taken[0]) == (["head"] if len(mixed) == 2 else [])


def test_a_layer_of_the_mixed_part_alone_is_hoisted_beside_others(taken):
    class Additive(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha, self.beta, self.last = nn.Linear(DIM, 6), nn.Linear(DIM, 6), nn.Linear(6, CLASSES)

        def forward(self, parts):
            return self.last((self.alpha(parts["audio"]) + self.beta(parts["visual"])).tanh())

    torch.manual_seed(3)
    model, pairs = Additive().eval(), some_pairs()
    given = (model, {"audio": latents(), "visual": latents(seed=5)}, pairs, some_weights(pairs))
    options = {"label_kind": "multilabel", "mixed": "audio"}
    torch.testing.assert_close(
        margins_along(*given, module=model, **options), margins_along(*given, **options), rtol=1e-5, atol=1e-5
    )
    assert names(model, taken[0]) == ["alpha"]


def test_noise_goes_through_the_layers(taken):
    head, pairs = mlp(), some_pairs()

    def along(**options):
        given = (lambda parts: head(parts["z"]), {"z": latents()}, pairs, some_weights(pairs))
        return margins_along(*given, label_kind="multilabel", noise=Noise({"z": 1.0}, seeded()), **options)

    torch.testing.assert_close(along(module=head), along(), rtol=1e-5, atol=1e-5)
    assert not taken[0].tables and taken[0].last is head[4]


def test_tables_must_pay_and_fit(taken, monkeypatch):
    head, pairs = mlp(), some_pairs()

    def along(rows=slice(None)):
        few = Pairs(*(field[rows] for field in pairs))
        given = (lambda parts: head(parts["z"]), {"z": latents()}, few, some_weights(few))
        return margins_along(*given, label_kind="multilabel", module=head)

    along(), along(slice(3))
    monkeypatch.setattr(shortcuts, "TABLE_BYTES", 0)
    monkeypatch.setattr(shortcuts, "TABLE_SHARE", 1)  # the hidden layer is wider than that
    along()
    assert [bool(shortcuts.tables) for shortcuts in taken] == [True, False, False]


def test_layers_come_back_also_when_the_network_fails():
    head, pairs, calls = mlp(), some_pairs(), []
    head[1].forward = own = head[1].forward  # as libraries that wrap layers leave them

    def finish(parts):
        calls.append(len(parts["z"]))
        if len(calls) == 8:
            raise RuntimeError("out of memory")
        return head(parts["z"])

    with pytest.raises(RuntimeError, match="out of memory"):
        margins_along(
            finish, {"z": latents()}, pairs, some_weights(pairs), label_kind="multilabel", module=head, chunk=60
        )
    assert head[1].__dict__.pop("forward") is own and untouched(head)


def test_points_go_through_the_quick_products_without_gradients():
    before, pairs, seen = torch.get_float32_matmul_precision(), some_pairs(), set()

    def finish(parts):
        seen.add((torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled()))
        return parts["z"]

    margins_along(finish, {"z": latents()}, pairs, some_weights(pairs), label_kind="multilabel")
    with quick_products():
        assert seen == {(torch.get_float32_matmul_precision(), True)}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    head, pairs = mlp(), some_pairs()
    found = []
    for device in ("cpu", "cuda"):
        head.to(device)
        for noise in (None, Noise({"z": 0.5}, seeded())):
            given = (lambda parts: head(parts["z"]), {"z": latents().to(device)}, pairs, some_weights(pairs))
            found.append(margins_along(*given, label_kind="multilabel", module=head, noise=noise).cpu())
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-4)


# Errors


def call(**changed):
    pairs = some_pairs()
    arguments = {
        "finish": lambda parts: parts["z"],
        "parts": {"z": latents(CLASSES)},
        "pairs": pairs,
        "weights": some_weights(pairs),
        "label_kind": "multilabel",
    }
    return margins_along(**(arguments | changed))


BROKEN = latents(CLASSES).index_fill(0, torch.tensor(3), torch.nan)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parts": {"z": BROKEN}}, r"`parts\['z'\]` must be finite, got nan or inf in 5 places"),
        ({"parts": {"z": latents().long()}}, r"`parts\['z'\]` must be floating point, got torch.int64"),
        ({"parts": {}}, "`parts` must have the same samples in each part, and at least one, got {}"),
        ({"parts": {"z": latents(), "y": latents(samples=3)}}, r"the same samples in each part.*\{'z': 60, 'y': 3\}"),
        ({"mixed": ["audio"]}, r"`mixed` must name parts among \['z'\], got \['audio'\]"),
        ({"noise": Noise({"audio": 1.0}, seeded())}, r"`noise` must name parts among \['z'\], got \['audio'\]"),
        ({"weights": torch.rand(3, 2)}, "`weights` must have a row for each of the 200 pairs, got 3"),
        ({"weights": torch.full((200, 2), 1.5)}, r"`weights` must lie in \[0, 1\], got 1.5 to 1.5"),
        ({"weights": torch.full((200, 2), torch.nan)}, r"`weights` must lie in \[0, 1\], got nan to nan"),
        ({"chunk": 0}, "`chunk` must be at least 1 point, got 0"),
        ({"thresholds": 1.5}, r"`thresholds` must be probabilities in \[0, 1\], got 1.5 to 1.5"),
        ({"thresholds": torch.rand(2)}, "`thresholds` must have one entry a class, got 2 for class 4"),
        ({"finish": lambda parts: parts["z"][0]}, r"`finish` must return logits .* at least 5 classes, got \[5\]"),
        ({"finish": lambda parts: parts["z"][:, :2]}, r"`finish` must return logits .* 5 classes, got \[1200, 2\]"),
        (
            {"finish": lambda parts: parts["z"] / 0 * 0},
            "`finish` must give numbers for points between samples, got nan",
        ),
        ({"pairs": Pairs(*torch.full((3, 200), 60))}, "`pairs.first` must number samples below 60, got 60 to 60"),
        (
            {"pairs": Pairs(*torch.zeros(2, 200).long(), torch.zeros(1).long())},
            r"fields of one length.*\[200, 200, 1\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_errors_of_margins_and_pairs():
    with pytest.raises(ValueError, match="`logits` must have at least two classes to choose from, got"):
        class_margins(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), 0.5, "multiclass")
    for draw in (draw_pairs, draw_flip_pairs):
        with pytest.raises(ValueError, match="`count` must be at least 1 pair a class, got 0"):
            draw(one_class([0, 1]), 0, seeded())
    with pytest.raises(ValueError, match="`count` must be at least 1 pair a class, got 0"):
        ordered_pairs(one_class([0, 1]), 0)
