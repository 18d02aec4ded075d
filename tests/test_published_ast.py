"""AST: the official numbers, files of other clips, strides and makers, and a live gradient down to the waveform."""

import pytest
import torch
from published import drawn, drawn_input, loaded, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from robustav.classifier import AtFeatures
from robustav.data.class_names import ESC50, SPEECH_COMMANDS
from robustav.fbank import RECIPES, Fbank
from robustav.models.checkpoints import load_into
from robustav.models.entry import Task
from robustav.models.published.ast import AST, GRIDS, MODELS, UNUSED, from_deit
from robustav.models.published.transformer import fbank_of
from robustav.published_log_mel import TAGGING_RECIPES, TaggingLogMel, TalLogMel

SIZES = {"dim": 32, "depth": 2, "heads": 4}
SECOND = task_of(3, seconds=1.0)
TINY = {
    "128 bins": lambda: AST(SECOND, **SIZES),
    "overlapping little": lambda: AST(SECOND, stride=(16, 12), **SIZES),
    "64 bins": lambda: AST(SECOND, log_mel=TaggingLogMel(frames=40), bins=64, stride=(8, 8), **SIZES),
    "64 bins divided": lambda: AST(
        SECOND, log_mel=TalLogMel.published(frames=40), bins=64, stride=(8, 8), divisor=8.0, **SIZES
    ),
}


def logits_of(model, x):
    return model.finish({"audio": model.encode("audio", x)}).logits


def of_geometry(bins, frames, stride=(10, 10), dim=8):
    return AST(task_of(2), dim=dim, depth=1, heads=1, stride=stride, bins=bins, log_mel=Fbank(bins=bins, frames=frames))


def waveforms(count=2):
    return 0.1 * torch.randn(count, 16_000)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return AST(SECOND, **SIZES).eval()


# The official numbers.


def test_a_tiny_one_is_the_official_one(shared):
    fixture = numbers(shared, "ast_tiny")
    model = loaded(AST(task_of(20), log_mel=Fbank(frames=104), **SIZES), fixture.state)
    x = fixture["in.x"].requires_grad_()
    fixture.close(model.v.patch_embed(x.transpose(1, 2)[:, None]), "out.patch_tokens")
    logits = logits_of(model, x)
    fixture.close(logits, "out.logits")
    loss = bce(logits, fixture["in.y"])
    fixture.close(loss, "out.bce")
    (gradient,) = torch.autograd.grad(loss, x)
    fixture.close(gradient, "grad.x")
    assert gradient.abs().max() > 100 * fixture.tolerance


def test_the_published_size_is_the_official_one(shared):
    fixture = numbers(shared, "full_ast_base384")
    with torch.device("meta"):
        model = MODELS["ast"].build().eval()
    state = {key: drawn(key, tuple(like.shape)) for key, like in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    x = drawn_input("full_ast_x", (1, 1024, 128))
    assert torch.equal(x.flatten()[:8], fixture["in.full_ast_x_first8"])
    with torch.no_grad():
        fixture.close(logits_of(model, x), "out.logits")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("ast", "ast_base384_128x1024_s10"),
        ("ast-tagging-128", "ast_base384_128x1024_s10"),
        ("ast-tagging-64", "ast_base384_64x400_s8"),
        ("ast-64", "ast_base384_64x400_s8"),
    ],
)
def test_rows_have_the_official_names_and_shapes(row, name, shared):
    with torch.device("meta"):
        model = MODELS[row].build()
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == published_shapes(shared, name)
    count = {"ast_base384_128x1024_s10": 88_132_063, "ast_base384_64x400_s8": 87_464_671}[name]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("case", ["12x101", "5x39", "7x49", "12x9", "29x12"])
def test_a_start_from_imagenet_is_the_official_one(case, shared):
    fixture = numbers(shared, "ast_pos_adapt_imagenet")
    size = fixture.config["cases"][case]
    model = of_geometry(size["input_fdim"], size["input_tdim"], (size["fstride"], size["tstride"]), dim=32)
    own = model.state_dict()
    deit = {key.removeprefix("v."): tensor + 1 for key, tensor in own.items() if key.startswith("v.")} | {
        "pos_embed": fixture["in.deit_pos_embed"],
        "patch_embed.proj.weight": fixture["in.deit_proj_weight"],
        "patch_embed.proj.bias": fixture["in.deit_proj_bias"],
    }
    start = from_deit(deit, model)
    fixture.close(start["v.pos_embed"], f"out.pos_embed_{case}")
    fixture.close(start["v.patch_embed.proj.weight"], "out.proj_weight")
    fixture.close(start["v.patch_embed.proj.bias"], "out.proj_bias")
    classifier = own["mlp_head.1.weight"].clone()
    load_into(model, start, "DeiT")
    assert torch.equal(model.mlp_head[1].weight, classifier)
    assert torch.equal(model.v.blocks[0].mlp.fc1.weight, deit["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("case", ["12x9", "12x50", "12x101", "12x127", "5x39"])
def test_a_start_from_audioset_is_the_official_one(case, shared):
    fixture = numbers(shared, "ast_pos_adapt_audioset")
    size = fixture.config["cases"][case]
    table = drawn("v.pos_embed", (1, 1214, 768), seed=3)[..., :8]
    assert torch.equal(table, fixture["in.v_pos_embed_first8dims"])
    model = of_geometry(size["input_fdim"], size["input_tdim"])
    adapted = model.adapted(model.state_dict() | {"v.pos_embed": table})
    fixture.close(adapted["v.pos_embed"], f"out.pos_embed_first8dims_{case}")
    load_into(model, adapted, "AudioSet")


# Files.


def test_a_file_comes_back_as_it_went(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "ast.safetensors")
    state = load_file(tmp_path / "ast.safetensors")
    torch.manual_seed(1)
    other = loaded(AST(SECOND, **SIZES), state)
    assert other.state_dict().keys() == tiny.state_dict().keys()
    assert all(torch.equal(tensor, tiny.state_dict()[key]) for key, tensor in other.state_dict().items())


def test_a_file_of_its_own_is_not_changed(tiny):
    state = tiny.state_dict()
    adapted = tiny.adapted(state)
    assert adapted.keys() == state.keys() and all(adapted[key] is state[key] for key in state)


def test_imagenet_heads_may_be_missing(tiny):
    state = {key: tensor + 1 for key, tensor in tiny.state_dict().items() if key not in UNUSED}
    other = loaded(AST(SECOND, **SIZES), state)
    assert torch.equal(other.v.norm.bias, state["v.norm.bias"])


def test_the_grid_of_a_table_is_told_by_its_tokens():
    assert len(GRIDS) == 33
    assert [GRIDS[tokens][0] for tokens in (1212, 850, 657, 512, 600, 144, 343)] == [
        *((12, 101), (10, 85), (9, 73), (8, 64), (12, 50), (12, 12), (7, 49))
    ]
    assert [GRIDS[tokens][1][0] for tokens in (1212, 850, 657, 512, 343)] == [10, 12, 14, 16, 8]
    model = of_geometry(64, 400, (8, 8))  # 7 rows
    table = torch.randn(1, 2 + 7 * 20, 8)
    adapted = model.adapted({"v.pos_embed": table})["v.pos_embed"]  # tokens of no usual grid: of as many rows
    stretched = torch.nn.functional.interpolate(
        table[:, 2:].reshape(1, 7, 20, 8).permute(0, 3, 1, 2), (7, 49), mode="bilinear"
    )
    torch.testing.assert_close(adapted[0, 2:], stretched.permute(0, 2, 3, 1).reshape(-1, 8))
    assert torch.equal(adapted[0, :2], table[0, :2])


@pytest.mark.parametrize("shape", [(1, 2 + 7 * 20 + 1, 8), (1, 2, 8), (1, 1, 8), (5,)], ids=str)
def test_a_table_of_no_known_grid_is_left_alone_and_refused(shape):
    model, table = of_geometry(64, 400, (8, 8)), torch.randn(shape)
    adapted = model.adapted(model.state_dict() | {"v.pos_embed": table})
    assert adapted["v.pos_embed"] is table
    with pytest.raises(ValueError, match=r"other shape \(1\): v.pos_embed: .* in the file, \[1, 345, 8\] in the model"):
        load_into(model, adapted, "file")


@pytest.mark.parametrize(("bins", "frames", "stride"), [(128, 1024, (12, 12)), (64, 400, (8, 8))])
def test_a_table_of_another_stride_is_refused(bins, frames, stride):
    """Kernels have the same shape at every stride: only the table tells such a file from one of the same model."""
    model, table = of_geometry(bins, frames, stride), torch.randn(1, 2 + 1212, 8)
    adapted = model.adapted(model.state_dict() | {"v.pos_embed": table})
    with pytest.raises(ValueError, match=r"other shape \(1\): v.pos_embed: \[1, 1214, 8\] in the file"):
        load_into(model, adapted, "file")


def test_files_of_other_models_are_left_alone(tiny):
    state = {"head.weight": torch.ones(2)}
    assert tiny.adapted(state) == state
    with pytest.raises(ValueError, match=r"missing \(\d+\): mlp_head.0.bias, .*; not in the model \(1\): head.weight"):
        load_into(tiny, tiny.adapted(state), "file")


# What it is as a classifier.


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_the_waveform_has_a_live_gradient(make):
    model, x = make().eval(), waveforms().requires_grad_()
    logits = model({"audio": x})
    assert logits.shape == (2, 3) and logits.isfinite().all()
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.isfinite().all() and (gradient.abs().amax(1) > 0).all()


def test_stages_and_views_agree(tiny):
    inputs = {"audio": waveforms(3)}
    logits = tiny(inputs)
    trace = tiny.finish(tiny.features(inputs))
    assert torch.equal(trace.logits, logits)
    assert trace.latent.shape == (3, 32) and trace.features["audio"].shape == (3, 2 + 12 * 12, 32)
    torch.testing.assert_close(trace.latent, trace.features["audio"][:, :2].mean(1))
    view = AtFeatures(tiny)
    assert view.specs["audio"].shape == (128, 128)
    assert torch.equal(view(view.front_ends(inputs)), logits)
    torch.testing.assert_close(tiny({"audio": inputs["audio"][1:2]}), logits[1:2], rtol=0, atol=1e-5)


def test_half_precision_is_close(tiny):
    inputs = {"audio": waveforms()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tiny(inputs)
    torch.testing.assert_close(half.float(), tiny(inputs), rtol=0, atol=0.05)


def test_bands_stand_and_time_runs_to_the_right(tiny):
    x = torch.zeros(1, 128, 128)
    x[:, :16, 64:] = 1  # the first 16 frames, the upper half
    with torch.no_grad():
        tokens = tiny.v.patch_embed(x.transpose(1, 2)[:, None])
        differs = (tokens - tiny.v.patch_embed.proj.bias).abs().amax(2).unflatten(1, (12, 12))[0] > 1e-6
    assert differs[5:, :2].all() and not differs[:4].any() and not differs[:, 2:].any()


@pytest.mark.parametrize(("seconds", "frames"), [(10.0, 1024), (5.0, 512), (1.0, 128), (8.96, 896), (8.9601, 1024)])
def test_filter_banks_are_as_long_as_the_clip(seconds, frames):
    bank = fbank_of("ast-esc50", seconds)
    assert (bank.frames, bank.mean, bank.divisor) == (frames, *RECIPES["ast-esc50"][1:])


@pytest.mark.parametrize("name", MODELS)
def test_rows_build_as_they_say(name):
    entry = MODELS[name]
    assert entry.licence and entry.published and entry.paper and len(entry.summary) <= 60
    task = Task(("a", "b"), "multiclass", seconds=2.0 if "seconds" in entry.takes else 10.0)
    with torch.device("meta"):
        models = [entry.build(), entry.build(task)]
    for model, asked in zip(models, (entry.task, task), strict=True):
        assert (model.classes, model.label_kind) == (asked.classes, asked.label_kind)
        assert model.specs["audio"].shape == (round(16_000 * asked.seconds),)
        assert len(model.state_dict()[entry.head]) == len(asked.classes)


def test_rows_differ_in_what_their_names_say():
    with torch.device("meta"):
        models = {name: entry.build() for name, entry in MODELS.items()}
    assert {name: model.grid for name, model in models.items()} == {
        **dict.fromkeys(("ast", "ast-small", "ast-tiny", "ast-tagging-128"), (12, 101)),
        **{"ast-s12": (10, 85), "ast-s14": (9, 73), "ast-s16": (8, 64)},
        **{"ast-esc50": (12, 50), "ast-speech-commands": (12, 12), "ast-tagging-64": (7, 49), "ast-64": (7, 49)},
    }
    assert {name: m.log_mel.mean for name, m in models.items() if name not in ("ast-tagging-64", "ast-64")} == {
        **dict.fromkeys(("ast", "ast-small", "ast-tiny", "ast-s12", "ast-s14", "ast-s16"), RECIPES["ast"].mean),
        **{name: RECIPES[name].mean for name in ("ast-esc50", "ast-speech-commands")},
        "ast-tagging-128": RECIPES["tagging-mix-0.3"].mean,
    }
    width = {name: (m.v.norm.weight.numel(), m.v.blocks[0].attn.heads) for name, m in models.items()}
    assert (width["ast"], width["ast-small"], width["ast-tiny"]) == ((768, 12), (384, 6), (192, 3))
    assert models["ast-64"].divisor == 8 and isinstance(models["ast-64"].log_mel, TalLogMel)
    assert models["ast-tagging-64"].log_mel.mean == TAGGING_RECIPES["ast"].mean
    assert {(m.v.norm.eps, m.v.blocks[0].norm1.eps, m.mlp_head[0].eps) for m in models.values()} == {(1e-6, 1e-6, 1e-5)}
    assert models["ast-esc50"].classes == ESC50 and models["ast-speech-commands"].classes == SPEECH_COMMANDS


def test_what_the_network_of_64_bands_reads_is_an_eighth():
    model, x = TINY["64 bins divided"](), waveforms()
    assert torch.equal(model.front_end("audio", x), TalLogMel.published(frames=40)(x) / 8)


def test_classes_are_the_corpora_s():
    assert (len(set(ESC50)), len(set(SPEECH_COMMANDS))) == (50, 35)
    assert (ESC50[0], ESC50[20], ESC50[-1]) == ("dog", "crying_baby", "hand_saw")
    assert (SPEECH_COMMANDS[0], SPEECH_COMMANDS[11], SPEECH_COMMANDS[-1]) == ("backward", "stop", "one")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AST(SECOND, log_mel=Fbank()),
            "`log_mel` must give at least 16 bins and, in .* 16 frames, got 128 and None",
        ),
        (lambda: AST(SECOND, log_mel=Fbank(bins=8, frames=20), bins=8), "16 frames, got 8 and 20"),
        (
            lambda: from_deit({"pos_embed": torch.ones(1, 6, 8)}, of_geometry(16, 16)),
            "distilled DeiT, got one without dist_token",
        ),
        (lambda: MODELS["ast-64"].build(Task(seconds=5.0)), "`seconds` of this model is 10.0 and cannot be 5.0"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
