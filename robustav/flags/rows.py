"""What attacks left in the ledger: figures that no row should have, and rows that contradict each other."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from robustav.flags.flag import Flag, clips, percent, raised
from robustav.flags.scores import FEW
from robustav.metrics.intervals import wilson
from robustav.view import LATE

Clips = NDArray[np.bool_]  # one truth a clip, in the order of the clean rows

CLIMBING = 0.05  # of the whole gain in loss: more of it in the last looks means that the attack was still climbing
PACE = 0.5  # but not less than this share of what the last looks of a steady climb bring, or short attacks all do
BLIND = 0.01  # share of an attack's gradients that may be zero before it is worth a word
POINTS = 0.002  # robust accuracy that attacks without gradients may take from those with
SHARE, AT_LEAST = 0.01, 2  # of the clips: what chance and rounding may do
GAP = 0.5  # of the clips: how much better transfer may do where it was made
CHANCE = 0.05  # level of the sign test for a larger budget that does worse
WITHOUT = ("scores", "labels", "transfer")  # knowledge that needs none of this model's gradients
TARGETS = re.compile(r"\b(?:aims|targets)=(\d+)")
MARGIN = re.compile(r"\bloss='([^']*dlr[^']*)'", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One condition: what it was and what it left, clip by clip."""

    key: str
    described: Mapping[str, Any]
    frame: pd.DataFrame  # of the clips of the clean row, in its order
    fair: Clips  # the goal was not reached on the clean clip

    @property
    def name(self) -> str:
        """As the report prints it."""
        return str(self.described["name"])

    @property
    def attacked(self) -> frozenset[str]:
        """Its modalities."""
        return frozenset(self.described["attacked"])

    @property
    def where(self) -> str:
        """The condition in words."""
        return f"{self.name} on {self.on}"

    @property
    def on(self) -> str:
        """What is attacked, and by how much."""
        return f"{'+'.join(sorted(self.attacked))} at {', '.join(map(str, self.described['radii'].values()))}"

    @property
    def knowledge(self) -> str:
        """What the attack knows of the model."""
        return str(self.described.get("knowledge", "nothing" if self.name == "noise" else "gradients"))

    def truths(self, column: str) -> Clips:
        """A column of booleans; a missing value is False."""
        if column not in self.frame:
            return np.zeros(len(self.frame), dtype=bool)
        return (self.frame[column] == True).to_numpy(dtype=bool)  # noqa: E712  (null is neither)

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A column of numbers, nan where there is none."""
        if column not in self.frame:
            return np.full(len(self.frame), np.nan)
        return self.frame[column].to_numpy(dtype=np.float64)

    @property
    def reached(self) -> Clips:
        """Where the goal was reached, by this attack or a cheaper one."""
        return self.truths("reached")

    @property
    def tried(self) -> Clips:
        """Clips that were to be had and that this attack itself went for."""
        if "settled" not in self.frame:
            return self.fair
        return self.fair & (self.frame["settled"].fillna("") == "").to_numpy(dtype=bool)


def inspect(
    rows: Mapping[str, pd.DataFrame], described: Mapping[str, Mapping[str, Any]], clean: pd.DataFrame
) -> list[Flag]:
    """Every flag of a run's ledger. `rows` and `described` go by condition key; `clean` are the clean rows.

    Rows of clips that could not be used may be there and are left out.
    """
    clean = _usable(clean)
    if clean.empty:
        return []
    fair = ~clean["reached"].to_numpy(dtype=bool)
    found = [
        Row(key, described[key], _usable(frame).set_index("sample").loc[clean["sample"]].reset_index(), fair)
        for key, frame in rows.items()
        if described[key]["attacked"]
    ]
    classes = len(clean["logits"].iloc[0])
    flags = violations("clean", "the clean row", clean) + settings(found, classes)
    for row in found:
        flags += violations(row.key, row.where, row.frame) + zero_gradients(row) + silent_success(row)
    # An attack that looks for the smallest budget may exceed the one of its row: it is compared with nothing.
    bounded = [row for row in found if not row.described.get("smallest")]
    for group in _groups(bounded):
        flags += not_converged(group) + noise_wins(group)
    for row in bounded:
        beside = [r for r in bounded if r.described["level"] == row.described["level"] and r.attacked <= row.attacked]
        flags += black_box_wins(row, beside) + transfer_gap(row, beside)
    return flags + not_monotone(bounded)


def violations(key: str, where: str, frame: pd.DataFrame) -> list[Flag]:
    """BUDGET and RESCORE, from the audit's words."""
    flags = []
    words = [str(text) for text in frame["violation"].fillna("")]
    for name in ("BUDGET", "RESCORE"):
        bad = [
            (clip, parts)
            for clip, text in zip(frame["sample"], words, strict=True)
            if (
                parts := [part for part in text.split("; ") if part and ("scored again" in part) == (name == "RESCORE")]
            )
        ]
        if bad:
            clip, parts = bad[0]
            sentence = f"{where} is not valid: {clips(len(bad), len(frame))}, such as {clip}: {parts[0]}."
            flags.append(raised(name, sentence[0].upper() + sentence[1:], key))
    return flags


def settings(rows: Sequence[Row], classes: int) -> list[Flag]:
    """FEW-CLASSES and TOO-MANY-TARGETS, from the attacks' settings; once a run each."""
    flags = []
    texts = {row.name: str(row.described.get("attack", "")) for row in rows}
    losses = {name: found[1] for name, text in texts.items() if (found := MARGIN.search(text))}
    if classes <= FEW and losses:
        shown = ", ".join(f"{name} climbs {loss!r}" for name, loss in losses.items())
        words = f"The model has {classes} classes, too few for a loss that compares several: {shown}."
        flags.append(raised("FEW-CLASSES", words))
    wanted = {name: max(map(int, TARGETS.findall(text)), default=0) for name, text in texts.items()}
    if many := {name: count for name, count in wanted.items() if count > classes - 1}:
        shown = ", ".join(f"{name} aims at {count}" for name, count in many.items())
        flags.append(raised("TOO-MANY-TARGETS", f"A clip has at most {classes - 1} wrong classes, but {shown}."))
    return flags


def zero_gradients(row: Row) -> list[Flag]:
    """ZERO-GRAD at any step, one flag a modality.

    Of clips that stand: past its goal a loss such as DLR is honestly flat.
    """
    flags = []
    for m in sorted(row.attacked):
        shares = row.numbers(f"zero_gradients_{m}")[row.tried & ~row.reached]
        shares = shares[np.isfinite(shares)]
        if len(shares) and shares.mean() > BLIND:
            where = clips(int((shares > 0).sum()), len(shares))
            words = f"Where {row.where} failed, {percent(shares.mean())} of its gradients by {m} were exactly zero, on {where}."
            flags.append(raised("ZERO-GRAD", words, row.key))
    return flags


def silent_success(row: Row) -> list[Flag]:
    """SILENT-SUCCESS."""
    if (
        row.described.get("roams") or row.knowledge == "transfer"
    ):  # what it passed by was not this model's, or no budget's
        return []
    lost = int((row.truths("ever_reached") & ~row.reached & row.tried).sum())
    if not _beyond_rounding(lost, len(row.fair)):
        return []
    words = (
        f"{row.where} reached the goal on the way and returned a point that does not, on {clips(lost, len(row.fair))}."
    )
    return [raised("SILENT-SUCCESS", words[0].upper() + words[1:], row.key)]


def not_converged(group: Sequence[Row]) -> list[Flag]:
    """NOT-CONVERGED: clips that stand although every gradient attack that can tell was still climbing.

    Raised when success would leave its own 95 % interval if all of those clips fell, and they are more than chance.
    """
    # A search goes from one loss to another, and a minimum-norm attack out of the budget: their losses tell nothing.
    told = [row for row in group if not row.described.get("roams") and not row.described.get("search")]
    attacks = [row for row in told if row.knowledge == "gradients"]
    heard = [row for row in attacks if np.isfinite(row.numbers("late_gain")[row.tried & ~row.reached]).any()]
    if not heard:
        return []
    standing = group[0].fair & ~np.any([row.reached for row in attacks], axis=0)
    # An attack too short to tell, or that was spared the clip, says nothing of whether it was climbing.
    above = np.stack([np.where(row.tried, row.numbers("late_gain") - _bar(row), np.nan) for row in heard])
    climbing = int((standing & ~(above <= 0).any(0) & (above > 0).any(0)).sum())
    possible, fallen = int(group[0].fair.sum()), int((group[0].fair & ~standing).sum())
    high = float(wilson(fallen, possible).high)
    if climbing < AT_LEAST or (fallen + climbing) / possible <= high:
        return []
    last = heard[-1]
    least = min(_bar(row).min() for row in heard)
    words = (
        f"{climbing} of the {int(standing.sum())} clips that stand against the gradient attacks on "
        f"{last.on} were losing ground to the last: the "
        f"attack's last {LATE} looks still brought at least {percent(least)} of its gain in loss."
    )
    return [raised("NOT-CONVERGED", words, last.key)]


def noise_wins(group: Sequence[Row]) -> list[Flag]:
    """NOISE-WINS, for every gradient attack beside random noise of the same size."""
    flags = []
    for noise in (row for row in group if row.knowledge == "nothing"):
        for row in (row for row in group if row.knowledge in ("gradients", "universal")):
            both = noise.tried & row.tried
            ours, theirs = int((row.reached & both).sum()), int((noise.reached & both).sum())
            if _beyond_rounding(theirs - ours, len(row.fair)):
                words = f"{row.where} succeeds on {clips(ours, int(both.sum()))}, random noise of the same size on {theirs}."
                flags.append(raised("NOISE-WINS", words[0].upper() + words[1:], row.key))
    return flags


def black_box_wins(row: Row, beside: Sequence[Row]) -> list[Flag]:
    """BLACK-BOX-WINS, against the gradient attacks of the same budget on the same modalities or some of them."""
    attacks = [r for r in beside if r.knowledge == "gradients"]
    if row.knowledge not in WITHOUT or not attacks:
        return []
    # Also not reached by a point that stands there because this attack had found it first: nobody knows who else would.
    withstood = ~np.any([r.reached for r in attacks], axis=0)
    won = int((row.reached & row.tried & withstood).sum())
    if won < AT_LEAST or won <= POINTS * len(row.fair):
        return []
    words = (
        f"{row.where} needs no gradient of the model and fools {clips(won, len(row.fair))} that every gradient attack of "
        "that budget left standing."
    )
    return [raised("BLACK-BOX-WINS", words[0].upper() + words[1:], row.key)]


def transfer_gap(row: Row, beside: Sequence[Row]) -> list[Flag]:
    """TRANSFER-GAP, on the clips where no gradient attack has settled the matter."""
    if row.knowledge != "transfer":
        return []
    attacks = [r for r in beside if r.knowledge == "gradients"]
    open_clips = row.tried & ~np.any([r.reached for r in attacks] or [~row.fair], axis=0)
    there, here = (int((truth & open_clips).sum()) for truth in (row.truths("reached_source"), row.reached))
    total = int(open_clips.sum())
    if there - here < AT_LEAST or there - here <= GAP * total:
        return []
    words = f"{row.where} fools the model that its examples were made on with {clips(there, total)}, and this one with {here}."
    return [raised("TRANSFER-GAP", words[0].upper() + words[1:], row.key)]


def not_monotone(rows: Sequence[Row]) -> list[Flag]:
    """NOT-MONOTONE, for one attack on one set of modalities under two budgets, the one inside the other."""
    flags = []
    for small in rows:
        for large in rows:
            if small.name != large.name or small.attacked != large.attacked or not _inside(small, large):
                continue
            lost = int((small.reached & ~large.reached & small.fair).sum())
            won = int((large.reached & ~small.reached & small.fair).sum())
            if lost > won and binomtest(lost, lost + won, alternative="greater").pvalue < CHANCE:
                words = (
                    f"{large.where} leaves {clips(lost, len(small.fair))} standing that it fools within the smaller budget "
                    f"{small.described['level'] + 1}, and wins {won} others."
                )
                flags.append(raised("NOT-MONOTONE", words[0].upper() + words[1:], large.key))
    return flags


def _bar(row: Row) -> NDArray[np.float64]:
    """Late gain from which a clip's attack counts as still climbing, [clip]: the published 5 % from 100 looks on.

    Shorter attacks end in the middle of the same curve: on the shipped models APGD's last ten of 25 looks bring 7 % of
    the gain (median), and four times as many looks break no further clip.
    """
    looks = np.maximum(np.nan_to_num(row.numbers("forwards"), nan=np.inf), 1)
    return np.maximum(CLIMBING, np.minimum(PACE * LATE / looks, 1))


def _inside(small: Row, large: Row) -> bool:
    """Whether one budget is smaller in every modality; by radii in numbers or dB, else by the order of the run."""
    one, other = (dict(row.described.get("radii") or {}) for row in (small, large))
    if not one or one.keys() != other.keys():
        return bool(small.described["level"] < large.described["level"])
    sizes = [(_size(one[m]), _size(other[m])) for m in one]
    return all(s <= t for s, t in sizes) and any(s < t for s, t in sizes)


def _size(radius: float | str) -> float:
    return -float(radius.removesuffix("dB")) if isinstance(radius, str) else float(radius)


def _beyond_rounding(count: int, total: int) -> bool:
    return count >= AT_LEAST and count > SHARE * total


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one budget and one set of modalities."""
    keys = dict.fromkeys((row.described["level"], row.attacked) for row in rows)
    for key in keys:
        yield [row for row in rows if (row.described["level"], row.attacked) == key]


def _usable(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["skipped"].isna()].reset_index(drop=True) if "skipped" in frame else frame
