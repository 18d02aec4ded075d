"""Fast adaptive boundary attack: projections on the decision boundary as it would be if the model were linear."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustav.attacks.ascent import Pursuit, climb, look
from robustav.attacks.minimum import Crossing, MinimumNorm, Nearest, gain, shortest, within
from robustav.attacks.pgd import check_steps
from robustav.classifier import Inputs
from robustav.norms import per_sample

LONGEST = 3.0  # times the projection; overshooting grows no further


@dataclass(frozen=True)
class FAB(MinimumNorm):
    """FAB: project the iterate and the clean input on the linearised boundary, and go between the two [Croce and Hein,
    2020, arXiv:1907.02044, algorithm 1].

    One run of `steps` for each of the `aims` classes that stand nearest to crossing on the clean input, as in the
    targeted form of AutoAttack [arXiv:2003.01690], however many classes there are; with `aims` None one run towards
    whichever is nearest to crossing at each iterate. A run costs `steps` gradients and twice as many forward passes. The
    projections are exact in the gauge: all modalities and the valid range at once. There are no random restarts.
    """

    steps: int = 100
    aims: int | None = 9
    largest_pull: float = 0.1  # alpha_max: weight of the clean input's projection
    overshoot: float = 1.05  # eta
    backward: float = 0.9  # beta: what is kept of a perturbation that succeeds
    stop: bool = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.aims is not None and self.aims < 1:
            raise ValueError(f"`aims` must be at least 1, or None to follow the nearest class, got {self.aims}")
        if not 0 <= self.largest_pull <= 1:
            raise ValueError(f"`largest_pull` must lie in [0, 1], got {self.largest_pull}")
        if not self.overshoot >= 1:
            raise ValueError(f"`overshoot` must be at least 1, got {self.overshoot}")
        if not 0 < self.backward < 1:
            raise ValueError(f"`backward` must lie between 0 and 1, got {self.backward}")

    def pursue(self, chase: Pursuit, towards: Crossing, enough: float) -> Nearest:
        nearest = Nearest.none(chase.inputs)
        if self.aims is None:
            return self._run(chase, chase, nearest, enough)
        with torch.no_grad():
            ways = towards.ways(chase.model(chase.inputs), towards.labels)

        def aimed(logits: Tensor, labels: Tensor, aim: Tensor) -> Tensor:
            way = towards.ways(logits, labels).gather(1, aim[:, None]).squeeze(1)
            return torch.where(way.isinf(), towards.margin(logits, labels), way)

        for aim in ways.topk(min(self.aims, ways.shape[1]), dim=1).indices.unbind(1):
            nearest = self._run(chase, chase._replace(threat=chase.threat.steered(aimed, aim)), nearest, enough)
        return nearest

    def _run(self, chase: Pursuit, aimed: Pursuit, nearest: Nearest, enough: float) -> Nearest:
        """One run along the margin of `aimed`, scored by that of `chase`."""
        x, rows = chase.inputs, torch.arange(len(nearest.gauge), device=nearest.gauge.device)
        eta = torch.full_like(nearest.gauge, self.overshoot)
        for _ in range(self.steps):
            going = (nearest.gauge[rows] > enough).nonzero().flatten()
            if len(going) < len(rows):
                chase, aimed, rows, eta = chase.at(going), aimed.at(going), rows[going], eta[going]
                x = {m: values[going] for m, values in x.items()}
            if not len(rows):
                break
            here, slopes = climb(aimed.model, x, aimed.labels, aimed.threat)
            x = self._step(chase, x, here.loss.double(), slopes, eta)
            there = look(chase.model, x, chase.labels, chase.threat)
            nearest = nearest.or_nearer(rows, there, chase.threat.gauge(chase.inputs, x))
            # Where several margins must rise together, the lowest takes turns, and steps that barely cross one never cross
            # all: each failure in a row doubles what is overshot.
            eta = torch.where(there.reached, self.overshoot, (2 * eta - 1).clamp(max=LONGEST))
            kept = torch.where(there.reached, self.backward, 1.0)
            x = within(chase, {m: c + (x[m] - c) * per_sample(kept, c) for m, c in chase.inputs.items()})
        return nearest

    def _step(self, chase: Pursuit, x: Inputs, margin: Tensor, slopes: Inputs, eta: Tensor) -> Inputs:
        """Between the projections of the iterate and of the clean input on the boundary, both overshot."""
        delta = {m: x[m].double() - chase.inputs[m].double() for m in slopes}
        from_x, distance = shortest(chase, x, slopes, -margin)
        from_clean, clean_distance = shortest(chase, chase.inputs, slopes, gain(slopes, delta) - margin)
        pull = (distance / (distance + clean_distance)).nan_to_num(0.0).clamp(max=self.largest_pull)
        moved = {}
        for m, before in delta.items():
            weight, stretch = per_sample(pull, before), per_sample(eta, before)
            # As a change of the clean input, so that what may not be written to stays what it was, bit for bit.
            change = (1 - weight) * (before + stretch * from_x[m]) + weight * stretch * from_clean[m]
            moved[m] = (chase.inputs[m] + change).to(x[m])
        return within(chase, moved)
