"""From ledgers to a table: one row for each condition, every rate with its count and its 95 % interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustav.ledger import Ledger
from robustav.metrics.intervals import (
    Interval,
    MacroScores,
    bootstrap,
    bootstrap_weights,
    centred_interval,
    paired_drop,
    percentile_interval,
    wilson,
)
from robustav.metrics.tagging import average_precision, d_prime, macro_mean, mean_roc_auc, top1_hit
from robustav.plan import CLEAN

WORST = "worst case"
NO_INTERVAL = (np.nan, np.nan)
FEW_CLIPS = 20  # below this, resampling clips says nothing of the clips that were not seen


@dataclass(frozen=True)
class Report:
    """A table, what it is about, and what its reader must know; renderers compute nothing."""

    header: list[tuple[str, str]]
    table: pd.DataFrame  # one row a condition; a missing value is not applicable
    notes: list[str]
    skipped: pd.DataFrame  # model, sample, reason
    failed: bool  # the audit found something: the rows concerned are not valid


def worst_case(rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Clip by clip, the row that is worst for the model: goal reached first, then the larger loss.

    Taken before anything is averaged. The frames hold the same clips in the same order; costs add up.
    """
    together = pd.concat(rows, keys=range(len(rows)), names=["member", "clip"]).reset_index()
    order = together.sort_values(["clip", "reached", "loss", "member"], ascending=[True, False, False, True])
    worst = order.groupby("clip", sort=True).first()
    for cost in ("forwards", "backwards"):
        worst[cost] = np.sum([frame[cost].to_numpy() for frame in rows], axis=0)
    # A clip whose worst row could not be told, since one of them is not valid, has no valid worst row.
    worst["violation"] = ["; ".join(filter(None, words)) for words in zip(*(f["violation"] for f in rows), strict=True)]
    return worst.drop(columns="member")


def build(ledgers: Sequence[Ledger]) -> Report:
    """One report over one or more runs. Raises `FileNotFoundError` if a run is not finished."""
    parts = [_build_one(ledger) for ledger in ledgers]
    if len(parts) == 1:
        return parts[0]
    header = [(f"{part.header[0][1]}: {key}", text) for part in parts for key, text in part.header]
    notes = [f"{part.header[0][1]}: {note}" for part in parts for note in part.notes]
    table = pd.concat([part.table for part in parts], ignore_index=True)
    skipped = pd.concat([part.skipped for part in parts], ignore_index=True)
    return Report(header, table, notes, skipped, any(part.failed for part in parts))


def _build_one(ledger: Ledger) -> Report:
    record = ledger.record()
    identity = record["identity"]
    described: dict[str, dict[str, Any]] = identity["conditions"]
    clean = _usable(ledger, CLEAN.key, record["clips"])
    name = str(record["about"].get("model", record["model"]))
    skipped = ledger.read(CLEAN.key).query("skipped.notna()")[["sample", "skipped"]]
    skipped = skipped.rename(columns={"skipped": "reason"}).assign(model=name)[["model", "sample", "reason"]]
    if clean.empty:
        return Report(_header(record, 0, name, False), pd.DataFrame(), ["no clip could be used"], skipped, False)
    scorer = _Scorer(record, clean)
    rows = [scorer.row(clean, CLEAN.name, (), 0, "", ledger.seconds(CLEAN.key))]
    for level in sorted({d["level"] for d in described.values() if d["attacked"]}):
        # One epsilon at a time, so that a long curve over a large data set fits into memory.
        here = {key: d for key, d in described.items() if d["attacked"] and d["level"] == level}
        frames = {CLEAN.key: clean} | {key: _usable(ledger, key, record["clips"]) for key in here}
        for attacked in dict.fromkeys(tuple(d["attacked"]) for d in here.values()):
            keys = [key for key, d in here.items() if tuple(d["attacked"]) == attacked]
            budget = "; ".join(f"{m} {text}" for m, text in here[keys[0]]["budgets"].items())
            for key in keys:
                seconds = ledger.seconds(key)
                rows.append(scorer.row(frames[key], here[key]["name"], attacked, level, budget, seconds))
            # An adversary who may touch both may touch one, or nothing: those are candidates too.
            members = [CLEAN.key] + [key for key, d in here.items() if set(d["attacked"]) <= set(attacked)]
            if len(members) > 2:
                seconds = sum(ledger.seconds(key) for key in members)
                worst = worst_case([frames[key] for key in members])
                rows.append(scorer.row(worst, WORST, attacked, level, budget, seconds))
    table = pd.DataFrame(rows)
    table.insert(0, "model", name)
    failed = bool((table["violations"] > 0).any())
    notes = _notes(record, table, clean, scorer)
    return Report(_header(record, len(clean), name, failed), table, notes, skipped, failed)


def _usable(ledger: Ledger, key: str, clips: int) -> pd.DataFrame:
    rows = ledger.read(key)
    if len(rows) != clips:
        raise FileNotFoundError(
            f"{ledger.folder} is not finished: {key} has {len(rows)} of {clips} clips; run the same command again to go on"
        )
    return rows[rows["skipped"].isna()].reset_index(drop=True)


class _Scorer:
    """Scores the rows of one run with the same resamples of its clips, so that drops are paired."""

    def __init__(self, record: dict[str, Any], clean: pd.DataFrame) -> None:
        self.modalities = sorted(record["specs"])
        self.headline = "mAP" if record["label_kind"] == "multilabel" else "top1"
        self.labels = np.zeros((len(clean), len(record["classes"])), dtype=np.int8)
        for row, classes in enumerate(clean["labels"]):
            self.labels[row, np.asarray(classes, dtype=int)] = 1
        self.weights = bootstrap_weights(len(clean), seed=record["identity"]["seed"])
        self.fair_game = ~clean["reached"].to_numpy(dtype=bool)  # clips on which the goal is not reached already
        self.clean_hits, self.clean_map, self.clean_resampled = self._scores(clean)
        self.samples = clean["sample"]

    def _scores(self, rows: pd.DataFrame) -> tuple[NDArray[np.bool_], float, MacroScores]:
        logits = np.stack(rows["logits"].to_list()).astype(np.float64)
        precision = macro_mean(average_precision(logits, self.labels))
        self.dropped = precision.dropped
        self.auc = mean_roc_auc(logits, self.labels)
        return top1_hit(logits, self.labels), precision.value, bootstrap(logits, self.labels, self.weights)

    def row(
        self, rows: pd.DataFrame, name: str, attacked: tuple[str, ...], level: int, budget: str, seconds: float
    ) -> dict[str, Any]:
        if name != CLEAN.name and list(rows["sample"]) != list(self.samples):
            raise ValueError(f"the rows of {name} are not about the clips of the clean row: the ledger is damaged")
        hits, mean_precision, resampled = self._scores(rows)
        count = len(rows)
        row: dict[str, Any] = {
            "condition": name,
            "attacked": "+".join(attacked),
            "level": level if attacked else -1,
            "budget": budget,
            "clips": count,
            "mAP": mean_precision,
            **_ends("mAP", self._bootstrapped(centred_interval(mean_precision, resampled.map), 0, 1)),
            "AUC": self.auc,
            **_ends("AUC", self._bootstrapped(percentile_interval(resampled.auc))),
            "d_prime": float(d_prime(self.auc)),
            **_ends("d_prime", self._bootstrapped(percentile_interval(resampled.d_prime))),
            "top1": hits.mean(),
            **_ends("top1", wilson(hits.sum(), count)),
        }
        row |= self._against_clean(rows, attacked, hits, mean_precision, resampled)
        for m in self.modalities:
            row[f"max_abs_{m}"] = rows[f"max_abs_{m}"].max()
            touched = rows[f"snr_db_{m}"].replace([np.inf, -np.inf], np.nan)
            row[f"snr_db_{m}"] = touched.median()
        row["gauge"] = rows["gauge"].max()
        row["forwards"], row["backwards"] = rows["forwards"].mean(), rows["backwards"].mean()
        row["seconds"] = seconds
        row["zero_gradients"] = rows["zero_gradients"].mean()
        row["violations"] = int((rows["violation"] != "").sum())
        return row

    def _bootstrapped(self, ends: Interval, low: float = -np.inf, high: float = np.inf) -> Sequence[Any]:
        """An interval inside the score's range; none where there are too few clips to draw from."""
        return [np.clip(end, low, high) for end in ends] if len(self.labels) >= FEW_CLIPS else NO_INTERVAL

    def _against_clean(
        self,
        rows: pd.DataFrame,
        attacked: tuple[str, ...],
        hits: NDArray[np.bool_],
        mean_precision: float,
        resampled: MacroScores,
    ) -> dict[str, Any]:
        """Attack success among the clips where it was to be had, and the drop of the headline score, paired."""
        if not attacked:
            return dict.fromkeys(
                ["success", "success_low", "success_high", "success_of", "drop", "drop_low", "drop_high"]
            )
        reached, possible = int(rows["reached"].to_numpy(dtype=bool)[self.fair_game].sum()), int(self.fair_game.sum())
        if self.headline == "mAP":
            drop = self.clean_map - mean_precision
            ends = centred_interval(drop, paired_drop(self.clean_resampled, resampled).map)
        else:
            change = self.clean_hits.astype(float) - hits
            drop = change.mean()
            ends = percentile_interval(self.weights @ change / len(change))
        return {
            "success": reached / possible if possible else np.nan,
            **_ends("success", wilson(reached, possible) if possible else NO_INTERVAL),
            "success_of": possible,
            "drop": drop,
            **_ends("drop", self._bootstrapped(ends)),
        }


def _ends(name: str, interval: Sequence[Any]) -> dict[str, float]:
    return {f"{name}_low": float(interval[0]), f"{name}_high": float(interval[1])}


def _header(record: dict[str, Any], used: int, name: str, failed: bool) -> list[tuple[str, str]]:
    identity, about = record["identity"], record["about"]
    versions = ", ".join(f"{package} {version}" for package, version in identity["versions"].items())
    levels: dict[int, dict[str, str]] = {d["level"]: {} for d in identity["conditions"].values() if d["attacked"]}
    for described in identity["conditions"].values():
        if described["attacked"]:
            levels[described["level"]] |= described["budgets"]
    budgets = [" and ".join(f"{m} {text}" for m, text in level.items()) for level in levels.values()]
    attacks = dict.fromkeys(d["attack"] for d in identity["conditions"].values() if d["attack"])
    spent = f"{used} of {record['clips_in_all']} clips" + (
        f" ({record['clips'] - used} skipped)" * (used < record["clips"])
    )
    weights = f"weights {identity['weights'][:12]}, {record['parameters']:,} parameters"
    if "checkpoint" in about:
        weights += f", from {about['checkpoint']} (sha256 {about['checkpoint_sha256'][:12]})"
    return [
        ("model", name + (f", {about['summary']}" if "summary" in about else "")),
        ("weights", weights),
        ("data", f"{record['samples']}, data {identity['data'][:12]}, {spent}"),
        ("threat", "white box; " + ("; or ".join(budgets) or "nothing is attacked")),
        ("goal", identity["goal"]),
        ("attacks", ", ".join(attacks) or "none"),
        ("run", f"seed {identity['seed']}, batches of {identity['batch_size']}, {versions}, Python {record['python']}"),
        ("device", f"{record['device']}, began {record['began']}"),
        (
            "audit",
            "FAILED: rows marked 'not valid' left their threat or their scores do not hold" if failed else "passed",
        ),
    ]


def _notes(record: dict[str, Any], table: pd.DataFrame, clean: pd.DataFrame, scorer: _Scorer) -> list[str]:
    """What the table's reader must know, each in a sentence; nothing here is a matter of opinion."""
    notes = [
        "Intervals are 95 %: Wilson for top-1 hit rate and attack success, bootstrap over clips "
        f"({len(scorer.weights)} resamples, paired for the drop) for the rest.",
        f"Attack success counts among the {int(scorer.fair_game.sum())} clips (of {len(clean)}) whose goal the clean input "
        "had not reached already.",
    ]
    if len(clean) < FEW_CLIPS:
        notes.append(f"Fewer than {FEW_CLIPS} clips: no bootstrap intervals, and mAP, AUC and d' mean little.")
    elif (table["mAP_low"] == table["mAP_high"]).any() or (table["AUC_low"] == table["AUC_high"]).any():
        notes.append("An interval without width means that every resample scored alike, not that the score is certain.")
    if scorer.dropped:
        notes.append(
            f"{scorer.dropped} of {len(record['classes'])} classes have no positive clip here and are left out of mAP."
        )
    own = int((~clean["labelled"].astype(bool)).sum())
    if own:
        notes.append(
            f"{own} of {len(clean)} clips have no usable label: for them the model's own clean prediction stands in, so "
            "their clean scores are perfect by construction."
        )
    for label, count in list(record["unknown_labels"].items())[:10]:
        notes.append(f"Label {label!r} ({count} clip{'s' * (count > 1)}) is no class of the model and was ignored.")
    if len(record["unknown_labels"]) > 10:
        notes.append(f"... and {len(record['unknown_labels']) - 10} more labels that the model lacks.")
    if str(record["samples"]).startswith("av-events"):
        notes.append(
            "av-events is synthetic: its scores are for comparing models and attacks, not for any real recording."
        )
    if WORST in set(table["condition"]):
        notes.append(
            "Worst case: for each clip the row, among those of the same epsilon that touch no more than it, clean included, "
            "that reaches the goal, and of those the one with the largest loss. Its mAP, a ranking over clips, can therefore lie "
            "above that of a single attack."
        )
    attacks = table[(table["attacked"] != "") & ~table["condition"].isin(["noise", WORST])]
    for _, noise in table[table["condition"] == "noise"].iterrows():
        same = attacks[(attacks["attacked"] == noise["attacked"]) & (attacks["level"] == noise["level"])]
        for _, attack in same.iterrows():
            if attack["success"] < noise["success"]:
                notes.append(
                    f"WARNING: {attack['condition']} on {attack['attacked']} succeeds less often than random noise of the "
                    "same size: the attack is broken or the gradient is masked."
                )
    for _, row in table[table["zero_gradients"] > 0].iterrows():
        if row["condition"] != WORST:
            notes.append(
                f"WARNING: {row['zero_gradients']:.1%} of the gradients of {row['condition']} on {row['attacked']} were exactly "
                "zero: the attack was blind there, so the robust score is too high."
            )
    return notes
