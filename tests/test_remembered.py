"""Clips attacked with what their last pass taught."""

from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import tiny_fusion
from torch import Tensor, distributed
from training_tools import batch, budgets, tiny_work

from robustav.threat import Budget
from robustav.training import guided
from robustav.training.guided import GuidedMixup
from robustav.training.loop import train
from robustav.training.method import Batch, Work
from robustav.training.recipe import Recipe
from robustav.training.remembered import LATEST, SHARE, SIGNS, GuidedRemembered, Remembered, bits_of, exchange, signs_of


def started(method: Remembered, **changes: object) -> Work:
    work = tiny_work(**changes)
    method.begin(work)
    method.begin_epoch(work)
    return work


def rows_of(work: Work, *rows: int) -> Batch:
    """What the loop hands to a method that loads clips by itself."""
    return batch(work, *rows)._replace(inputs={})


def gradients(work: Work, given: Batch) -> dict[str, Tensor]:
    """Of the loss that a step learns from, at given inputs; statistics of batch norms stay."""
    model = work.model
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    leaves = {m: x.clone().requires_grad_() for m, x in given.inputs.items()}
    loss = work.loss(model.finish(model.features(leaves)).logits, given.targets).mean()
    found = torch.autograd.grad(loss, list(leaves.values()))
    model.load_state_dict(kept)
    return dict(zip(leaves, found, strict=True))


def test_bits_come_back_as_they_went():
    signs = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)).sign() * (torch.rand(5, 3, 7) > 0.3)
    bits = bits_of(signs)
    assert bits.shape == (5, 2, 3) and bits.dtype == torch.uint8
    assert torch.equal(signs_of(bits, signs.shape[1:]), signs)


@pytest.mark.parametrize("reach", [1.0, 2.0])
def test_a_clip_is_first_as_it_is_then_where_its_gradient_pointed(reach, monkeypatch):
    method = Remembered(reach=reach)
    work = started(method)
    given = batch(work)
    slopes = gradients(work, given)
    seen = []
    whole = Work.trace

    def watched(self: Work, inputs: dict) -> object:
        seen.append({m: x.detach().clone() for m, x in inputs.items()})
        return whole(self, inputs)

    monkeypatch.setattr(Work, "trace", watched)
    method.train_step(work, rows_of(work))
    method.train_step(work, rows_of(work))
    for m, x in given.inputs.items():
        spec = work.model.specs[m]
        torch.testing.assert_close(seen[0][m], x)
        expected = (x + 0.05 * reach * slopes[m].sign()).clamp(spec.low, spec.high)
        torch.testing.assert_close(seen[1][m], expected)
    assert work.cost.forwards == work.cost.backwards == 12


def test_a_step_is_that_of_plain_training_at_those_points():
    method = Remembered()
    work, plain = started(method), tiny_work()
    given, points = batch(work), {}
    for m, x in given.inputs.items():
        signs = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).sign()
        work.memory[SIGNS.format(m)][given.rows] = bits_of(signs)
        points[m] = (x + 0.05 * signs).clamp(work.model.specs[m].low, work.model.specs[m].high)
    method.train_step(work, rows_of(work))
    plain.update(plain.loss(plain.trace(points).logits, given.targets).mean(), 6)
    for own, other in zip(work.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_two_gradients_that_agree_turn_a_sign_and_one_cancels_it():
    method = Remembered()
    work = started(method)
    given = batch(work)
    slopes = gradients(work, given)
    for m, slope in slopes.items():  # as if the last pass had said the opposite in one half, and the same in the other
        half = torch.ones_like(slope[0]).flatten()
        half[: len(half) // 2] = -1
        work.memory[SIGNS.format(m)][given.rows] = bits_of(half.reshape(slope[0].shape) * slope.sign())
    moved = {
        m: (0.05 * signs_of(work.memory[SIGNS.format(m)][given.rows], x.shape[1:])) for m, x in given.inputs.items()
    }
    points = {
        m: (x + moved[m]).clamp(work.model.specs[m].low, work.model.specs[m].high) for m, x in given.inputs.items()
    }
    slopes = gradients(work, given._replace(inputs=points))
    before = {m: signs_of(work.memory[SIGNS.format(m)][given.rows], x.shape[1:]) for m, x in given.inputs.items()}
    method.train_step(work, rows_of(work))
    for m, x in given.inputs.items():
        after = signs_of(work.memory[SIGNS.format(m)][given.rows], x.shape[1:])
        assert torch.equal(after, (before[m] + slopes[m].sign()).clamp(-1, 1)) and (after == 0).any() and after.any()


def test_clips_are_remembered_one_by_one():
    method = Remembered()
    work = started(method)
    method.train_step(work, rows_of(work, 3, 1, 8))
    kept = work.memory[SIGNS.format("audio")]
    assert kept[[1, 3, 8]].flatten(1).any(1).all() and work.memory[LATEST].nonzero().flatten().tolist() == [1, 3, 8]
    rest = torch.ones(24, dtype=torch.bool).index_fill(0, torch.tensor([1, 3, 8]), False)
    assert not kept[rest].any()
    before = kept[1].clone()
    method.train_step(work, rows_of(work, 3, 8))
    assert torch.equal(kept[1], before)
    method.begin_epoch(work)
    assert not work.memory[LATEST].any() and torch.equal(work.memory[SIGNS.format("audio")][1], before)


def test_what_is_remembered_fits_a_clip_that_is_augmented_otherwise():
    """Twice as loud, and turned over: the gradient comes back the same way."""
    method = Remembered()
    work = started(method)
    turned = replace(work, augment=lambda inputs: {**inputs, "audio": -0.5 * inputs["audio"].flip(1)})
    given = batch(work)
    slopes = gradients(work, given._replace(inputs=turned.augment(given.inputs)))
    method.train_step(turned, rows_of(work))
    shape = given.inputs["audio"].shape[1:]
    signs = signs_of(work.memory[SIGNS.format("audio")][given.rows], shape)
    torch.testing.assert_close(signs, (-0.5 * slopes["audio"].flip(1)).sign())


def test_of_a_clip_that_comes_twice_in_a_batch_all_gradients_count():
    """Turned over the second time, its two gradients need not agree; where they do not, their sum is nothing."""
    method = Remembered()
    work = started(method)
    turned = replace(work, augment=lambda inputs: {m: torch.cat([x[:2], x[2:].flip(-1)]) for m, x in inputs.items()})
    given = batch(work, 0, 1, 0)
    slopes = gradients(work, given._replace(inputs=turned.augment(given.inputs)))["audio"]
    method.train_step(turned, rows_of(work, 0, 1, 0))
    kept = signs_of(work.memory[SIGNS.format("audio")], given.inputs["audio"].shape[1:])
    expected = (slopes[0].sign() + slopes[2].flip(-1).sign()).sign()
    assert torch.equal(kept[0], expected) and (expected == 0).any() and expected.any()
    assert torch.equal(kept[1], slopes[1].sign())


def test_the_share_of_numbers_that_are_moved_is_told():
    method = Remembered()
    work = started(method)
    method.train_step(work, rows_of(work))
    assert work.memory[SHARE] == 0
    method.train_step(work, rows_of(work))
    assert 0.9 < work.memory[SHARE] <= 1


def test_a_norm_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="`norm` must be linf"):
        train(Recipe(model="audio-cnn", method="remembered", norm="l2", limit=32, epochs=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_modalities_with_a_budget_are_moved():
    method, model = Remembered(), tiny_fusion()
    work = started(method, model=model, budgets={"audio": budgets(model)["audio"]})
    method.train_step(work, rows_of(work))
    assert [key for key in work.memory if key.startswith("remembered/signs")] == ["remembered/signs/audio"]
    with pytest.raises(ValueError, match="`budgets` must name at least one modality"):
        method.check_budgets(model, {})
    ball = {m: Budget("l2", 0.5, low=-1.0, high=1.0) for m in model.specs}
    for made in (method, GuidedRemembered()):
        made.check_budgets(model, budgets(model))
        with pytest.raises(ValueError, match="`norm` must be linf, since signs are what is remembered of a gradient"):
            made.check_budgets(model, ball)
    with pytest.raises(ValueError, match="`reach` must be above 0, got 0"):
        Remembered(reach=0)


@pytest.mark.parametrize("place", ["input", "features", "latent"])
def test_mixed_clips_are_attacked_each_at_its_own_input(place, monkeypatch):
    method = GuidedRemembered(place=place)
    work = started(method)
    seen = []
    whole = guided.parts_at

    def watched(work: Work, inputs: dict, place: str) -> object:
        seen.append(inputs["audio"].detach().clone())
        return whole(work, inputs, place)

    monkeypatch.setattr(guided, "parts_at", watched)
    state = work.generator.get_state()
    clips = method.draw(work, torch.arange(6)).rows
    work.generator.set_state(state)
    down = -torch.ones(24, *work.data.specs["audio"].shape)
    work.memory[SIGNS.format("audio")] = bits_of(down)
    method.train_step(work, rows_of(work))
    clean = work.data.inputs(clips)["audio"]
    torch.testing.assert_close(seen[0], (clean - 0.05).clamp(min=work.model.specs["audio"].low))
    drawn = work.memory[LATEST].nonzero().flatten()
    assert set(drawn.tolist()) == set(clips.tolist())
    assert work.memory[SIGNS.format("visual")][drawn].flatten(1).any(1).all()
    assert work.cost.forwards == work.cost.backwards == 6


def test_it_looks_as_guided_mixup_does():
    method = GuidedRemembered(start=0)
    work = started(method)
    assert work.cost.forwards == 24 and method.looks
    assert isinstance(method, GuidedMixup) and method.draw(work, torch.arange(6)).rows.shape == (6,)


def _exchange(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    kept = torch.full((4, 2, 1), 9, dtype=torch.uint8)  # what both had before
    latest = torch.tensor([[True, False, True, False], [False, True, True, False]][rank])
    kept[latest] = rank + 1
    model = tiny_fusion()
    work = tiny_work(model=model, budgets={"audio": budgets(model)["audio"]})
    work.memory.update({SIGNS.format("audio"): kept, LATEST: latest})
    exchange(work)
    assert not work.memory[LATEST].any()
    torch.save(work.memory[SIGNS.format("audio")], Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_processes_remember_what_the_one_has_that_saw_a_clip_last(tmp_path):
    context = get_context("spawn")
    processes = [context.Process(target=_exchange, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(*found)
    assert found[0][:, 0, 0].tolist() == [1, 2, 2, 9]
