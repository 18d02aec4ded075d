"""A report in words: what a run is about, and what the reader of its table must know."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustav.classifier import FEATURE
from robustav.metrics.intervals import FEW_CLIPS

MOST_LABELS = 10  # that a note each is given to
WORST = "worst case"
KNOWLEDGE = {
    "gradients": "white box",
    "scores": "black box (scores)",
    "labels": "black box (labels only)",
    "transfer": "transfer",
    "universal": "universal",
}


def name_of(record: dict[str, Any]) -> str:
    """The model's name."""
    return str(record["about"].get("model", record["model"]))


def header_of(record: dict[str, Any], used: int, failed: bool) -> dict[str, str]:
    """What a run is about, in a few words each."""
    identity, about = record["identity"], record["about"]
    versions = ", ".join(f"{package} {version}" for package, version in identity["versions"].items())
    levels: dict[int, dict[str, str]] = {d["level"]: {} for d in identity["conditions"].values() if d["attacked"]}
    for described in identity["conditions"].values():
        if described["attacked"]:
            levels[described["level"]] |= described["budgets"]
    budgets = [" and ".join(f"{m} {text}" for m, text in level.items()) for level in levels.values()]
    attacks = dict.fromkeys(
        f"{d['brief']} on {d['source']}" if d["source"] else d["brief"]
        for d in identity["conditions"].values()
        if d["attack"]
    )
    spent = f"{used} of {record['clips_in_all']} clips" + (
        f" ({record['clips'] - used} skipped)" * (used < record["clips"])
    )
    weights = f"{identity['weights'][:12]}, {record['parameters']:,} parameters"
    if "card" in about:
        weights += f", as shipped (file sha256 {about['card']['sha256'][:12]})"
    if "checkpoint" in about:
        weights += f", from {about['checkpoint']} (sha256 {about['checkpoint_sha256'][:12]})"
    if "resampled" in about:
        weights += f", {' and '.join(about['resampled'])} resampled to this model's size"
    return {
        "model": ", ".join([name_of(record), *(about[key] for key in ("summary", "paper") if about.get(key))]),
        "weights": weights,
        "data": f"{record['samples']}, data {identity['data'][:12]}, {spent}",
        "threat": _knowledge(identity["conditions"]) + "; " + ("; or ".join(budgets) or "nothing is attacked"),
        "goal": identity["goal"]["words"],
        "attacks": ", ".join(attacks) or "none",
        "run": f"seed {identity['seed']}, batches of {identity['batch_size']}, {versions}, Python {record['python']}",
        "device": f"{record['device']}, began {record['began']}",
        "audit": "FAILED: rows marked 'not valid' left their threat or their scores do not hold"
        if failed
        else "passed"
        if used
        else "nothing to audit",
    }


def _knowledge(described: dict[str, dict[str, Any]]) -> str:
    """What the adversaries of a run know of the model."""
    known = {d["knowledge"] for d in described.values()}
    return ", ".join(words for name, words in KNOWLEDGE.items() if name in known) or "no adversary"


def notes_of_labels(unknown: Mapping[str, int]) -> list[str]:
    """Labels that the model lacks, with how many clips have them."""
    notes = [
        f"Label {label!r} ({count} clip{'s' * (count > 1)}) is no class of the model and was ignored."
        for label, count in list(unknown.items())[:MOST_LABELS]
    ]
    if len(unknown) > MOST_LABELS:
        notes.append(f"... and {len(unknown) - MOST_LABELS} more labels that the model lacks.")
    return notes


def notes_of(
    record: dict[str, Any],
    table: pd.DataFrame,
    clean: pd.DataFrame,
    fair_game: NDArray[np.bool_],
    hittable: NDArray[np.bool_],
    dropped: int,
    resamples: int,
) -> list[str]:
    """What the table's reader must know, each in a sentence; nothing here is a matter of opinion."""
    headline = "mAP" if record["identity"]["label_kind"] == "multilabel" else "the top-1 hit rate"
    notes = [
        "Intervals are 95 %: Wilson for top-1 hit rate and attack success, bootstrap over clips "
        f"({resamples} resamples, paired for the drop) for the rest.",
        f"Attack success counts among the {int(fair_game.sum())} clips (of {len(clean)}) whose goal the clean input "
        f"had not reached already. The drop is of {headline}.",
    ]
    if table["hidden"].notna().any():
        notes.append(
            "Hidden: the share of labels detected on the clean clips, at each class's best F1 threshold there, that no longer "
            "are. mAP is blind to labels that all sink together."
        )
    if not hittable.all():
        notes.append(f"{int((~hittable).sum())} clips are labelled with no class: they have no top-1 hit to lose.")
    if record["identity"]["goal"].get("loss_name") == "ranking" and record["identity"]["goal"].get("success") == "top1":
        notes.append(
            "WARNING: the ranking loss rests once the weakest label is outranked, while success counts the strongest one: "
            "climb bce or top1 instead."
        )
    for _, row in table[table["violations"] > 0].iterrows():
        if row["condition"] != WORST and row["example"]:
            where = f"{row['condition']} on {row['attacked']}" if row["attacked"] else "the clean row"
            notes.append(
                f"AUDIT: {where} is not valid: {row['violations']} of {row['clips']} clips, such as {row['example']}"
            )
    notes.append("Robust scores are upper bounds: a stronger attack may lower them.")
    if table["spared"].any():
        notes.append(
            "Rows with + were run on the clips that no cheaper attack had broken, and count what it and all before it reach. "
            "Where an attack spares clips, mAP, AUC and d' are not its scores and are left out."
        )
    if len(clean) < FEW_CLIPS:
        notes.append(f"Fewer than {FEW_CLIPS} clips: no bootstrap intervals, and mAP, AUC and d' mean little.")
    elif (table["mAP_low"] == table["mAP_high"]).any() or (table["AUC_low"] == table["AUC_high"]).any():
        notes.append("An interval without width means that every resample scored alike, not that the score is certain.")
    if dropped:
        notes.append(
            f"{dropped} of {len(record['identity']['classes'])} classes have no positive clip here and are left out of mAP."
        )
    own = int((~clean["labelled"].astype(bool)).sum())
    if own:
        notes.append(
            f"{own} of {len(clean)} clips have no usable label: for them the model's own clean prediction stands in, so "
            "their clean scores are high by construction."
        )
    notes += notes_of_labels(record["unknown_labels"])
    specs = record["identity"]["specs"]
    featured = [m for m, spec in specs.items() if spec["unit"] == FEATURE]
    if featured:
        notes.append(
            f"What was changed are {' and '.join(featured)} features, not recordings: many such changes belong to no sound or "
            "picture. For diagnosis, and for protocols that were published so."
        )
    audio = specs.get("audio")
    if audio and audio["sample_rate"] and not str(record["samples"]).startswith("av-events"):
        seconds = audio["shape"][0] / audio["sample_rate"]
        notes.append(
            f"The model reads {seconds:g} s: of a longer clip what follows is not tested, a shorter one is padded with "
            "silence, which no attack touches."
        )
    if str(record["samples"]).startswith("av-events"):
        notes.append(
            "av-events is synthetic: its scores are for comparing models and attacks, not for any real recording."
        )
    if WORST in set(table["condition"]):
        notes.append(
            "Worst case: for each clip the row, among those of the same epsilon that touch no more than it, clean included, "
            "that reaches the goal, and of those the one with the largest loss. Scores that are not counted by that goal, such "
            "as mAP, can therefore lie above those of a single attack."
        )
    return notes
