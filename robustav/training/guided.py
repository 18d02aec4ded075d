"""Mix-up guided by how clips lie in the latent."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustav.classifier import Classifier, Wrapped
from robustav.metrics.convexity import typical_distance
from robustav.training.guidance import (
    LATENT,
    NONE,
    Members,
    anyone,
    around,
    convexity,
    mates,
    member_weights,
    members_of,
    memberships_at,
    outsiders,
    pick,
    with_none,
)
from robustav.training.method import Batch, Method, Work
from robustav.training.mixing import (
    ANY,
    PLACES,
    Mixed,
    Parts,
    between,
    check_alpha,
    check_place,
    check_setting,
    draw_place,
    in_range,
    mixed_losses,
    parts_at,
    ratios,
)

MEMBERS = [f"guidance/{name}" for name in Members._fields]
WEIGHTS, OUTSIDE, CONVEXITY = "guidance/weights", "guidance/outside", "guidance/convexity"
KNOWN = "guidance/known_density"  # share of memberships; in the log
UNIT = "guidance/unit/{place}/{name}"
METRIC = "metric"
CHUNK = 64  # clips that a look at the training set passes at once
UNIT_CLIPS = 256  # on which typical distances are measured


class Drawn(NamedTuple):
    """Clips of a step: anchors first, then their partners; each is mixed with the other of its pair."""

    rows: Int[Tensor, " clip"]  # of the training set
    partner: Int[Tensor, " clip"]  # places in the batch
    alpha: Float[Tensor, " clip"]  # of the Beta distribution of the ratio
    uniform: Float[Tensor, "clip modality"]  # the numbers behind the ratios, one for each modality


@dataclass(frozen=True)
class GuidedMixup(Method):
    """Mix-up whose clips, partners and ratios follow from density and convexity of the latent; definition is our own.

    After the idea of Li et al. (2022, arXiv:2203.12122), whose formulas are not public. Once in `refresh_every` epochs,
    from epoch `start` on, the averaged model passes at most `measured` clips of the training set (0: all). Then, at each
    step:

    1. `anchor`: half the batch is drawn by class, `n^class_power (1 - convexity + class_floor)`, and in the class by
       `exp(-density / its interquartile range)`, so that clips between classes come first. "uniform": the loop's clips.
    2. `partner`: of the same class with probability `intra`; else one of the five nearest outside it. "random": the
       loop's clips. The other half of the batch are the partners, and each clip of a pair is mixed with the other, so
       no more clips are passed than in plain training.
    3. `ratio`: Beta(alpha, alpha) within a class, Beta(a, a) with `a = alpha_across * convexity` across: little is mixed
       where a class is not convex. "fixed": `a = alpha_across`. A label that both clips have stays whole, the others go
       by their shares, as in mixup.
    4. `place`: "input", "features", "latent", or "any" of them by chance. `per_modality`: ratios of their own, the first
       modality (by name) with `label_weight` of the label.
    5. `segment`: the worst of so many ratios, evenly spread over their distribution; 0 is off. Costs so many forward
       passes at the input; at the features too, which are counted as whole ones, though only the end is passed.
    6. `noise`: Gaussian, of about `noise` times the median distance between neighbours at that place; 0 is off.

    `random_pairs` is the control: anchors, partners and ratios are drawn as ever, then the pairs are replaced by the
    loop's clips. The same state of the generator gives the very same ratios as without it, since nothing that decides a
    ratio depends on the clips that are mixed in the end.

    A look costs a forward pass a measured clip, no backward; its passes of the head alone, and the neighbours, cost time
    that shows in wall time only. Density is relative density with `k` neighbours, convexity is "hardened" (noisy
    midpoints of `pairs` pairs a class that are accepted) or "soft". Before the first look every clip of a class is as
    likely as another, any clip is a partner across classes, and convexity counts as 1.
    """

    loads: ClassVar[bool] = False

    refresh_every: int = 5
    start: int = 1
    measured: int = 2000
    k: int = 10
    convexity: str = "hardened"
    pairs: int = 200
    anchor: str = METRIC
    class_power: float = 0.5
    class_floor: float = 0.1
    partner: str = METRIC
    intra: float = 0.5
    ratio: str = METRIC
    alpha: float = 1.0
    alpha_across: float = 0.4
    place: str = ANY
    per_modality: bool = False
    label_weight: float = 0.5
    segment: int = 0
    noise: float = 0.0
    random_pairs: bool = False

    def __post_init__(self) -> None:
        check_setting(self.place)
        check_alpha(self.alpha)
        check_alpha(self.alpha_across)
        for name, low in (("refresh_every", 1), ("start", 0), ("measured", 0), ("k", 1), ("pairs", 1), ("segment", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be at least {low}, got {getattr(self, name)}")
        for name in ("noise", "class_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name):g}")
        if not 0 < self.class_floor < math.inf:
            raise ValueError(
                f"`class_floor` must be above 0, or convex classes are never drawn, got {self.class_floor:g}"
            )
        for name in ("intra", "label_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name):g}")
        for name, known in (
            ("anchor", (METRIC, "uniform")),
            ("partner", (METRIC, "random")),
            ("ratio", (METRIC, "fixed")),
            ("convexity", ("hardened", "soft")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}")
        if self.segment == 1:
            raise ValueError("`segment` must be 0 (off) or at least 2 ratios to choose from, got 1")
        if self.per_modality and self.place in (ANY, LATENT):
            raise ValueError(
                f"`per_modality` needs a place where modalities are apart, got place={self.place!r}: set place='input' or "
                "'features'"
            )
        if self.label_weight != 0.5 and not self.per_modality:
            raise ValueError(f"`label_weight` {self.label_weight:g} goes with `per_modality`, which is off")
        if self.random_pairs and (self.anchor, self.partner) != (METRIC, METRIC):
            raise ValueError(
                "`random_pairs` replaces anchors and partners that were drawn by metric, got "
                f"anchor={self.anchor!r} and partner={self.partner!r}: leave both as they are"
            )

    @property
    def looks(self) -> bool:
        """Whether any part of it asks for the metrics."""
        return METRIC in (self.anchor, self.partner, self.ratio) or self.noise > 0

    def check_plan(self, epochs: int, balanced: bool) -> None:
        if self.looks and self.start >= epochs:
            raise ValueError(
                f"`start` must be below the number of epochs, {epochs}, or guided mix-up never looks at the latents that "
                f"guide it, got {self.start}: the first epoch is 0"
            )
        if balanced and self.anchor == METRIC and self.partner == METRIC and not self.random_pairs:
            raise ValueError(
                "`balanced` does nothing where guided mix-up draws its clips by metric: leave it out, or set "
                "anchor=uniform or partner=random"
            )

    def check(self, model: Classifier) -> None:
        check_place(model, self.place)
        if self.looks and isinstance(model, Wrapped) and model.head_name is None:
            raise ValueError(
                "guided mix-up measures latents, and this wrapped network's latent is not known: name its last module "
                "with Wrapped(..., latent=...)"
            )

    def begin(self, work: Work) -> None:
        members = members_of(with_none(work.data.targets))
        count = len(members.clips)
        self._keep(
            work,
            members,
            torch.full((count,), torch.nan),
            torch.full((count, 1), NONE),
            torch.ones(len(members.first) - 1),
        )

    def begin_epoch(self, work: Work) -> None:
        if self.looks and work.epoch >= self.start and (work.epoch - self.start) % self.refresh_every == 0:
            self._look(work)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        return mixed_losses(work, self.mixed(work, batch))

    def mixed(self, work: Work, batch: Batch) -> Mixed:
        """The points that a step learns from, made of as many clips as the batch has."""
        drawn, clips = self.clips(work, batch)
        return self.mix(work, drawn, clips, draw_place(work.model, self.place, work.generator))

    def clips(self, work: Work, batch: Batch) -> tuple[Drawn, Batch]:
        """The clips to mix, and how."""
        drawn = self.draw(work, batch.rows)
        return drawn, work.batch(drawn.rows)

    def draw(self, work: Work, rows: Int[Tensor, " clip"]) -> Drawn:
        """Whom to mix with whom, and how far; `rows` are the loop's clips. Always draws as many numbers."""
        own, clips = rows.cpu(), len(rows)
        pairs = clips // 2
        anchors = clips - pairs  # of an odd number the last anchor is its own partner
        uniform = torch.rand(anchors, 3, generator=work.generator)
        through = torch.rand(clips, len(work.model.specs), generator=work.generator)
        members = Members(*(work.memory[key].cpu() for key in MEMBERS))
        if self.anchor == METRIC:
            chosen = pick(work.memory[WEIGHTS].cpu(), uniform[:, 0])
        else:
            labels = with_none(work.data.targets[own[:anchors]])
            chosen = memberships_at(members, labels, own[:anchors], uniform[:, 0])
        inside = uniform[:, 1] < self.intra
        across = self.alpha_across * (
            work.memory[CONVEXITY].cpu()[members.classes[chosen]] if self.ratio == METRIC else torch.ones(anchors)
        )
        alpha = torch.where(inside, self.alpha, across)
        partners = self._partners(work, members, chosen, inside, uniform[:, 2], own)[:pairs]
        place = torch.arange(anchors)
        return Drawn(
            own if self.random_pairs else torch.cat([members.clips[chosen], partners]),
            torch.cat([torch.where(place < pairs, place + anchors, place), place[:pairs]]),
            torch.cat([alpha, alpha[:pairs]]),
            through if self.per_modality else through[:, :1].expand(through.shape),
        )

    def _partners(
        self, work: Work, members: Members, chosen: Tensor, inside: Tensor, uniform: Tensor, own: Tensor
    ) -> Int[Tensor, " anchor"]:
        if self.partner != METRIC:
            return own[len(chosen) :]
        near = outsiders(members, work.memory[OUTSIDE].cpu(), chosen, uniform)
        near = torch.where(near == NONE, anyone(len(work.data.targets), uniform), near)
        return torch.where(inside, mates(members, chosen, uniform), near)

    def mix(self, work: Work, drawn: Drawn, clips: Batch, place: str) -> Mixed:
        """Clips mixed at a place, by the worst ratio if so asked, and noise."""
        parts = parts_at(work, clips.inputs, place)
        ratio = ratios(drawn.alpha, drawn.uniform)
        if self.segment:
            ratio = self._worst(work, drawn, clips, place, parts)
        mixed = self._between(work, parts, clips.targets, drawn.partner, ratio, place)
        if not self.noise:
            return mixed
        noisy = {name: self._noisy(work, place, name, x) for name, x in mixed.parts.items()}
        return mixed._replace(parts=in_range(noisy, work.model.specs) if place == "input" else noisy)

    def _between(self, work: Work, parts: Parts, targets: Tensor, partner: Tensor, ratio: Tensor, place: str) -> Mixed:
        modalities = sorted(work.model.specs)
        mixed = {
            name: between(x, x[partner], ratio[:, modalities.index(name) if name in modalities else 0])
            for name, x in parts.items()
        }
        if place == "input":
            mixed = in_range(mixed, work.model.specs)
        share = ratio @ self._label_weights(len(modalities))
        return Mixed(place, mixed, between(targets, targets[partner], share))

    def _label_weights(self, modalities: int) -> Float[Tensor, " modality"]:
        """The first modality's part of the label, and what is left shared by the others."""
        if modalities == 1:
            return torch.ones(1)
        rest = (1 - self.label_weight) / (modalities - 1)
        return torch.tensor([self.label_weight] + [rest] * (modalities - 1))

    def _worst(self, work: Work, drawn: Drawn, clips: Batch, place: str, parts: Parts) -> Tensor:
        """Of ratios spread evenly over their distribution, the one whose mix has the largest loss, clip by clip."""
        candidates, losses = [], []
        with work.crafting(), torch.no_grad():
            for number in range(self.segment):
                candidates.append(ratios(drawn.alpha, (drawn.uniform + number / self.segment) % 1))
                mixed = self._between(work, parts, clips.targets, drawn.partner, candidates[-1], place)
                losses.append(mixed_losses(work, mixed))
                if place == "features":
                    work.cost.forwards += len(clips.rows)
        worst = torch.stack(losses).argmax(0).cpu()
        return torch.stack(candidates)[worst, torch.arange(len(worst))]

    def _noisy(self, work: Work, place: str, name: str, x: Tensor) -> Tensor:
        unit = work.memory.get(UNIT.format(place=place, name=name))
        drawn = torch.randn(x.shape, generator=work.generator)
        if unit is None:
            return x
        return x + (self.noise * float(unit) / math.sqrt(x[0].numel()) * drawn).to(x)

    def _look(self, work: Work) -> None:
        """Measure the training set on the averaged model, and keep what follows from it."""
        count = len(work.data.targets)
        rows = torch.randperm(count, generator=work.generator)[: self.measured or count].sort().values
        try:
            self._measure(work, rows, self._latents(work, rows))
        except ValueError as error:
            raise ValueError(
                f"guided mix-up could not measure the latents of {len(rows)} clips in epoch {work.epoch + 1}: {error}. "
                "If those clips are not copies of one another, the network tells them no more apart: lower `learning_rate`"
            ) from error

    def _measure(self, work: Work, rows: Int[Tensor, " measured"], latents: Float[Tensor, "measured dim"]) -> None:
        labels = with_none(work.data.targets)
        device = next(work.averaged.parameters()).device

        def finish(parts: Mapping[str, Tensor]) -> Tensor:
            return work.averaged.classify(parts[LATENT].to(device)).float().cpu()

        found = convexity(
            latents,
            labels[rows, :-1],
            finish,
            work.model.label_kind,
            kind=self.convexity,
            pairs=self.pairs,
            generator=work.generator,
        )
        lie = around(latents, rows, labels, self.k, work.generator)
        known = ~lie.density.isnan()
        if self.anchor == METRIC and not known.any():
            raise ValueError(
                f"no class has a density, which takes more than k = {self.k} clips of it and as many others: lower `k`, "
                "train on more clips, or set anchor=uniform"
            )
        work.memory[KNOWN] = known.float().mean()
        without_labels = found.mean().reshape(1)  # has no region of its own that could be convex
        self._keep(work, members_of(labels), lie.density, lie.outside, torch.cat([found, without_labels]))

    def _latents(self, work: Work, rows: Int[Tensor, " measured"]) -> Float[Tensor, "measured dim"]:
        """Of the averaged model; also measures the unit of noise, where there is noise."""
        model, device = work.averaged, next(work.averaged.parameters()).device
        seen: dict[str, list[Parts]] = {place: [] for place in PLACES}
        with torch.no_grad():
            for number, chunk in enumerate(rows.split(CHUNK)):
                inputs = {m: x.to(device) for m, x in work.data.inputs(chunk).items()}
                features = model.features(inputs)
                seen[LATENT].append({LATENT: model.fuse(features).float().cpu()})
                if self.noise and number * CHUNK < UNIT_CLIPS:
                    for place, parts in (("input", inputs), ("features", features)):
                        seen[place].append({name: x.float().cpu() for name, x in parts.items()})
        work.cost.forwards += len(rows)
        if self.noise:
            for place in PLACES if self.place == ANY else (self.place,):
                for name in seen[place][0]:
                    part = torch.cat([parts[name] for parts in seen[place]])
                    work.memory[UNIT.format(place=place, name=name)] = torch.tensor(typical_distance(part))
        return torch.cat([parts[LATENT] for parts in seen[LATENT]])

    def _keep(self, work: Work, members: Members, density: Tensor, outside: Tensor, convexity: Tensor) -> None:
        work.memory.update(zip(MEMBERS, members, strict=True))
        work.memory[OUTSIDE], work.memory[CONVEXITY] = outside, convexity
        work.memory[WEIGHTS] = member_weights(members, density, convexity, self.class_power, self.class_floor)


METHODS: dict[str, type[Method]] = {"guided-mixup": GuidedMixup}
