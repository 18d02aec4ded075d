"""From ledgers to a table: one row for each condition, every rate with its count and its 95 % interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustav.ledger import Ledger, skipped
from robustav.metrics.intervals import (
    FEW_CLIPS,
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


@dataclass(frozen=True)
class Report:
    """A table, what it is about, and what its reader must know; renderers compute nothing."""

    headers: dict[str, dict[str, str]]  # run -> what it is about
    table: pd.DataFrame  # one row a condition, by `run`; a missing value is not applicable
    notes: list[str]
    skipped: pd.DataFrame  # run, sample, reason
    failed: bool  # the audit found something: the rows concerned are not valid


def worst_case(rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Clip by clip, the row that is worst for the model: goal reached first, then the larger loss.

    Taken before anything is averaged. The frames hold the same clips in the same order; costs add up. A clip of which
    some row is not valid has no valid worst row.
    """
    together = pd.concat(rows, keys=range(len(rows)), names=["member", "clip"]).reset_index()
    order = together.sort_values(["clip", "reached", "loss", "member"], ascending=[True, False, False, True])
    worst = order.drop_duplicates("clip").drop(columns=["member", "clip"]).reset_index(drop=True)
    for cost in ("forwards", "backwards"):
        worst[cost] = np.sum([frame[cost].to_numpy() for frame in rows], axis=0)
    worst["violation"] = ["; ".join(filter(None, words)) for words in zip(*(f["violation"] for f in rows), strict=True)]
    return worst


def build(ledgers: Sequence[Ledger]) -> Report:
    """One report over one or more runs, each under its model's name, and its folder's where names repeat.

    Raises `FileNotFoundError` if a run is not finished, `ValueError` if one is unsound.
    """
    names = [_name(ledger.record()) for ledger in ledgers]
    runs = [n if names.count(n) == 1 else f"{n} ({ledger.folder})" for n, ledger in zip(names, ledgers, strict=True)]
    if repeated := [run for run in runs if runs.count(run) > 1]:
        raise ValueError(f"the same run is named twice: {repeated[0]}")
    if len(ledgers) == 1:
        return _build_one(ledgers[0], runs[0])
    parts: list[Report] = []
    missing: list[str] = []
    for ledger, run in zip(ledgers, runs, strict=True):
        try:
            parts.append(_build_one(ledger, run))
        except FileNotFoundError as error:  # one unfinished run does not keep the others from being read
            missing.append(f"WARNING: {run} is left out: {error}")
    if not parts:
        raise FileNotFoundError("; ".join(missing))
    return Report(
        {run: header for part in parts for run, header in part.headers.items()},
        pd.concat([part.table for part in parts], ignore_index=True),
        missing + [f"{next(iter(part.headers))}: {note}" for part in parts for note in part.notes],
        pd.concat([part.skipped for part in parts], ignore_index=True),
        any(part.failed for part in parts),
    )


def _name(record: dict[str, Any]) -> str:
    return str(record["about"].get("model", record["model"]))


def _build_one(ledger: Ledger, run: str) -> Report:
    record = ledger.record()
    described: dict[str, dict[str, Any]] = record["identity"]["conditions"]
    clean = usable(ledger, CLEAN.key, record["clips"])
    reasons = skipped(ledger)
    left_out = pd.DataFrame({"run": run, "sample": list(reasons), "reason": list(reasons.values())})
    if clean.empty:
        header = {run: _header(record, 0, failed=False)}
        return Report(header, pd.DataFrame(), ["no clip could be used"], left_out, failed=False)
    scorer = _Scorer(record, clean)
    rows = [scorer.row(clean, CLEAN.name, (), 0, "", ledger.seconds(CLEAN.key))]
    for level in sorted({d["level"] for d in described.values() if d["attacked"]}):
        # One epsilon at a time, so that a long curve over a large data set fits into memory.
        here = {key: d for key, d in described.items() if d["attacked"] and d["level"] == level}
        frames = {CLEAN.key: clean} | {key: usable(ledger, key, record["clips"]) for key in here}
        for attacked in dict.fromkeys(tuple(d["attacked"]) for d in here.values()):
            keys = [key for key, d in here.items() if tuple(d["attacked"]) == attacked]
            budget = "; ".join(f"{m} {text}" for m, text in here[keys[0]]["budgets"].items())
            for key in keys:
                seconds = ledger.seconds(key)
                rows.append(scorer.row(frames[key], here[key]["name"], attacked, level, budget, seconds))
            # An adversary who may touch both may touch one, or nothing: those are candidates too.
            members = [CLEAN.key] + [key for key, d in here.items() if set(d["attacked"]) <= set(attacked)]
            seconds = sum(ledger.seconds(key) for key in members)
            rows.append(
                scorer.row(worst_case([frames[key] for key in members]), WORST, attacked, level, budget, seconds)
            )
    table = pd.DataFrame(rows)
    table.insert(0, "run", run)
    # What an attack did is told against the clean scores: where those are not valid, nothing is.
    table["violations"] += table["violations"].iloc[0] * (table["attacked"] != "")
    failed = bool((table["violations"] > 0).any())
    header = {run: _header(record, len(clean), failed)}
    return Report(header, table, _notes(record, table, clean, scorer), left_out, failed)


def usable(ledger: Ledger, key: str, clips: int) -> pd.DataFrame:
    """The rows of one condition without skipped clips; raises `FileNotFoundError` if the run is not finished."""
    rows = ledger.read(key)
    if len(rows) != clips:
        raise FileNotFoundError(
            f"{ledger.folder} is not finished: {key} has {len(rows)} of {clips} clips; run the same command again to go on"
        )
    return rows[rows["skipped"].isna()].reset_index(drop=True)


class _Scores(NamedTuple):
    hits: NDArray[np.bool_]  # of the clips that have a label
    mAP: float  # noqa: N815  (the field's own spelling)
    AUC: float
    resampled: MacroScores
    dropped: int  # classes without a positive clip


class _Scorer:
    """Scores the rows of one run with the same resamples of its clips, so that drops are paired."""

    def __init__(self, record: dict[str, Any], clean: pd.DataFrame) -> None:
        identity = record["identity"]
        self.modalities = sorted(identity["specs"])
        self.headline = "mAP" if identity["label_kind"] == "multilabel" else "top1"
        self.labels = np.zeros((len(clean), len(identity["classes"])), dtype=np.int8)
        for row, classes in enumerate(clean["labels"]):
            self.labels[row, np.asarray(classes, dtype=int)] = 1
        self.weights = bootstrap_weights(len(clean), seed=identity["seed"])
        self.fair_game = ~clean["reached"].to_numpy(dtype=bool)  # clips on which the goal is not reached already
        self.hittable = self.labels.any(1)  # a clip without a label has no top-1 hit to lose
        self.samples = clean["sample"]
        self.clean = self._scores(clean)

    def _scores(self, rows: pd.DataFrame) -> _Scores:
        logits = np.stack(rows["logits"].to_list()).astype(np.float64)
        precision = macro_mean(average_precision(logits, self.labels))
        hits = top1_hit(logits, self.labels)[self.hittable]
        resampled = bootstrap(logits, self.labels, self.weights)
        return _Scores(hits, precision.value, mean_roc_auc(logits, self.labels), resampled, precision.dropped)

    def row(
        self, rows: pd.DataFrame, name: str, attacked: tuple[str, ...], level: int, budget: str, seconds: float
    ) -> dict[str, Any]:
        """One line of the table."""
        if list(rows["sample"]) != list(self.samples):
            raise ValueError(f"the rows of {name} are not about the clips of the clean row: the ledger is damaged")
        scores, hittable = self._scores(rows), int(self.hittable.sum())
        row: dict[str, Any] = {
            "condition": name,
            "attacked": "+".join(attacked),
            "level": level if attacked else -1,
            "budget": budget,
            "clips": len(rows),
            "mAP": scores.mAP,
            **_ends("mAP", self._bootstrapped(centred_interval(scores.mAP, scores.resampled.map), 0, 1)),
            "AUC": scores.AUC,
            **_ends("AUC", self._bootstrapped(percentile_interval(scores.resampled.auc))),
            "d_prime": float(d_prime(scores.AUC)),
            **_ends("d_prime", self._bootstrapped(percentile_interval(scores.resampled.d_prime))),
            "top1": scores.hits.mean() if hittable else np.nan,
            **_ends("top1", wilson(scores.hits.sum(), hittable) if hittable else NO_INTERVAL),
            "top1_of": hittable,
        }
        row |= self._against_clean(rows, attacked, scores)
        for m in self.modalities:
            row[f"max_abs_{m}"] = rows[f"max_abs_{m}"].max()
            touched = rows.loc[np.isfinite(rows[f"snr_db_{m}"]), f"snr_db_{m}"]
            row[f"snr_db_{m}"] = touched.median() if len(touched) else np.nan
        row["gauge"] = rows["gauge"].max()
        row["forwards"], row["backwards"] = rows["forwards"].mean(), rows["backwards"].mean()
        row["seconds"] = seconds
        row["zero_gradients"] = rows["zero_gradients"].mean()
        bad = rows[rows["violation"] != ""]
        row["violations"] = len(bad)
        row["example"] = f"{bad['sample'].iloc[0]}: {bad['violation'].iloc[0]}" if len(bad) else ""
        return row

    def _against_clean(self, rows: pd.DataFrame, attacked: tuple[str, ...], scores: _Scores) -> dict[str, Any]:
        """Attack success among the clips where it was to be had, and the drop of the headline score, paired."""
        if not attacked:
            return dict.fromkeys(
                ["success", "success_low", "success_high", "success_of", "drop", "drop_low", "drop_high"]
            )
        reached, possible = int(rows["reached"].to_numpy(dtype=bool)[self.fair_game].sum()), int(self.fair_game.sum())
        if self.headline == "mAP":
            drop = self.clean.mAP - scores.mAP
            ends = centred_interval(drop, paired_drop(self.clean.resampled, scores.resampled).map)
        else:
            change = self.clean.hits.astype(float) - scores.hits
            drop = change.mean()
            ends = percentile_interval(self.weights @ change / len(change))
        return {
            "success": reached / possible if possible else np.nan,
            **_ends("success", wilson(reached, possible) if possible else NO_INTERVAL),
            "success_of": possible,
            "drop": drop,
            **_ends("drop", self._bootstrapped(ends)),
        }

    def _bootstrapped(self, ends: Interval, low: float = -np.inf, high: float = np.inf) -> Sequence[Any]:
        """An interval inside the score's range; none where there are too few clips to draw from."""
        return [np.clip(end, low, high) for end in ends] if len(self.labels) >= FEW_CLIPS else NO_INTERVAL


def _ends(name: str, interval: Sequence[Any]) -> dict[str, float]:
    return {f"{name}_low": float(interval[0]), f"{name}_high": float(interval[1])}


def _header(record: dict[str, Any], used: int, failed: bool) -> dict[str, str]:
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
    weights = f"{identity['weights'][:12]}, {record['parameters']:,} parameters"
    if "card" in about:
        weights += f", as shipped (file sha256 {about['card']['sha256'][:12]})"
    if "checkpoint" in about:
        weights += f", from {about['checkpoint']} (sha256 {about['checkpoint_sha256'][:12]})"
    return {
        "model": _name(record) + (f", {about['summary']}" if "summary" in about else ""),
        "weights": weights,
        "data": f"{record['samples']}, data {identity['data'][:12]}, {spent}",
        "threat": "white box; " + ("; or ".join(budgets) or "nothing is attacked"),
        "goal": identity["goal"]["words"],
        "attacks": ", ".join(attacks) or "none",
        "run": f"seed {identity['seed']}, batches of {identity['batch_size']}, {versions}, Python {record['python']}",
        "device": f"{record['device']}, began {record['began']}",
        "audit": "FAILED: rows marked 'not valid' left their threat or their scores do not hold"
        if failed
        else "passed",
    }


def _notes(record: dict[str, Any], table: pd.DataFrame, clean: pd.DataFrame, scorer: _Scorer) -> list[str]:
    """What the table's reader must know, each in a sentence; nothing here is a matter of opinion."""
    notes = [
        "Intervals are 95 %: Wilson for top-1 hit rate and attack success, bootstrap over clips "
        f"({len(scorer.weights)} resamples, paired for the drop) for the rest.",
        f"Attack success counts among the {int(scorer.fair_game.sum())} clips (of {len(clean)}) whose goal the clean input "
        f"had not reached already. The drop is of {'mAP' if scorer.headline == 'mAP' else 'the top-1 hit rate'}.",
    ]
    if not scorer.hittable.all():
        notes.append(
            f"{int((~scorer.hittable).sum())} clips are labelled with no class: they have no top-1 hit to lose."
        )
    logits = np.stack(clean["logits"].to_list())
    if ((logits >= 0) & (logits <= 1)).all():
        notes.append(
            "WARNING: every clean score lies between 0 and 1: the model seems to return probabilities where logits are "
            "expected. Thresholds are then wrong and gradients may vanish: return the scores before sigmoid or softmax."
        )
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
    notes.append(
        "These attacks are a first look: robust scores are upper bounds, and a stronger attack may lower them."
    )
    if len(clean) < FEW_CLIPS:
        notes.append(f"Fewer than {FEW_CLIPS} clips: no bootstrap intervals, and mAP, AUC and d' mean little.")
    elif (table["mAP_low"] == table["mAP_high"]).any() or (table["AUC_low"] == table["AUC_high"]).any():
        notes.append("An interval without width means that every resample scored alike, not that the score is certain.")
    if scorer.clean.dropped:
        notes.append(
            f"{scorer.clean.dropped} of {len(record['identity']['classes'])} classes have no positive clip here and are left out of mAP."
        )
    own = int((~clean["labelled"].astype(bool)).sum())
    if own:
        notes.append(
            f"{own} of {len(clean)} clips have no usable label: for them the model's own clean prediction stands in, so "
            "their clean scores are high by construction."
        )
    for label, count in list(record["unknown_labels"].items())[:10]:
        notes.append(f"Label {label!r} ({count} clip{'s' * (count > 1)}) is no class of the model and was ignored.")
    if len(record["unknown_labels"]) > 10:
        notes.append(f"... and {len(record['unknown_labels']) - 10} more labels that the model lacks.")
    audio = record["identity"]["specs"].get("audio")
    if audio and not str(record["samples"]).startswith("av-events"):
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
    attacks = table[(table["attacked"] != "") & ~table["condition"].isin(["noise", WORST])]
    for _, noise in table[table["condition"] == "noise"].iterrows():
        same = attacks[(attacks["attacked"] == noise["attacked"]) & (attacks["level"] == noise["level"])]
        for _, attack in same.iterrows():
            if attack["success"] < noise["success"] and not attack["violations"] and not noise["violations"]:
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
