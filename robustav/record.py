"""What a run is: everything that decides its numbers, and what its reader wants to know beside."""

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

import robustav
from robustav.classifier import Classifier
from robustav.data.samples import Samples
from robustav.goals import Goal
from robustav.ledger import Ledger, digest_of, digest_of_model
from robustav.plan import Condition


def identity_of(
    model: Classifier,
    weights: str,
    samples: Samples,
    chosen: Sequence[int],
    rows: Sequence[Condition],
    goal: Goal,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    name: str | None = None,
) -> dict[str, Any]:
    """Everything that decides a number. A folder with another identity holds another run.

    `name` is how the model was asked for: two models may have the same weights and differ in a front end's statistics.
    """
    seen = model.surrogate()  # what attacks see in the model's place, if that is another
    return {
        "model": name or type(model).__name__,
        "weights": weights,
        "surrogate": "" if seen is model else f"{type(seen).__qualname__} {digest_of_model(seen)[:12]}",
        "label_kind": model.label_kind,
        "classes": list(model.classes),
        "specs": {
            m: {"shape": list(s.shape), "low": s.low, "high": s.high, "unit": s.unit, "sample_rate": s.sample_rate}
            for m, s in model.specs.items()
        },
        "data": samples.digest,
        "clips": digest_of([samples.ids[i] for i in chosen]),
        "goal": {**goal.settings(), "words": goal.words(model.classes)},
        "conditions": {row.key: row.describe(model.specs) for row in rows},
        "seed": seed,
        "batch_size": batch_size,
        "device": device.type,
        "versions": {"robustav": robustav.__version__, "torch": torch.__version__},
    }


def check_model(ledger: Ledger, model: Classifier) -> None:
    """Raise `ValueError` unless the run was made with this very model, for these very classes."""
    identity = ledger.record()["identity"]
    then, now = identity["weights"], digest_of_model(model)
    if then != now:
        raise ValueError(
            f"{ledger.folder} was made with other weights ({then[:12]} there, {now[:12]} here): give the run's own with "
            "--model and --checkpoint"
        )
    if identity["classes"] != list(model.classes) or identity["label_kind"] != model.label_kind:
        raise ValueError(
            f"{ledger.folder} was made with other classes, or another label kind, than the model has here: give the run's own "
            f"with --model ({identity['model']})"
        )


def record_of(
    identity: Mapping[str, Any],
    model: Classifier,
    samples: Samples,
    chosen: Sequence[int],
    device: torch.device,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The identity, and what else a report's header says."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "identity": dict(identity),
        "model": type(model).__name__,
        "about": dict(about or {}),
        "samples": samples.name,
        "clips": len(chosen),
        "clips_in_all": len(samples.ids),
        "unknown_labels": {k: len(v) for k, v in getattr(samples, "unknown_labels", {}).items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": f"{name}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
