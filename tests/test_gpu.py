"""On a GPU: the same draws, the same decisions, and memory errors that only cost time."""

import numpy as np
import pytest
import torch
from conftest import TinySamples, few_steps, tiny_fusion
from test_harness import GOAL, rows_for

from robustav.attacks import FGSM, PGD, Noise
from robustav.harness import Settings, evaluate
from robustav.ledger import failures
from robustav.view import AttackView

ATTACKED = {"noise": Noise(), "fgsm": FGSM(), "pgd": PGD(5)}


def run(out, device, **settings):
    options = Settings(device=device, **settings)
    return evaluate(tiny_fusion(), TinySamples(20), rows_for(ATTACKED), GOAL, out, settings=options)


@pytest.mark.gpu
def test_cpu_and_gpu_decide_alike(tmp_path):
    cpu, gpu = run(tmp_path / "cpu", "cpu", batch_size=8), run(tmp_path / "gpu", "cuda", batch_size=8)
    for key in cpu.record()["identity"]["conditions"]:
        left, right = cpu.read(key), gpu.read(key)
        np.testing.assert_allclose(np.stack(left["logits"]), np.stack(right["logits"]), rtol=2e-2, atol=2e-2)
        assert (left["reached"] == right["reached"]).mean() >= 0.95
        if key.startswith("noise"):
            np.testing.assert_allclose(left["snr_db_audio"], right["snr_db_audio"], rtol=1e-6)
    assert failures(gpu) == {}


@pytest.mark.gpu
def test_every_attack_runs_on_the_gpu_and_stays_in_its_budget(tmp_path):
    settings = Settings(device="cuda", batch_size=8)
    ledger = evaluate(tiny_fusion(), TinySamples(20), rows_for(few_steps()), GOAL, tmp_path, settings=settings)
    assert failures(ledger) == {}
    for key in ledger.record()["identity"]["conditions"]:
        assert (ledger.read(key)["gauge"] <= 1).all()


@pytest.mark.gpu
def test_auto_takes_the_gpu(tmp_path):
    assert run(tmp_path, "auto").record()["identity"]["device"] == "cuda"


def test_a_batch_that_does_not_fit_is_attacked_in_halves(tmp_path, monkeypatch):
    """The GPU's memory error, raised here by hand whenever more than three clips come at once."""
    whole = run(tmp_path / "whole", "cpu", batch_size=10)
    fuse = AttackView.fuse

    def small(self, features):
        if len(next(iter(features.values()))) > 3:
            raise torch.cuda.OutOfMemoryError("by hand")
        return fuse(self, features)

    monkeypatch.setattr(AttackView, "fuse", small)
    halves = run(tmp_path / "halves", "cpu", batch_size=10)
    for key in whole.record()["identity"]["conditions"]:
        left, right = whole.read(key), halves.read(key)
        np.testing.assert_allclose(np.stack(left["logits"]), np.stack(right["logits"]), rtol=1e-3, atol=1e-3)
        assert list(left["reached"]) == list(right["reached"])
        assert list(left["forwards"]) == list(right["forwards"])
