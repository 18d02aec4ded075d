"""Did the attack stay inside its threat? Checked on what it returned, by code that it had no part in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from robustav.classifier import Inputs, InputSpec, check_modalities
from robustav.threat import Budget, ThreatModel

TOLERANCE = 1e-6  # of the budget, for the rounding of this check's own arithmetic
RESCORE = 1e-3  # of the batch's largest logit: far above the rounding of another batch order, far below what matters


def violations(
    clean: Inputs,
    returned: Mapping[str, Tensor],
    threat: ThreatModel,
    specs: Mapping[str, InputSpec],
    writable: Mapping[str, Tensor] | None = None,
    *,
    bounded: bool = True,
) -> list[str]:
    """For each sample, what is wrong with the returned inputs, in words; an empty string where nothing is.

    Checks finiteness, the model's valid range, the budget in float64, padding, and that every modality outside the
    threat is bit for bit what it was. What is no batch of these inputs at all raises `ValueError`.
    """
    check_form(clean, returned)
    found: list[list[str]] = [[] for _ in next(iter(clean.values()))]

    def note(bad: Tensor, words: str, values: Tensor | None = None) -> None:
        for index in bad.nonzero().flatten().tolist():
            found[index].append(words if values is None else f"{words} {values[index].item():.9g}")

    for m, x in returned.items():
        if m not in threat.budgets:
            note((x != clean[m]).flatten(1).any(1), f"{m} was changed, though the threat does not include it")
            continue
        note(~x.isfinite().flatten(1).all(1), f"{m} is not finite")
        low, high = specs[m].low, specs[m].high
        note(((x < low) | (x > high)).flatten(1).any(1), f"{m} leaves [{low:g}, {high:g}]")
        if bounded:  # an attack that looks for the smallest budget has none to keep
            over = excess(clean[m], x, threat.budgets[m])
            note(~(over <= 1 + TOLERANCE), f"{m}: length over budget is", over)
        if writable and m in writable:
            note(((x != clean[m]) & ~writable[m]).flatten(1).any(1), f"{m} was changed in its padding")
    return ["; ".join(words) for words in found]


def excess(clean: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """Length over radius of each sample, written out once more in float64: not the code that projected."""
    before = clean.detach().double().reshape(len(clean), -1)
    size = (x.detach().double().reshape(len(x), -1) - before).abs()
    match budget.norm:
        case "linf":
            length = size.amax(1)
        case "l2":
            length = size.square().sum(1).sqrt()
        case "l1":
            length = size.sum(1)
        case other:
            raise ValueError(f"the audit does not know the norm {other!r}: teach it before using it")
    if budget.snr_db is not None:
        radius = before.square().sum(1).sqrt() / 10 ** (budget.snr_db / 20) * budget.factor
    else:
        radius = torch.as_tensor(budget.radius(clean), dtype=torch.float64, device=length.device)
    return torch.where(length == 0, 0.0, length / radius)


def check_form(clean: Inputs, returned: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless an attack returned the same modalities, shapes and types."""
    check_modalities(returned, clean)
    for m, x in returned.items():
        if x.shape != clean[m].shape or x.dtype != clean[m].dtype:
            raise ValueError(
                f"the attack returned {m} as {x.dtype} {list(x.shape)} for {clean[m].dtype} {list(clean[m].shape)}"
            )


def rescore_violations(logits: Tensor, again: Tensor, reached: Tensor, reached_again: Tensor, size: float) -> list[str]:
    """For each sample, whether scoring the same input a second time told another story.

    Scores must agree to `RESCORE` of `size`, the largest logit of the clean batch. A decision that changes although the
    scores agree stood on a tie, which is no fault of the model.
    """
    gap = (logits - again).abs().amax(1)
    changed = (reached != reached_again).tolist()
    return [
        f"scored again, a logit changed by {g:.3g}"
        + (" and the decision with it" if c else "")
        + ": the model is random, or its scores depend on batch mates"
        if g > RESCORE * size
        else ""
        for g, c in zip(gap.tolist(), changed, strict=True)
    ]


def join(*words: str) -> str:
    """Findings side by side, empty ones left out."""
    return "; ".join(word for word in words if word)
