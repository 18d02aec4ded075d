"""CAV-MAE: the official numbers of every mode and of pre-training, one score from ten frames, files of other sizes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published import drawn, drawn_input, fill, loaded, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from torch import nn

from robustav.classifier import AtFeatures
from robustav.metrics.retrieval import cosines, ranks_of_own, retrieval
from robustav.models.checkpoints import load_into
from robustav.models.entry import Task
from robustav.models.published import cav_mae, cav_mae_pretraining
from robustav.models.published.cav_mae import ENDINGS, PATHS, CavMae, resampled
from robustav.models.published.cav_mae_pretraining import (
    CavMaePretraining,
    contrastive_accuracy,
    contrastive_loss,
    from_mae,
    struck,
    structured_noise,
)
from robustav.models.published.mae import masking, pixels_of, reconstruction_loss, taken
from robustav.models.published.transformer import Block, grid, position_table

TINY = {"dim": 16, "heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
SHAPES = {
    "cav-mae": "cavmae_ft_audioset",
    "cav-mae-vggsound": "cavmae_ft_vggsound",
    "cav-mae-audio": "cavmae_ft_audio",
    "cav-mae-audio-only": "cavmae_ft_audioset",
    "cav-mae-visual-only": "cavmae_ft_audioset",
    "cav-mae-missing-visual": "cavmae_ft_audioset",
    "cav-mae-missing-audio": "cavmae_ft_audioset",
    "cav-mae-pretrain": "cavmae_pretrain_base",
}
MODELS = {**cav_mae.MODELS, **cav_mae_pretraining.MODELS}


def tiny(mode="multimodal", *, frames=1, label_kind="multilabel", depth=12, seconds=0.64, size=48, **more):
    task = task_of(frames=frames, label_kind=label_kind, seconds=seconds, size=size)
    return CavMae(task, mode, depth=depth, specific=depth - 1, **TINY, **{"audio_frames": 64, **more}).eval()


def raw_of(model, batch=2):
    """Half-loud noise and pictures of noise."""
    full = {"audio": 0.5 * torch.randn(batch, 10240).clamp(-2, 2), "visual": torch.rand(batch, 3, 3, 48, 48)}
    return {m: full[m][:, : spec.shape[0]] for m, spec in model.specs.items()}


@pytest.fixture(scope="module")
def tuned(shared):
    return numbers(shared, "cavmae_ft")


@pytest.fixture(scope="module")
def pretrained(shared):
    return numbers(shared, "cavmae_pretrain")


@pytest.fixture(scope="module")
def tiny_pretraining(pretrained):
    return loaded(CavMaePretraining(task_of(size=48), audio_frames=64, **TINY, **DECODER), pretrained.state)


@pytest.fixture(scope="module")
def masks(pretrained):
    return {m: masking(pretrained[f"in.noise{end}"], {"audio": 8, "visual": 2}[m]) for m, end in ENDINGS.items()}


def logits_of(model, features):
    return model.finish({m: model.encode(m, features[m]) for m in model.specs}).logits


def features_of(fixture):
    return {"audio": fixture["in.a"], "visual": fixture["in.v"][:, None]}


# The official numbers.


@pytest.mark.parametrize("mode", PATHS)
def test_every_mode_has_the_official_logits(mode, tuned):
    model = loaded(tiny(mode), tuned.state)
    with torch.no_grad():
        tuned.close(logits_of(model, features_of(tuned)), f"out.logits_{mode}")


def test_the_official_gradients(tuned):
    model = loaded(tiny(), tuned.state)
    features = {m: x.requires_grad_() for m, x in features_of(tuned).items()}
    loss = F.binary_cross_entropy_with_logits(logits_of(model, features), tuned["in.y"])
    tuned.close(loss, "out.bce_multimodal")
    audio, visual = torch.autograd.grad(loss, tuple(features.values()))
    tuned.close(audio, "grad.a")
    tuned.close(visual[:, 0], "grad.v")
    assert (audio - tuned["grad.a"]).norm() < 1e-4 * audio.norm()  # the stated tolerance is a tenth of the numbers
    assert (visual[:, 0] - tuned["grad.v"]).norm() < 1e-4 * visual.norm()


def test_modality_normed_features_are_the_official_ones(tuned, pretrained, tiny_pretraining):
    with torch.no_grad():
        for fixture, model in ((tuned, loaded(tiny(), tuned.state)), (pretrained, tiny_pretraining)):
            fixture.close(model.alone("audio", fixture["in.a"]), "out.feat_a")
            fixture.close(model.alone("visual", fixture["in.v"]), "out.feat_v")


def test_the_audio_only_class_is_official(shared, tuned):
    official = numbers(shared, "cavmae_ft_audio")
    model = fill(tiny("audioonly", streams=("audio",)))
    assert len(model.state_dict()) == official.about["state_keys"]
    with torch.no_grad():
        official.close(model.alone("audio", tuned["in.a"]), "out.features")
        official.close(logits_of(model, features_of(tuned)), "out.logits")


def test_position_tables_are_the_official_ones(shared):
    official = numbers(shared, "cavmae_pos_tables")
    for name, shape, dim in (("audio512", (8, 64), 512), ("audio768", (8, 64), 768), ("video768", (14, 14), 768)):
        table = position_table(*grid(*shape), dim)[0, ::16]
        ours = torch.cat([table[:, :8], table[:, dim // 2 : dim // 2 + 8]], dim=1)
        official.close(ours, f"out.{name}_{shape[0]}x{shape[1]}")


def test_models_start_from_the_fixed_tables(pretrained):
    for model in (tiny(), CavMaePretraining(task_of(size=48), audio_frames=64, **TINY, **DECODER)):
        state = model.state_dict()
        for key in [key for key in state if "pos_embed" in key]:
            pretrained.close(state[key], f"state.{key}")


def test_pre_training_hides_what_the_official_code_hides(pretrained, masks):
    for m, end in ENDINGS.items():
        assert torch.equal(masks[m].hidden, pretrained[f"out.mask{end}"])
        assert torch.equal(masks[m].restore, pretrained[f"out.ids_restore{end}"])


def test_pre_training_encodes_and_decodes_as_the_official_code(pretrained, tiny_pretraining, masks):
    features = {"audio": pretrained["in.a"], "visual": pretrained["in.v"]}
    with torch.no_grad():
        encoded = tiny_pretraining.encoded(features, masks)
        predicted = tiny_pretraining.decoded(encoded.joint, masks)
    pretrained.close(encoded.joint, "out.latent")
    for m, end in ENDINGS.items():
        pretrained.close(encoded.alone[m], f"out.latent_c{end}")
        pretrained.close(predicted[m], f"out.pred{end}")
        pixels = pixels_of(tiny_pretraining.picture(m, features[m]), (16, 16))
        raw = reconstruction_loss(predicted[m], pixels, masks[m].hidden, normalised=False)
        pretrained.close(raw, f"out.loss_mae{end}_raw_pixels")


def test_pre_training_has_the_official_losses_and_gradients(pretrained, tiny_pretraining, masks):
    features = {"audio": pretrained["in.a"].requires_grad_(), "visual": pretrained["in.v"].requires_grad_()}
    losses = tiny_pretraining(features, masks)
    pretrained.close(losses.total, "out.loss")
    pretrained.close(losses.contrastive, "out.nce_single")
    pretrained.close(0.01 * losses.contrastive, "out.loss_c_weighted")
    pretrained.close(losses.audio, "out.loss_mae_a")
    pretrained.close(losses.visual, "out.loss_mae_v")
    pretrained.close(losses.audio + losses.visual, "out.loss_mae")
    pretrained.close(losses.accuracy, "out.c_acc")
    gradients = torch.autograd.grad(losses.total, tuple(features.values()))
    for (m, end), gradient in zip(ENDINGS.items(), gradients, strict=True):
        pretrained.close(gradient, f"grad{end.replace('_', '.')}")
        difference = (gradient - pretrained[f"grad{end.replace('_', '.')}"]).norm()
        assert difference < 1e-4 * gradient.norm(), m


def test_contrastive_losses_are_the_official_ones(pretrained):
    means = [pretrained[f"out.latent_c{end}"].mean(1) for end in ENDINGS.values()]
    pretrained.close(contrastive_loss(*means), "out.nce_single")
    pretrained.close(contrastive_loss(*means, symmetric=True), "out.nce_bidirectional")
    pretrained.close(contrastive_accuracy(*means), "out.acc_single")
    pretrained.close(contrastive_accuracy(*means, symmetric=True), "out.acc_bidirectional")


def test_contrastive_accuracy_counts_pictures_or_both():
    """Both pictures look like the first clip; each clip is nearest to its own picture."""
    audio, visual = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.1], [1.0, 0.2]])
    assert contrastive_accuracy(audio, visual) == 0.5
    assert contrastive_accuracy(audio, visual, symmetric=True) == 0.75


def test_structured_masks_are_the_official_ones(shared):
    official = numbers(shared, "cavmae_structured_masks")
    none = torch.empty(2, 0, dtype=torch.int64)
    chosen = {
        "time": (none, official["out.picked_time"]),
        "freq": (official["out.picked_freq"], none),
        "tf": (official["out.picked_tf_f"], official["out.picked_tf_t"]),
    }
    for name, lines in chosen.items():
        masks = masking(struck(official["in.noise"], *lines, 8), 128)
        assert torch.equal(masks.hidden, official[f"out.mask_{name}"])
        assert torch.equal(taken(official["in.tokens"], masks.visible), official[f"out.kept_{name}"])


def test_retrieval_is_the_official_one(shared):
    official = numbers(shared, "cavmae_retrieval_metrics")
    audio, visual = official["in.audio"].numpy(), official["in.video"].numpy()
    official.close(torch.from_numpy(cosines(audio, visual)), "out.similarity")
    official.close(torch.tensor(retrieval(audio, visual), dtype=torch.float64), "out.a2v")
    official.close(torch.tensor(retrieval(visual, audio), dtype=torch.float64), "out.v2a")


def test_the_published_size_has_the_official_losses(shared):
    official = numbers(shared, "full_cavmae_pretrain")
    with torch.device("meta"):
        model = CavMaePretraining(Task())
    tables = {
        f"{prefix}pos_embed{end}": position_table(*grid(*shape), dim)
        for prefix, dim in (("", 768), ("decoder_", 512))
        for end, shape in (("_a", (8, 64)), ("_v", (14, 14)))
    }
    shapes = published_shapes(shared, "cavmae_pretrain_base")
    weights = {key: drawn(key, tuple(shape)) for key, shape in shapes.items() if key not in tables}
    model.load_state_dict({**weights, **tables}, assign=True)
    inputs = {
        name: drawn_input(name, tuple(shape), uniform=name.startswith("full_cav_n"))
        for name, shape in official.about["input_recipe"].items()
    }
    for name, x in inputs.items():
        assert torch.equal(x.flatten()[:8], official[f"in.{name}_first8"])
    features = {"audio": inputs["full_cav_a"], "visual": inputs["full_cav_v"]}
    masks = {"audio": masking(inputs["full_cav_na"], 128), "visual": masking(inputs["full_cav_nv"], 49)}
    with torch.no_grad():
        losses = model(features, masks)
        for m, end in ENDINGS.items():
            official.close(masks[m].hidden, f"out.mask{end}")
            official.close(model.alone(m, features[m]).mean(1), f"out.feat{end}_mean")
    official.close(losses.audio, "out.loss_mae_a")
    official.close(losses.visual, "out.loss_mae_v")
    assert losses.contrastive == 0


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes_have_the_official_names_and_shapes(name, shared):
    with torch.device("meta"):
        model = MODELS[name].build()
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == published_shapes(shared, SHAPES[name])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (sum(map(math.prod, shapes.values())), trained) == {
        "cavmae_ft_audioset": (164907023, 164907023),
        "cavmae_ft_vggsound": (164739381, 164739381),
        "cavmae_ft_audio": (86129423, 86129423),
        "cavmae_pretrain_base": (191036160, 190129920),
    }[SHAPES[name]]
    head = MODELS[name].head
    assert not head or shapes[head][0] == len(model.classes)


# What is averaged over pictures.


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("mode", ["multimodal", "videoonly", "missingvideoonly"])
def test_scores_are_averaged_over_pictures(mode, label_kind):
    """By another route: the model of one picture, once for each."""
    many, one = (fill(tiny(mode, frames=count, label_kind=label_kind, depth=3)) for count in (3, 1))
    inputs = raw_of(many)
    probability = torch.sigmoid if label_kind == "multilabel" else (lambda logits: logits.softmax(1))
    with torch.no_grad():
        singles = [one({m: x[:, i : i + 1] if m == "visual" else x for m, x in inputs.items()}) for i in range(3)]
        torch.testing.assert_close(probability(many(inputs)), torch.stack([probability(x) for x in singles]).mean(0))
        again = many({**inputs, "visual": inputs["visual"][:, [2, 0, 1]]})
        torch.testing.assert_close(again, many(inputs))
        latent = many.trace(inputs).latent
    assert latent.shape == (2, 3 * 16)


def test_averaged_classes_are_log_probabilities_and_single_ones_the_network_s_logits():
    many, one = (tiny(frames=count, label_kind="multiclass", depth=2) for count in (3, 1))
    torch.testing.assert_close(many.classify(torch.randn(2, 48)).exp().sum(1), torch.ones(2))
    latent = torch.randn(2, 16)
    assert torch.equal(one.classify(latent), one.mlp_head(latent))


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
def test_averaged_scores_have_a_gradient_where_probabilities_saturate(label_kind):
    model = tiny(frames=3, label_kind=label_kind, depth=2)
    with torch.no_grad():
        model.mlp_head[1].weight.mul_(40)  # beyond what a float32 probability tells from 1
    latent = (torch.randn(2, 1, 16) + 0.1 * torch.randn(2, 3, 16)).flatten(1).requires_grad_()
    logits = model.classify(latent)
    assert logits.isfinite().all() and logits.abs().max() > 20
    for i in range(20):
        (gradient,) = torch.autograd.grad(logits[:, i].sum(), latent, retain_graph=True)
        assert gradient.isfinite().all() and (gradient.abs().amax(1) > 0).all()


# As a classifier.


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("mode", PATHS)
def test_raw_inputs_have_finite_logits_and_gradients(mode, label_kind):
    model = fill(tiny(mode, frames=3, label_kind=label_kind, depth=3))
    inputs = {m: x.requires_grad_() for m, x in raw_of(model).items()}
    assert set(inputs) == set(PATHS[mode].modalities)
    logits = model(inputs)
    assert logits.shape == (2, 20) and logits.isfinite().all()
    assert torch.equal(model.finish(model.features(inputs)).logits, logits)
    for gradient in torch.autograd.grad(logits[:, 0].sum(), tuple(inputs.values())):
        assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()
    with torch.no_grad():
        torch.testing.assert_close(model({m: x[1:] for m, x in inputs.items()}), logits[1:].detach())
        view = AtFeatures(model)
        torch.testing.assert_close(view(view.front_ends(inputs)), logits.detach())


def test_what_a_model_reads_follows_from_its_task():
    model = CavMae(task_of(seconds=5.0, frames=2, size=64), depth=2, specific=1, **TINY).eval()
    assert {m: spec.shape for m, spec in model.specs.items()} == {"audio": (80000,), "visual": (2, 3, 64, 64)}
    assert model.front_end("audio", torch.randn(1, 80000).clamp(-1, 1)).shape == (1, 512, 128)
    assert model.state_dict()["pos_embed_a"].shape == (1, 8 * 32, 16)
    assert model.state_dict()["pos_embed_v"].shape == (1, 4 * 4, 16)


def test_runs_in_half_precision():
    model = fill(tiny(frames=3, depth=3))
    inputs = raw_of(model)
    with torch.no_grad():
        expected = model(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(inputs) - expected).abs().max() < 0.1 * expected.abs().max()


def test_pre_training_draws_hides_and_learns():
    model = CavMaePretraining(task_of(seconds=0.64, size=48), depth=2, specific=1, audio_frames=64, **TINY, **DECODER)
    features = {"audio": model.front_end("audio", torch.randn(2, 10240).clamp(-1, 1))}
    features["visual"] = model.front_end("visual", torch.rand(2, 3, 48, 48))
    drawn_twice = [model.masks(2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert all(torch.equal(*(masks[m].hidden for masks in drawn_twice)) for m in ENDINGS)
    assert not torch.equal(*drawn_twice[0]["audio"].hidden)
    assert [drawn_twice[0][m].visible.shape for m in ENDINGS] == [(2, 8), (2, 2)]
    fewer = model.masks(2, audio_ratio=0.5, visual_ratio=0.25, structure="time")
    assert [fewer[m].visible.shape for m in ENDINGS] == [(2, 16), (2, 6)]
    assert (fewer["audio"].hidden.unflatten(1, (8, 4)).all(1).sum(1) == 2).all()
    model(features, drawn_twice[0]).total.backward()
    unused = {k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert all("_a." in key or "_v." in key for key in unused)  # norms of a modality outside the shared block
    assert not any(key.startswith(("blocks_u", "norm", "patch", "mask", "decoder_pred")) for key in unused)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(features, drawn_twice[0]).total.isfinite()


@pytest.mark.parametrize(
    ("structure", "rows", "columns"), [("time", 0, 48), ("frequency", 6, 0), ("both", 4, 33), ("unstructured", 0, 0)]
)
def test_structured_noise_strikes_out_whole_rows_and_columns(structure, rows, columns):
    laid_out = structured_noise(5, (8, 64), 0.75, structure).unflatten(1, (8, 64)) > 1
    assert (laid_out.all(2).sum(1) == (8 if columns == 64 else rows)).all()
    assert (laid_out.all(1).sum(1) == columns).all()
    assert (laid_out.flatten(1).sum(1) == rows * 64 + columns * 8 - rows * columns).all()
    if rows or columns:
        assert len(laid_out.flatten(1).unique(dim=0)) > 1


def test_several_shared_blocks_are_chained_but_in_pre_training():
    """There only the last one counts, as in the official code."""
    sizes = {"depth": 4, "specific": 2, "audio_frames": 64, **TINY, **DECODER}
    model = fill(CavMaePretraining(task_of(size=48), **sizes))
    features = {"audio": torch.randn(2, 64, 128), "visual": torch.randn(2, 3, 48, 48)}
    masks = model.masks(2)
    with torch.no_grad():
        before = model.encoded(features, masks).joint, model.alone("audio", features["audio"])
        model.blocks_u[0].mlp.fc2.bias.add_(1)
        after = model.encoded(features, masks).joint, model.alone("audio", features["audio"])
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


# Files.


@pytest.mark.parametrize("name", ["joint", "audio", "pre-training"])
def test_a_file_keeps_its_names_and_bytes(name, tmp_path):
    def make():
        if name == "pre-training":
            return CavMaePretraining(task_of(size=48), depth=3, specific=2, audio_frames=64, **TINY, **DECODER)
        return tiny(
            "audioonly" if name == "audio" else "multimodal",
            depth=3,
            **({"streams": ("audio",)} if name == "audio" else {}),
        )

    first = fill(make())
    save_file(first.state_dict(), tmp_path / "first.safetensors")
    second = loaded(make(), load_file(tmp_path / "first.safetensors"))
    save_file(second.state_dict(), tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    adapted = first.adapted(first.state_dict())
    assert all(
        adapted[key] is tensor or torch.equal(adapted[key], tensor) for key, tensor in first.state_dict().items()
    )
    assert adapted.keys() == first.state_dict().keys()


def test_the_audio_only_class_is_the_audio_part_of_the_joint_one_and_refuses_the_rest():
    joint, part = fill(tiny("audioonly", depth=3)), tiny("audioonly", depth=3, streams=("audio",))
    own = {name: tensor for name, tensor in joint.state_dict().items() if name in part.state_dict()}
    inputs = raw_of(joint)
    assert torch.equal(loaded(part, own)(inputs), joint(inputs))
    with pytest.raises(ValueError, match=r"not in the model \(\d+\): blocks_v"):
        loaded(part, joint.state_dict())


def test_a_file_from_pre_training_is_refused_with_its_decoder_named(pretrained):
    with pytest.raises(ValueError, match=r"missing \(4\): mlp_head.*not in the model \(\d+\): decoder_blocks"):
        loaded(tiny(), pretrained.state)


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"mlp_head.1.bias: \[20\] in the file, \[3\] in the model"):
        loaded(CavMae(task_of(3, size=48), audio_frames=64, depth=3, specific=2, **TINY), tiny(depth=3).state_dict())


def test_a_shorter_clip_has_the_middle_of_the_table():
    table = torch.arange(8.0)[:, None] * 100 + torch.arange(64.0)
    cut = resampled(table.flatten()[None, :, None], (8, 32), spectrogram=True)[0, :, 0].unflatten(0, (8, 32))
    assert torch.equal(cut, table[:, 16:48])


@pytest.mark.parametrize("size", ["longer clip", "larger picture", "smaller picture"])
def test_tables_stretched_bilinearly_stay_straight(size):
    """A table that is linear in rows and columns stays so, but for its rim."""
    spectrogram = size == "longer clip"
    old = (8, 64) if spectrogram else (14, 14)
    new = {"longer clip": (8, 128), "larger picture": (24, 24), "smaller picture": (7, 7)}[size]
    down, across = torch.arange(old[0]) + 0.5, torch.arange(old[1]) + 0.5
    table = (3 * down[:, None] / old[0] + across / old[1]).flatten()[None, :, None].repeat(1, 1, 5)
    ours = resampled(table, new, spectrogram=spectrogram)[0, :, 2].unflatten(0, new)
    down, across = (torch.arange(new[0]) + 0.5) / new[0], (torch.arange(new[1]) + 0.5) / new[1]
    inside = slice(1, -1)
    torch.testing.assert_close(ours[inside, inside], (3 * down[:, None] + across)[inside, inside])


def test_a_file_of_another_clip_length_and_size_fits():
    state = fill(tiny(depth=3)).state_dict()
    other = tiny(depth=3, size=64, audio_frames=128)
    adapted = other.adapted(state)
    assert loaded(other, state).state_dict()["pos_embed_v"].shape == (1, 16, 16)
    assert other.adapted(adapted).keys() == adapted.keys()
    assert all(torch.equal(other.adapted(adapted)[key], adapted[key]) for key in adapted)


@pytest.mark.parametrize("shape", [(1, 15, 4), (1, 0, 4), (15, 4), (1, 6, 4)])
def test_a_table_of_no_known_grid_is_left_for_loading_to_refuse(shape):
    table = torch.zeros(shape)
    assert resampled(table, (8, 64), spectrogram=True) is table
    assert resampled(table, (14, 14), spectrogram=False) is table


# From an MAE of ImageNet.


def mae_of_imagenet(depth=3):
    """An official state dict, tiny."""
    parts = {"blocks": nn.ModuleList(Block(16, 2, eps=1e-5) for _ in range(depth)), "norm": nn.LayerNorm(16)}
    parts |= {"patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 16, 16, 16)}), "decoder_embed": nn.Linear(16, 16)}
    parts |= {"decoder_blocks": nn.ModuleList(Block(16, 2) for _ in range(2)), "decoder_norm": nn.LayerNorm(16)}
    parts |= {"decoder_pred": nn.Linear(16, 768)}
    shapes = {key: tuple(tensor.shape) for key, tensor in nn.ModuleDict(parts).state_dict().items()}
    shapes |= {"pos_embed": (1, 10, 16), "decoder_pos_embed": (1, 10, 16), "mask_token": (1, 1, 16)}
    return {key: drawn(key, shape) for key, shape in shapes.items()}, nn.ModuleDict(parts).eval()


def begun(state, depth=3):
    model = CavMaePretraining(task_of(size=48), depth=depth, specific=depth - 1, audio_frames=64, **TINY, **DECODER)
    load_into(model, from_mae(model, state), "MAE")
    return model.eval()


def test_begun_from_an_mae_either_stream_is_that_mae():
    """Without its class token; audio as a grey picture whose colours are all the spectrogram."""
    state, parts = mae_of_imagenet()
    parts.load_state_dict({key: tensor for key, tensor in state.items() if key in parts.state_dict()})
    model = begun(state)
    with torch.no_grad():
        model.modality_v.zero_(), model.modality_a.zero_()
        model.pos_embed_a.copy_(torch.randn(1, 32, 16))
        picture, spectrogram = torch.randn(2, 3, 48, 48), torch.randn(2, 64, 128)
        grey = spectrogram.transpose(1, 2)[:, None].repeat(1, 3, 1, 1)
        for x, features, table, m in (
            (picture, picture, state["pos_embed"][:, 1:], "visual"),
            (grey, spectrogram, model.pos_embed_a, "audio"),
        ):
            tokens = parts["patch_embed"]["proj"](x).flatten(2).transpose(1, 2) + table
            for block in parts["blocks"]:
                tokens = block(tokens)
            expected = parts["norm"](tokens)
            torch.testing.assert_close(model.alone(m, features), expected)
            torch.testing.assert_close(model.shared(model.own(m, model.embedded(m, features)), ""), expected)


def test_begun_from_an_mae_the_decoder_is_that_mae_s():
    state, _ = mae_of_imagenet()
    ours = begun(state).state_dict()
    assert torch.equal(ours["decoder_pred_v.weight"], state["decoder_pred.weight"])
    assert torch.equal(ours["decoder_pred_a.weight"], state["decoder_pred.weight"][:256])
    assert torch.equal(ours["decoder_pred_a.bias"], state["decoder_pred.bias"][:256])
    assert torch.equal(ours["decoder_pos_embed_v"], state["decoder_pos_embed"][:, 1:])
    for key in ("decoder_embed.weight", "decoder_blocks.1.attn.qkv.weight", "decoder_norm.bias", "mask_token"):
        assert torch.equal(ours[key], state[key])


def test_an_encoder_is_enough_to_begin_from_but_no_less():
    state, _ = mae_of_imagenet()
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith(("decoder", "mask"))}
    assert torch.equal(begun(encoder).state_dict()["blocks_v.1.norm1.weight"], state["blocks.1.norm1.weight"])
    with pytest.raises(ValueError, match=r"`state` must be of an ImageNet MAE .* 'blocks.3.norm1.weight' is missing"):
        begun(encoder, depth=4)


# Retrieval.


def test_ties_go_before_ones_own():
    assert ranks_of_own(np.ones((4, 4))).tolist() == [4, 4, 4, 4]
    assert retrieval(np.eye(20), np.eye(20)) == (1, 1, 1, 1)
    assert retrieval(np.zeros((20, 2)), np.ones((20, 2))) == (0, 0, 0, 20)
    assert retrieval(np.eye(20), np.roll(np.eye(20), 1, axis=0)).r1 == 0


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CavMae(task_of(), "audio"), r"`mode` must be one of \['multimodal', .*\], got 'audio'"),
        (lambda: tiny(size=50), r"`task.size` must be a multiple of 16, the size of a patch, got 50"),
        (lambda: tiny(audio_frames=100), r"`audio_frames` must be a multiple of 16.*got 100"),
        (lambda: tiny(depth=1), r"`specific` must lie in 1..0, one block at least being shared, got 0"),
        (
            lambda: tiny(streams=("audio",)),
            r"`streams` must have \['audio', 'visual'\] for 'multimodal', got \['audio'\]",
        ),
        (lambda: begun(mae_of_imagenet()[0]).masks(1, audio_ratio=1), r"`audio_ratio` must lie in \[0, 1\), got 1"),
        (lambda: begun(mae_of_imagenet()[0]).masks(1, structure="rows"), r"`structure` must be one of .* got 'rows'"),
        (lambda: retrieval(np.eye(3), np.eye(3)[:2]), r"`items` must have one row for each of 3 queries, got 2"),
        (lambda: retrieval(np.eye(3), np.full((3, 3), np.nan)), r"`items` must be finite, got nan first at sample 0"),
        (lambda: retrieval(np.zeros((0, 3)), np.eye(3)[:0]), r"`queries` must be \[sample, dim\] .* got \[0, 3\]"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
