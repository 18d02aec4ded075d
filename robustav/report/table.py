"""From ledgers to a table: one row for each condition, every rate with its count and its 95 % interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustav.flags import Flag, inspect
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
from robustav.metrics.tagging import (
    average_precision,
    d_prime,
    f1_thresholds,
    hide_rate,
    label_ranking_average_precision,
    macro_mean,
    mean_roc_auc,
    top1_hit,
)
from robustav.plan import CLEAN
from robustav.report.smallest import smallest_budgets
from robustav.report.words import WORST, header_of, name_of, notes_of

SCORES = ("mAP", "AUC", "d_prime", "LRAP", "top1", "hidden", "success", "drop")
NO_INTERVAL = (np.nan, np.nan)


@dataclass(frozen=True)
class Report:
    """A table, what it is about, and what its reader must know; renderers compute nothing."""

    headers: dict[str, dict[str, str]]  # run -> what it is about
    table: pd.DataFrame  # one row a condition, by `run`; a missing value is not applicable
    smallest: pd.DataFrame  # one row for each set of modalities whose smallest budgets were looked for
    flags: pd.DataFrame  # run, name, sentence, advice: reasons to doubt the numbers
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
    names = [name_of(ledger.record()) for ledger in ledgers]
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
        pd.concat([part.smallest for part in parts], ignore_index=True),
        pd.concat([part.flags for part in parts], ignore_index=True),
        missing + [f"{next(iter(part.headers))}: {note}" for part in parts for note in part.notes],
        pd.concat([part.skipped for part in parts], ignore_index=True),
        any(part.failed for part in parts),
    )


def _build_one(ledger: Ledger, run: str) -> Report:
    record = ledger.record()
    described: dict[str, dict[str, Any]] = record["identity"]["conditions"]
    clean = usable(ledger, CLEAN.key, record["clips"])
    reasons = skipped(ledger)
    left_out = pd.DataFrame({"run": run, "sample": list(reasons), "reason": list(reasons.values())})
    nothing = pd.DataFrame()
    if clean.empty:
        header = {run: header_of(record, 0, failed=False)}
        return Report(header, nothing, nothing, nothing, ["no clip could be used"], left_out, failed=False)
    scorer = _Scorer(record, clean)
    rows = [scorer.row(clean, CLEAN.name, (), 0, "", ledger.seconds(CLEAN.key))]
    looked = {CLEAN.key: light(clean)}  # what flags and smallest budgets are read from
    for level in sorted({d["level"] for d in described.values() if d["attacked"]}):
        # One epsilon at a time, so that a long curve over a large data set fits into memory.
        here = {key: d for key, d in described.items() if d["attacked"] and d["level"] == level}
        frames = {CLEAN.key: clean} | {key: usable(ledger, key, record["clips"]) for key in here}
        looked |= {key: light(frame) for key, frame in frames.items()}
        settle_all(frames, here, looked, lambda key: usable(ledger, key, record["clips"]))
        bounded = {key: d for key, d in here.items() if not d["smallest"]}
        for attacked in dict.fromkeys(tuple(d["attacked"]) for d in bounded.values()):
            keys = [key for key, d in bounded.items() if tuple(d["attacked"]) == attacked]
            budget = "; ".join(f"{m} {text}" for m, text in here[keys[0]]["budgets"].items())
            for key in keys:
                name, spared = here[key]["name"], bool(here[key]["after"])
                row = scorer.row(frames[key], name, attacked, level, budget, ledger.seconds(key), spared)
                rows.append(row)
            # An adversary who may touch both may touch one, or nothing: those are candidates too.
            members = [CLEAN.key] + [key for key, d in bounded.items() if set(d["attacked"]) <= set(attacked)]
            seconds = sum(ledger.seconds(key) for key in members)
            attacks = [bounded[key] for key in members[1:] if bounded[key]["knowledge"] != "nothing"]
            # Where ascents spared clips, or there was none, no score but success says how bad the worst is.
            ascents = [bool(d["after"]) for d in attacks if not d["search"]]
            spared = bool(attacks) and (any(ascents) or not ascents)
            worst = worst_case([frames[key] for key in members])
            rows.append(scorer.row(worst, WORST, attacked, level, budget, seconds, spared))
    table = pd.DataFrame(rows)
    table.insert(0, "run", run)
    # What an attack did is told against the clean scores: where those are not valid, nothing is.
    table["violations"] += table["violations"].iloc[0] * (table["attacked"] != "")
    failed = bool((table["violations"] > 0).any())
    smallest = smallest_budgets(record, looked)
    failed = failed or bool(len(smallest) and (smallest["violations"] > 0).any())
    smallest.insert(0, "run", run)
    flags = pd.DataFrame([*ledger.flags(), *inspect(looked, described, clean)], columns=Flag._fields)
    flags.insert(0, "run", run)
    header = {run: header_of(record, len(clean), failed)}
    notes = [] if ledger.has_flags() else ["The model itself was not looked at: flags are those of the attacks alone."]
    notes += notes_of(
        record, table, clean, scorer.fair_game, scorer.hittable, scorer.clean.dropped, len(scorer.weights)
    )
    return Report(header, table, smallest, flags, notes, left_out, failed)


def light(rows: pd.DataFrame) -> pd.DataFrame:
    """A condition's rows without what makes them large."""
    return rows.drop(columns=["logits", "labels"])


def settle_all(
    frames: dict[str, pd.DataFrame],
    described: Mapping[str, Mapping[str, Any]],
    looked: Mapping[str, pd.DataFrame],
    read: Callable[[str], pd.DataFrame],
) -> None:
    """Have every clip that a cheaper condition broke stand as that one left it, whether or not it was attacked again.

    So a row that spares such clips counts what it and all before it reach, and sparing them changes no number. `frames`
    are those of one epsilon; `read` gives those of others.
    """
    for key, description in described.items():
        rows = frames[key]
        unsettled = rows["settled"].eq("").to_numpy()
        for earlier in description["after"]:
            sound = looked[earlier]["violation"].eq("")
            broke = (looked[earlier]["reached"].astype(bool) & sound).to_numpy() & unsettled
            if broke.any():
                costs = rows[["forwards", "backwards"]]
                left = frames[earlier] if earlier in frames else read(earlier)
                rows = pd.concat([rows[~broke], left[broke]]).sort_index()
                rows[["forwards", "backwards"]] = costs
            unsettled = unsettled & ~broke
        frames[key] = rows


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
        self.hittable: NDArray[np.bool_] = np.asarray(
            self.labels.any(1)
        )  # a clip without a label has no top-1 hit to lose
        # Scores that follow from success alone.
        top1 = identity["goal"].get("success") == "top1" and self.hittable.all()
        self.decided = {"top1"} if top1 else set()
        if top1 and self.headline == "top1":
            self.decided.add("drop")
        self.samples = clean["sample"]
        # Labels that may be hidden: those that the goal is about, detected at the thresholds that suit the clean scores.
        about = np.isin(np.arange(self.labels.shape[1]), _chosen(identity))
        self.hideable = self.labels * about.astype(np.int8)
        self.untouched = self._logits(clean)
        self.thresholds = f1_thresholds(self.untouched, self.hideable)
        self.clean = self._scores(clean)

    @staticmethod
    def _logits(rows: pd.DataFrame) -> NDArray[np.float64]:
        return np.stack(rows["logits"].to_list()).astype(np.float64)

    def _ranked(self, logits: NDArray[np.float64]) -> dict[str, float]:
        """Ranks of classes within each clip; nan where no clip has a label."""
        values = label_ranking_average_precision(logits, self.labels)[self.hittable]
        if not len(values):
            return {"LRAP": np.nan, **_ends("LRAP", NO_INTERVAL)}
        weights = self.weights[:, self.hittable]
        with np.errstate(invalid="ignore"):
            resampled = weights @ values / weights.sum(1)
        return {"LRAP": values.mean(), **_ends("LRAP", self._bootstrapped(percentile_interval(resampled), 0, 1))}

    def _hidden(self, logits: NDArray[np.float64]) -> dict[str, float]:
        """Share of labels detected on the clean clips that no longer are."""
        rate = hide_rate(self.untouched, logits, self.hideable, self.thresholds)
        detected = (self.hideable == 1) & (self.untouched >= self.thresholds)
        lost = (detected & (logits < self.thresholds)).sum(1)
        with np.errstate(invalid="ignore"):
            resampled = (self.weights @ lost) / (self.weights @ detected.sum(1))
        ends = self._bootstrapped(percentile_interval(resampled), 0, 1) if rate.detected else NO_INTERVAL
        # Thresholds fitted to a few clips lie on the clips themselves.
        value = rate.value if len(self.labels) >= FEW_CLIPS else np.nan
        return {"hidden": value, **_ends("hidden", ends), "hidden_of": rate.detected}

    def _scores(self, rows: pd.DataFrame) -> _Scores:
        logits = self._logits(rows)
        precision = macro_mean(average_precision(logits, self.labels))
        hits = top1_hit(logits, self.labels)[self.hittable]
        resampled = bootstrap(logits, self.labels, self.weights)
        return _Scores(hits, precision.value, mean_roc_auc(logits, self.labels), resampled, precision.dropped)

    def row(
        self,
        rows: pd.DataFrame,
        name: str,
        attacked: tuple[str, ...],
        level: int,
        budget: str,
        seconds: float,
        spared: bool = False,
    ) -> dict[str, Any]:
        """One line of the table. Where clips were `spared`, only what follows from success is a score."""
        if list(rows["sample"]) != list(self.samples):
            raise ValueError(f"the rows of {name} are not about the clips of the clean row: the ledger is damaged")
        scores, hittable, logits = self._scores(rows), int(self.hittable.sum()), self._logits(rows)
        row: dict[str, Any] = {
            "condition": name,
            "attacked": "+".join(attacked),
            "level": level if attacked else -1,
            "budget": budget,
            "spared": spared,
            "clips": len(rows),
            "mAP": scores.mAP,
            **_ends("mAP", self._bootstrapped(centred_interval(scores.mAP, scores.resampled.map), 0, 1)),
            "AUC": scores.AUC,
            **_ends("AUC", self._bootstrapped(percentile_interval(scores.resampled.auc))),
            "d_prime": float(d_prime(scores.AUC)),
            **_ends("d_prime", self._bootstrapped(percentile_interval(scores.resampled.d_prime))),
            **self._ranked(logits),
            "top1": scores.hits.mean() if hittable else np.nan,
            **_ends("top1", wilson(scores.hits.sum(), hittable) if hittable else NO_INTERVAL),
            "top1_of": hittable,
        }
        row |= self._hidden(logits) if attacked else dict.fromkeys(["hidden", "hidden_low", "hidden_high", "hidden_of"])
        row |= self._against_clean(rows, attacked, scores)
        if spared:
            unknown = [s for s in SCORES if s != "success" and s not in self.decided]
            row |= dict.fromkeys([f"{s}{end}" for s in unknown for end in ("", "_low", "_high")], np.nan)
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


def _chosen(identity: Mapping[str, Any]) -> list[int]:
    """The classes that the goal is about: those it names, else all."""
    chosen = identity["goal"].get("chosen")
    return list(chosen) if isinstance(chosen, list) else list(range(len(identity["classes"])))


def _ends(name: str, interval: Sequence[Any]) -> dict[str, float]:
    return {f"{name}_low": float(interval[0]), f"{name}_high": float(interval[1])}
