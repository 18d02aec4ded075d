"""Audio-MAE: the official numbers of encoder, decoder, windows and masks, files of other clips, and a live gradient."""

import math

import pytest
import torch
from published import drawn_input, fill, loaded, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from robustav.classifier import AtFeatures
from robustav.models.checkpoints import load_into
from robustav.models.entry import Task
from robustav.models.published.audio_mae import MODELS, AudioMAE, AudioMAEPretraining, codes, from_pretraining
from robustav.models.published.mae import pixels_of
from robustav.models.published.transformer import sometimes
from robustav.models.published.windows import WindowBlock, joined, split

ENCODER = {"dim": 32, "depth": 2, "heads": 4}
SHORT = task_of(20, seconds=1.28)  # 128 frames
SMALL = {**ENCODER, "decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4}


def logits_of(model, x):
    return model.finish({"audio": model.encode("audio", x)}).logits


def waveforms(count=2):
    return 0.1 * torch.randn(count, round(16_000 * SHORT.seconds))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return AudioMAE(SHORT, **ENCODER).eval()


@pytest.fixture(scope="module")
def local(shared):
    """The official numbers with windows, and the model."""
    fixture = numbers(shared, "audiomae_pretrain_local")
    sizes = SMALL | {"decoder_depth": 16, "decoder_heads": 16}
    return fixture, lambda **more: loaded(AudioMAEPretraining(Task(), **(sizes | more)), fixture.state)


# The official numbers.


def test_a_short_classifier_is_the_official_one(shared):
    fixture = numbers(shared, "audiomae_finetune_short")
    model = loaded(AudioMAE(SHORT, **ENCODER), fixture.state)
    x = fixture["in.x"].requires_grad_()
    trace = model.finish({"audio": model.encode("audio", x[:, 0])})
    fixture.close(trace.latent, "out.embedding")
    fixture.close(trace.logits, "out.logits")
    loss = bce(trace.logits, fixture["in.y"])
    fixture.close(loss, "out.bce")
    (gradient,) = torch.autograd.grad(loss, x)
    fixture.close(gradient, "grad.x")
    assert gradient.abs().max() > 10 * fixture.tolerance


def test_masks_of_training_are_the_official_ones(shared, local, monkeypatch):
    fixture, drawn = numbers(shared, "audiomae_finetune_mask2d"), local[0]
    model = loaded(AudioMAE(task_of(20), skip=0.0, **ENCODER), fixture.state)
    x, noise = drawn["in.x"][:, 0], torch.cat([drawn["in.noise_t"], drawn["in.noise_f"]], dim=1)
    tokens = model.patch_embed(x[:, None]) + model.pos_embed[:, 1:]
    fixture.close(model.thinned(tokens, noise), "out.kept_tokens")
    fixture.close(logits_of(model, x), "out.logits")
    monkeypatch.setattr(torch, "rand", lambda *shape, device: noise)
    fixture.close(logits_of(model.train(), x), "out.logits_masked")


@pytest.mark.parametrize(
    ("tokens", "columns", "dim", "key"),
    [(512, 64, 768, "encoder768_8x64"), (512, 64, 512, "decoder512_8x64"), (1212, 12, 768, "encoder768_101x12")],
)
def test_position_tables_are_the_official_ones(tokens, columns, dim, key, shared):
    fixture = numbers(shared, "audiomae_pos_tables")
    table = codes(tokens, columns, dim)[0, ::16]
    ends = torch.cat([table[:, :8], table[:, dim // 2 : dim // 2 + 8]], dim=1)
    fixture.close(ends, f"out.{key}_every16th_row_first_and_mid_dims")


@pytest.mark.parametrize(("shift", "key"), [((0, 0), "plain"), ((2, 0), "shift20"), ((2, 2), "shift22")])
def test_attention_in_windows_is_the_official_one(shift, key, shared):
    fixture = numbers(shared, "window_attention_block")
    block = WindowBlock(32, 4, (16, 8), shift=shift).eval()
    load_into(block, fixture.state, "fixture")
    fixture.close(block.attn.meta_mlp(block.attn.offsets)[None], "out.rel_bias")
    if shift == (0, 0):
        assert not block.apart.any()
    else:
        fixture.close(block.apart, f"out.attn_mask_{key}")
    fixture.close(block(fixture["in.x"]), f"out.{key}")


def test_pre_training_with_windows_is_the_official_one(local):
    fixture, make = local
    model, x = make(), fixture["in.x"].clone().requires_grad_()
    mask = model.masking(fixture["in.noise"])
    fixture.close(model.encode(x[:, 0], mask), "out.latent")
    fixture.close(mask.restore, "out.ids_restore")
    loss, predicted, hidden = model(x[:, 0], fixture["in.noise"])
    for ours, key in ((loss, "loss"), (predicted, "pred"), (hidden, "mask")):
        fixture.close(ours, f"out.{key}")
    fixture.close(pixels_of(x, (16, 16))[:, :4], "out.patchify_first4")
    (gradient,) = torch.autograd.grad(loss, x)
    fixture.close(gradient, "grad.x")
    assert gradient.abs().max() > 10 * fixture.tolerance
    fixture.close(make(normalised=False)(x[:, 0], fixture["in.noise"]).loss, "out.loss_raw_pixels")


def test_whole_steps_and_bands_are_hidden_as_officially(local):
    fixture, make = local
    model, x = make(masked=(0.6, 0.5)), fixture["in.x"][:, 0]
    noise = torch.cat([fixture["in.noise_t"], fixture["in.noise_f"]], dim=1)
    mask = model.masking(noise)
    fixture.close(model.encode(x, mask), "out.latent_2d")
    fixture.close(mask.restore, "out.ids_restore_2d")
    loss, predicted, hidden = model(x, noise)
    fixture.close(loss, "out.loss_2d")
    fixture.close(hidden, "out.mask_2d")
    fixture.close(predicted[:, :64], "out.pred_2d_first64")


def test_pre_training_without_windows_is_the_official_one(shared, local):
    fixture = numbers(shared, "audiomae_pretrain_global")
    model = AudioMAEPretraining(Task(), **SMALL, window=None, masked=(0.75,), normalised=False)
    for name in ("pos_embed", "decoder_pos_embed"):
        fixture.close(model.state_dict()[name], f"state.{name}")
    loaded(model, fixture.state)
    loss, predicted, hidden = model(local[0]["in.x"][:, 0], local[0]["in.noise"])
    fixture.close(loss, "out.loss")
    fixture.close(hidden, "out.mask")
    fixture.close(predicted[:, :64], "out.pred_first64")


def test_pre_training_at_the_published_size_is_the_official_one(shared):
    fixture = numbers(shared, "full_audiomae_pretrain")
    model = fill(MODELS["audio-mae-pretrain"].build(), keep=("pos_embed", "decoder_pos_embed"))
    x, noise = drawn_input("full_amae_x", (1, 1, 1024, 128)), drawn_input("full_amae_noise", (1, 512), uniform=True)
    for ours, key in ((x, "x"), (noise, "noise")):
        assert torch.equal(ours.flatten()[:8], fixture[f"in.full_amae_{key}_first8"])
    with torch.no_grad():
        loss, predicted, hidden = model(x[:, 0], noise)
    for ours, key in ((loss, "loss"), (hidden, "mask"), (predicted[:, :4], "pred_first4")):
        fixture.close(ours, f"out.{key}")


@pytest.mark.parametrize(
    ("row", "name", "count", "trained"),
    [
        ("audio-mae", "audiomae_finetune_base", 86_053_391, 85_659_407),
        ("audio-mae-pretrain", "audiomae_pretrain_base", 136_992_768, 136_336_128),
    ],
)
def test_rows_have_the_official_names_and_shapes(row, name, count, trained, shared):
    with torch.device("meta"):
        model = MODELS[row].build()
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == published_shapes(shared, name)
    sizes = {p: p.numel() for p in model.parameters()}
    assert (sum(sizes.values()), sum(size for p, size in sizes.items() if p.requires_grad)) == (count, trained)


# Files.


def test_a_file_comes_back_as_it_went(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "audio-mae.safetensors")
    state = load_file(tmp_path / "audio-mae.safetensors")
    torch.manual_seed(1)
    other = loaded(AudioMAE(SHORT, **ENCODER), state)
    assert other.state_dict().keys() == tiny.state_dict().keys()
    assert all(torch.equal(tensor, tiny.state_dict()[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: AudioMAE(SHORT, **ENCODER),
        lambda: AudioMAE(SHORT, stride=10, **ENCODER),
        lambda: AudioMAEPretraining(SHORT, **SMALL),
    ],
)
def test_a_file_of_its_own_is_not_changed_even_where_its_table_is_no_formula_s(make):
    model = make()
    state = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    adapted = model.adapted(state)
    assert adapted.keys() == state.keys() and all(adapted[key] is state[key] for key in state)
    loaded(model, state)
    assert torch.equal(model.pos_embed, state["pos_embed"])


@pytest.mark.parametrize(("stride", "columns"), [(16, 64), (10, 12)])
def test_a_token_keeps_its_code_whatever_the_clip_s_length(stride, columns):
    short, long = (AudioMAE(task_of(seconds=seconds), stride=stride, **ENCODER) for seconds in (1.28, 3.84))
    few = short.pos_embed.shape[1]
    assert torch.equal(long.pos_embed, codes(math.prod(long.grid), columns, 32))
    assert torch.equal(long.pos_embed[:, :few], short.pos_embed)
    marked = {key: tensor + 1 for key, tensor in long.state_dict().items()}
    assert torch.equal(short.adapted(marked)["pos_embed"], marked["pos_embed"][:, :few])
    marked = {key: tensor + 1 for key, tensor in short.state_dict().items()}
    grown = long.adapted(marked)["pos_embed"]
    assert torch.equal(grown[:, :few], marked["pos_embed"])
    assert torch.equal(grown[:, few:], long.pos_embed[:, few:])
    loaded(long, marked)


def test_both_tables_of_pre_training_are_fitted():
    sizes = SMALL | {"decoder_dim": 16}
    short, long = (AudioMAEPretraining(task_of(seconds=seconds), **sizes) for seconds in (1.28, 2.56))
    adapted = long.adapted(short.state_dict())
    assert torch.equal(adapted["decoder_pos_embed"], long.decoder_pos_embed)
    load_into(short, short.adapted(long.state_dict()), "longer")
    loss, predicted, _ = short(torch.randn(2, 128, 128), generator=torch.Generator().manual_seed(1))
    assert loss.isfinite() and predicted.shape == (2, 64, 256)


@pytest.mark.parametrize("shape", [(1, 1213, 32), (1, 513, 40), (2, 513, 32), (1, 1, 32), (65, 32)], ids=str)
def test_tables_of_other_models_are_left_alone_and_refused(shape, tiny):
    table = torch.randn(shape)
    adapted = tiny.adapted(tiny.state_dict() | {"pos_embed": table})
    assert adapted["pos_embed"] is table
    with pytest.raises(ValueError, match=r"other shape \(1\): pos_embed: .* in the file, \[1, 65, 32\] in the model"):
        load_into(tiny, adapted, "file")


def test_files_of_other_models_are_left_alone(tiny):
    state = {"bias": torch.ones(2)}
    assert tiny.adapted(state) == state and AudioMAEPretraining(SHORT, **SMALL).adapted(state) == state


def test_fine_tuning_starts_from_pre_training(tiny):
    trained = AudioMAEPretraining(task_of(seconds=2.56), **SMALL)
    head = tiny.head.weight.clone()
    assert head.std().item() == pytest.approx(2e-5, rel=0.2)
    load_into(tiny, tiny.adapted(from_pretraining(trained.state_dict(), tiny)), "pre-trained")
    assert torch.equal(tiny.blocks[1].mlp.fc2.weight, trained.blocks[1].mlp.fc2.weight)
    assert torch.equal(tiny.head.weight, head)
    with pytest.raises(ValueError, match=r"missing \(4\): fc_norm.bias, .*; not in the model \(\d+\): decoder_blocks"):
        load_into(tiny, tiny.adapted(trained.state_dict()), "pre-trained")


# What it is as a classifier.


@pytest.mark.parametrize("stride", [16, 10])
def test_the_waveform_has_a_live_gradient(stride):
    model, x = fill(AudioMAE(SHORT, stride=stride, **ENCODER)), waveforms().requires_grad_()
    logits = model({"audio": x})
    assert logits.shape == (2, 20) and logits.isfinite().all()
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.isfinite().all() and (gradient.abs().amax(1) > 0).all()


def test_stages_and_views_agree(tiny):
    fill(tiny)
    inputs = {"audio": waveforms(3)}
    logits = tiny(inputs)
    trace = tiny.finish(tiny.features(inputs))
    assert torch.equal(trace.logits, logits)
    assert trace.latent.shape == (3, 32) and trace.features["audio"].shape == (3, 65, 32)
    view = AtFeatures(tiny)
    assert view.specs["audio"].shape == (128, 128)
    assert torch.equal(view(view.front_ends(inputs)), logits)
    torch.testing.assert_close(tiny({"audio": inputs["audio"][1:2]}), logits[1:2], rtol=0, atol=1e-5)


def test_half_precision_is_close(tiny):
    inputs = {"audio": waveforms()}
    exact = fill(tiny)(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tiny(inputs)
        loss = fill(AudioMAEPretraining(SHORT, **SMALL))(torch.randn(1, 128, 128)).loss
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.1)
    assert loss.isfinite()


def test_tokens_are_step_by_step(tiny):
    x = torch.zeros(1, 128, 128)
    x[:, 16:32, 64:] = 1  # the second step, the upper half
    with torch.no_grad():
        tokens = tiny.patch_embed(x[:, None])
        differs = (tokens - tiny.patch_embed.proj.bias).abs().amax(2)[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == [12, 13, 14, 15]


def test_only_training_is_random(tiny):
    fill(tiny)
    inputs = {"audio": waveforms()}
    assert torch.equal(tiny(inputs), tiny(inputs))
    tiny.train()
    assert not torch.equal(tiny(inputs), tiny(inputs))
    assert tiny.features(inputs)["audio"].shape[1] == 1 + 6 * 6  # int(0.8 x 8) steps and as many bands


def test_skipped_branches_make_up_for_themselves():
    branch = torch.randn(4000, 2, 3)
    skipped = sometimes(branch, 0.25)
    gone = (skipped == 0).all((1, 2))
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(skipped[~gone], branch[~gone] / 0.75)
    assert sometimes(branch, 0.0) is branch


def test_deeper_blocks_are_skipped_more_often():
    model = AudioMAE(SHORT, **(ENCODER | {"depth": 3}))
    assert [block.skip for block in model.blocks] == [0, 0.05, 0.1]
    for module in model.train().blocks[2:]:
        module.skip = 1 - 1e-9  # nearly always, even once divided by what is kept
        tokens = torch.randn(2, 5, 32)
        assert torch.equal(module(tokens), tokens)
        assert not torch.equal(module.eval()(tokens), tokens)


def test_a_generator_draws_the_masks():
    model, x = fill(AudioMAEPretraining(SHORT, **SMALL)), torch.randn(2, 128, 128)
    draws = [model(x, generator=torch.Generator().manual_seed(seed)).hidden for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert draws[0].sum(1).tolist() == [64 - int(64 * 0.2)] * 2


def test_windows_are_what_they_look_like():
    grid = torch.arange(48).view(1, 6, 8)
    windows = split(grid, (3, 4))
    assert windows.shape == (1, 4, 12)
    assert torch.equal(windows[0, 1], grid[0, :3, 4:].flatten())
    assert torch.equal(joined(windows, (6, 8), (3, 4)), grid)


@pytest.mark.parametrize(("shift", "reached"), [((0, 0), range(0, 4)), ((2, 0), range(0, 2))])
def test_a_token_hears_its_window_and_no_stranger(shift, reached):
    block = WindowBlock(16, 2, (8, 4), window=(4, 4), shift=shift).eval()
    x = torch.randn(1, 32, 16)
    changed = x.clone()
    changed[:, 0] += 1
    moved = (block(changed) - block(x))[0].detach().abs().amax(1).unflatten(0, (8, 4)) > 1e-6
    assert moved.all(1).nonzero().flatten().tolist() == list(reached)
    assert not moved[max(reached) + 1 :].any()


def test_only_in_training_is_the_bias_of_offsets_random():
    attention = WindowBlock(16, 2, (8, 4)).attn
    for training, same in ((True, False), (False, True)):
        attention.train(training)
        assert torch.equal(attention.meta_mlp(attention.offsets), attention.meta_mlp(attention.offsets)) is same


@pytest.mark.parametrize("name", MODELS)
def test_rows_build_as_they_say(name):
    entry = MODELS[name]
    assert entry.licence and entry.published and entry.paper and len(entry.summary) <= 60
    with torch.device("meta"):
        usual, short = entry.build(), entry.build(Task(seconds=5.0))
    bands = 12 if name == "audio-mae-overlap" else 8
    steps = {"audio-mae-overlap": (101, 50)}.get(name, (64, 32))
    assert (usual.grid, short.grid) == tuple((step, bands) for step in steps)
    assert usual.pos_embed.shape[1] == 1 + math.prod(usual.grid)
    if entry.head:
        with torch.device("meta"):
            two = entry.build(Task(("a", "b"), "multiclass"))
        assert (two.classes, two.label_kind, len(two.state_dict()[entry.head])) == (("a", "b"), "multiclass", 2)
        assert two.specs["audio"].shape == (160_000,)


def test_rows_differ_in_what_their_names_say():
    with torch.device("meta"):
        models = {name: entry.build() for name, entry in MODELS.items()}
    sizes = {n: (m.pos_embed.shape[2], len(m.blocks), m.blocks[0].attn.heads) for n, m in models.items()}
    assert {m.fc_norm.eps for m in models.values() if isinstance(m, AudioMAE)} == {1e-6}
    assert sizes["audio-mae"] == sizes["audio-mae-pretrain"] == sizes["audio-mae-overlap"] == (768, 12, 12)
    assert (sizes["audio-mae-small"], sizes["audio-mae-large"]) == ((384, 12, 6), (1024, 24, 16))
    windowed, whole = (models[f"audio-mae-pretrain{kind}"].decoder_blocks for kind in ("", "-global"))
    assert [block.shift for block in windowed] == [(0, 0), (2, 0)] * 8
    assert len(whole) == 8 and "decoder_blocks.0.attn.tau" not in models["audio-mae-pretrain-global"].state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AudioMAE(SHORT, masked=(0.2, 1.0)), r"`masked` must be shares in \[0, 1\), got \(0.2, 1.0\)"),
        (lambda: AudioMAEPretraining(SHORT, masked=(-0.1,)), r"`masked` must be shares in \[0, 1\), got \(-0.1,\)"),
        (lambda: WindowBlock(16, 2, (6, 8)), "`window` must tile the grid of 6 x 8 tokens, got 4 x 4"),
        (lambda: MODELS["audio-mae-pretrain"].build(Task(("a",))), "what can be set: seconds"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
