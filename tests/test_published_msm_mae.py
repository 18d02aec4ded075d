"""MSM-MAE: the official numbers, read where they lie beside the checkout, and what a classifier on top of it must do."""

import pytest
import torch
import torch.nn.functional as F
from published import drawn, drawn_input, loaded, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from torch import nn

from robustav.classifier import AtFeatures
from robustav.models.checkpoints import load_into
from robustav.models.entry import Task
from robustav.models.published.msm_mae import MODELS, MsmMae, MsmMaePretraining, hide, hide_given, with_head

FIXTURES = ["msmmae_cls", "msmmae_nocls", "msmmae_dec2d_p16x8_normpix"]
TINY = {"dim": 48, "depth": 2, "heads": 4}
SMALL = {**TINY, "decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4}


def of(config):
    """The pre-training model of a fixture."""
    bins, frames = config["img_size"]
    return MsmMaePretraining(
        Task(),
        bins=bins,
        frames=frames,
        patch=tuple(config["patch_size"]),
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        decoder_dim=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        class_token=config["use_cls_token"],
        decoder_2d=config["use_2d_dec_pos_embd"],
        normalised=config["norm_pix_loss"],
        ratio=config["mask_ratio"],
    )


def tiny(**settings):
    """A classifier of clips of 1.2 s, which are 121 frames: four chunks, the last of them padded."""
    return MsmMae(task_of(seconds=1.2), **{**TINY, "frames": 32, **settings}).eval()


def clips(batch=2, seconds=1.2):
    return 0.1 * torch.randn(batch, round(16_000 * seconds))


# The official numbers.


@pytest.mark.parametrize("name", FIXTURES)
def test_pre_training_is_the_official_one(name, shared):
    official = numbers(shared, name)
    model = of(official.config)
    own = model.state_dict()
    for table in ("pos_embed", "decoder_pos_embed"):
        official.close(own[table], f"state.{table}")
    loaded(model, official.state)

    x = official["in.x"].clone().requires_grad_()
    hidden = hide(official["in.noise"], model.ratio)
    assert torch.equal(hidden.restore, official["out.ids_restore"])
    assert torch.equal(hidden.hidden, official["out.mask"])
    result = model(x, hidden)
    official.close(model.encoded(x, hidden.visible), "out.latent")
    official.close(model.encoded(x), "out.full")
    official.close(model.every_layer(x), "out.layers")
    official.close(result.predicted, "out.pred")
    official.close(result.loss, "out.loss")
    (gradient,) = torch.autograd.grad(result.loss, x)
    theirs = official["grad.x"]
    assert (gradient - theirs).abs().max() <= official.tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", ["msmmae_cls", "msmmae_dec2d_p16x8_normpix"])
def test_a_given_mask_costs_what_it_officially_does(name, shared):
    """With a class token: without, the official loss depends on how a sort orders equal keys."""
    official = numbers(shared, name)
    hidden = hide_given(official["in.fixed_mask"])
    assert torch.equal(hidden.hidden, official["in.fixed_mask"])
    official.close(loaded(of(official.config), official.state)(official["in.x"], hidden).loss, "out.loss_fixed_mask")


def test_position_tables_are_the_official_ones(shared):
    official = numbers(shared, "msmmae_pos_tables")
    model = MsmMaePretraining(Task(), frames=512, depth=0, decoder_depth=0)
    encoder, decoder = model.table(768)[0, ::8], model.decoder_table(384)[0, ::8]
    official.close(torch.cat([encoder[:, :8], encoder[:, 384:392]], dim=1), "out.enc768_5x32_first_mid")
    official.close(decoder[:, :16], "out.dec384_1d_160_first16")


def test_features_are_the_official_ones(shared):
    """Of 300 frames, and of 208, to which the official code appends an empty chunk."""
    official = numbers(shared, "msmmae_runtime_features")
    state = with_head(numbers(shared, "msmmae_cls").state, torch.randn(20, 240), torch.randn(20))
    model = loaded(MsmMae(task_of(), **TINY), state)
    x = official["in.x"][:, 0].transpose(1, 2)
    official.close(model.encode("audio", x), "out.features")
    official.close(model.encode("audio", x[:, :208]), "out.features_208")
    layers = model.layers(x)
    official.close(layers[0], "out.features_layer0")
    official.close(layers[-1], "out.features")
    assert len(layers) == official["out.n_layers"]
    features = {"audio": official["out.features"]}
    expected = official["out.features"].mean(1) @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model.finish(features).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_encoder_is_the_official_one_at_its_published_size(shared):
    official = numbers(shared, "full_msmmae_base_80x208")
    with torch.device("meta"):
        model = MsmMae(task_of(1)).eval()
    state = {k: drawn(k, tuple(v.shape)) for k, v in model.state_dict().items() if k != "pos_embed"}
    model.load_state_dict({**state, "pos_embed": model.table(768)}, assign=True)
    x = drawn_input("full_msm_x", (1, 1, 80, 208))
    assert torch.equal(x.flatten()[:8], official["in.full_msm_x_first8"])
    with torch.no_grad():
        tokens = model.encoded(x)
    official.close(tokens[:, 0], "out.encoded_cls")
    official.close(tokens.mean(1), "out.encoded_mean")


@pytest.mark.parametrize("frames", [512, 208])
def test_keys_and_shapes_are_the_official_ones(frames, shared):
    with torch.device("meta"):
        model = MODELS[f"msm-mae-pretrain-{frames}"].build()
        classifier = MODELS[f"msm-mae-{frames}"].build()
    official = published_shapes(shared, f"msmmae_base_80x{frames}p16x16")
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == official
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 92_736_256
    head = {"head.weight": [527, 3840], "head.bias": [527]}
    encoder = {k: v for k, v in official.items() if not k.startswith(("decoder_", "mask_token"))}
    assert {k: list(v.shape) for k, v in classifier.state_dict().items()} == encoder | head


@pytest.mark.parametrize("name", MODELS)
def test_every_row_can_be_built(name):
    entry = MODELS[name]
    with torch.device("meta"):
        model = entry.build()
    assert len(entry.summary) <= 60
    assert isinstance(model, MsmMae) is bool(entry.head)
    assert not entry.head or model.state_dict()[entry.head].shape[0] == 527


# Files.


def test_a_saved_model_is_the_same_when_it_is_loaded(tmp_path):
    model = tiny()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    other = loaded(tiny(), state)
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("make", [tiny, lambda: MsmMaePretraining(Task(), **SMALL)], ids=["classifier", "pre-training"])
def test_a_model_s_own_state_needs_no_adapting(make):
    model = make()
    model.pos_embed.data += 1.0  # even where it is not the formula's
    state = model.state_dict()
    adapted = model.adapted(state)
    assert adapted.keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in adapted.items())


def test_a_pre_training_file_and_a_head_make_a_classifier():
    pretrained = MsmMaePretraining(Task(), **{**SMALL, "frames": 32})
    weight, bias = torch.randn(20, 240), torch.randn(20)
    model = loaded(tiny(), with_head(pretrained.state_dict(), weight, bias))
    x = torch.randn(3, 32, 80)
    tokens = pretrained.encoded(x.transpose(1, 2)[:, None])[:, 1:]
    clip = tokens.unflatten(1, (5, 2)).mean(2).flatten(1)
    torch.testing.assert_close(model.finish({"audio": model.encode("audio", x)}).logits, clip @ weight.T + bias)


def test_a_file_of_another_number_of_frames_is_refused():
    short, long = (MsmMaePretraining(Task(), **SMALL, frames=frames) for frames in (48, 96))
    with pytest.raises(ValueError, match=r"other shape \(2\): decoder_pos_embed: .*, pos_embed: "):
        loaded(long, short.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 24}, r"other shape \(\d+\): .*\[48\] in the file, \[24\] in the model"),
        ({"class_token": False}, r"not in the model \(1\): cls_token"),
        ({"depth": 3}, r"missing \(1[0-9]\): blocks.2"),
        ({"patch": (16, 8)}, r"other shape \(\d\): .*patch_embed.proj.weight"),
    ],
)
def test_a_file_of_another_size_is_refused(settings, message):
    model = tiny(**settings)
    with pytest.raises(ValueError, match=message):
        load_into(model, model.adapted(tiny().state_dict()), "file")


# Hiding.


def test_as_many_patches_are_hidden_as_asked():
    hidden = hide(torch.rand(4, 65), 0.75)
    assert (hidden.hidden.sum(1) == 49).all()
    assert not hidden.hidden.gather(1, hidden.visible).any()
    assert not torch.equal(hidden.visible[0], hidden.visible[1])


def test_a_given_mask_leaves_the_others_in_order():
    mask = torch.zeros(2, 90)  # so many that a sort which need not be stable is not
    mask[0, ::3], mask[1, 60:] = 1.0, 1.0
    hidden = hide_given(mask)
    assert hidden.visible.tolist() == [[i for i in range(90) if i % 3], list(range(60))]
    assert torch.equal(hidden.hidden, mask)


@pytest.mark.parametrize("class_token", [True, False])
def test_hidden_patches_do_not_show_in_what_is_predicted(class_token):
    model = MsmMaePretraining(Task(), **SMALL, frames=48, class_token=class_token)
    x, hidden = torch.randn(1, 1, 80, 48), hide(torch.rand(1, 15), 0.75)
    other = x.clone()
    for token in hidden.hidden[0].nonzero()[:, 0].tolist():
        row, column = divmod(token, 3)
        other[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1.0
    first, second = model(x, hidden), model(other, hidden)
    assert torch.equal(first.predicted, second.predicted)
    assert not torch.equal(first.loss, second.loss)


def test_what_is_hidden_is_drawn_anew_and_reconstruction_can_be_learnt():
    model = MsmMaePretraining(Task(), **SMALL, frames=48)
    x = torch.randn(2, 1, 80, 48)
    first, second = model(x), model(x)
    assert not torch.equal(first.masking.restore, second.masking.restore)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    table = model.pos_embed.clone()
    for _ in range(30):
        optimiser.zero_grad()
        loss = model(x, first.masking).loss
        loss.backward()
        optimiser.step()
    assert loss < 0.7 * first.loss
    assert torch.equal(model.pos_embed, table)


# What holds for every classifier.


@pytest.mark.parametrize("class_token", [True, False])
def test_raw_clips_have_scores_and_gradients(class_token):
    model = tiny(class_token=class_token)
    x = clips().requires_grad_()
    trace = model.trace({"audio": x})
    assert trace.features["audio"].shape == (2, 8, 240)  # 7.56 steps of 16 frames, rounded up
    assert trace.latent.shape == (2, 240)
    assert trace.logits.shape == (2, 20)
    gradients = torch.autograd.grad(trace.logits.square().sum(), x)[0].unflatten(1, (4, -1))
    assert gradients.isfinite().all() and gradients.any(2).all()


def test_stages_make_the_whole():
    model, inputs = tiny(), {"audio": clips()}
    whole = model(inputs)
    assert torch.equal(model.finish(model.features(inputs)).logits, whole)
    view = AtFeatures(model)
    assert view.specs["audio"].shape == (121, 80)
    torch.testing.assert_close(view(view.front_ends(inputs)), whole)


def test_clips_and_chunks_do_not_mix():
    model, x = tiny(), clips(3)
    together = model({"audio": x})
    torch.testing.assert_close(together[1:2], model({"audio": x[1:2]}), rtol=1e-4, atol=1e-5)
    log_mel = model.front_end("audio", x)
    other = log_mel.clone()
    other[:, 32:64] += 1.0
    changed = (model.encode("audio", other) != model.encode("audio", log_mel)).any(2)
    assert not changed[:, [0, 1, 4, 5, 6, 7]].any() and changed[:, [2, 3]].all()


@pytest.mark.parametrize(("frames", "steps"), [(32, 2), (33, 3), (64, 4), (17, 2), (16, 1), (15, 1), (1, 1)])
def test_steps_without_a_frame_of_the_clip_are_dropped(frames, steps):
    assert tiny().encode("audio", torch.randn(1, frames, 80)).shape == (1, steps, 240)


def test_a_padded_clip_is_described_by_its_own_steps():
    """Also the frames that it shares a chunk with are the mean, as of a clip that is read alone."""
    model, x = tiny(), clips()
    for seconds in (0.4, 0.64):
        length = round(16_000 * seconds)
        padded = torch.where(torch.arange(x.shape[1]) < length, x, 0.0)
        frames = 1 + length // 160
        together = model.encode("audio", model.front_end("audio", padded))
        own = model.encode("audio", model.front_end("audio", padded)[:, :frames])
        torch.testing.assert_close(together[:, : own.shape[1]], own)
        assert together.shape[1] > own.shape[1] and not together[:, own.shape[1] :].any()
        latent = model.trace({"audio": padded}).latent
        torch.testing.assert_close(latent, own.mean(1))
        alone = model.front_end("audio", x[:, :length])
        torch.testing.assert_close(model.front_end("audio", padded)[:, : frames - 2], alone[:, : frames - 2])
    torch.testing.assert_close(
        model.trace({"audio": x}).latent, model.encode("audio", model.front_end("audio", x)).mean(1)
    )


def test_the_statistics_are_those_of_the_log_mel():
    x = clips()
    plain, shifted = tiny(mean=0.0, std=1.0), tiny(mean=-3.0, std=2.0)
    torch.testing.assert_close(shifted.front_end("audio", x), (plain.front_end("audio", x) + 3) / 2)


def test_half_precision_is_close():
    model, inputs = tiny(), {"audio": clips()}
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(inputs)
    torch.testing.assert_close(rough.float(), model(inputs), rtol=0, atol=0.1)
    pretraining = MsmMaePretraining(Task(), **SMALL, frames=48)
    with torch.autocast("cpu", torch.bfloat16):
        assert pretraining(torch.randn(1, 1, 80, 48)).loss.isfinite()


def test_the_class_token_has_its_own_row_of_the_table():
    model, x = tiny(), torch.randn(1, 1, 80, 32)
    before = model.embedded(x)
    model.pos_embed.data[:, 0] += 1.0
    torch.testing.assert_close(model.embedded(x) - before, F.pad(torch.ones(1, 1, 48), (0, 0, 0, 10)))


def test_weights_are_first_what_the_paper_says():
    model = MsmMaePretraining(Task(), **SMALL)
    for layer in (
        model.patch_embed.proj,
        model.blocks[0].attn.qkv,
        model.decoder_blocks[1].mlp.fc2,
        model.decoder_pred,
    ):
        weight = layer.weight.flatten(1)
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.5)


def test_keys_of_attention_have_no_bias():
    attention = tiny().blocks[0].attn
    for bias in (attention.q_bias, attention.v_bias):
        nn.init.normal_(bias)
    query, key, value = attention.projected(torch.zeros(1, 1, 48))[0, 0].chunk(3)
    assert torch.equal(query, attention.q_bias) and torch.equal(value, attention.v_bias) and not key.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny(frames=40),
            "`patch` must tile 80 bins x 40 frames, got 16 x 16: choose `frames` divisible by 16",
        ),
        (lambda: tiny(patch=(32, 16)), "`patch` must tile 80 bins x 32 frames, got 32 x 16"),
        (lambda: tiny(std=0.0), "`divisor` positive and finite, got -7.1 and 0.0"),
        (lambda: MsmMaePretraining(Task(), **SMALL, ratio=0.0), "`ratio` of hidden .* between 0 and 1, got 0"),
        (lambda: hide_given(torch.eye(3)[:2].cumsum(0)), r"hide as many tokens in every clip, got \[1, 2\]"),
        (
            lambda: MsmMaePretraining(Task(), **SMALL)(torch.zeros(1, 1, 80, 96)),
            r"`spectrogram` must have 80 bins and 208 frames, got \[80, 96\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
