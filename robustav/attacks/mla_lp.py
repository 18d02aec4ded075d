"""The multi-label attack that solves for its perturbation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linprog
from torch import Tensor

from robustav.attacks.ascent import Point, Pursuit, put
from robustav.attacks.flips import Flips, Way, check_goal, flips
from robustav.attacks.pgd import check_steps
from robustav.classifier import Classifier, Inputs, Trace
from robustav.norms import Draws, per_sample
from robustav.threat import ThreatModel

Vector = Float[np.ndarray, " row"]
GAP = 1e-4  # of the largest gain in sight: how far from its optimum a linear problem may be left
SHARES = (1.0, 0.5, 0.25)  # of the way to the solution that are tried before the next linearisation


class Lines(NamedTuple):
    """The scores that decide, to first order around some inputs."""

    inputs: Inputs
    scores: list[np.ndarray]  # of all classes, clip by clip
    flips: list[Flips]
    slopes: Inputs  # modality -> [batch, chosen, *shape]


@dataclass(frozen=True)
class MLALP:
    """Linearise the scores that decide, solve for the perturbation that flips them with the most to spare, repeat
    [after Zhou et al., IJCNN 2020, Generating Multi-label Adversarial Examples by Linear Programming].

    The paper asks for the smallest perturbation that flips; this asks what the threat's balls and boxes of all attacked
    modalities together allow, and solves it exactly, in any norm. Where one of many classes would do (a lost top-1 hit,
    another label set), the `rivals` that are nearest are solved for one by one. A step costs a backward pass for each
    score that decides, at most `rows` of them: more labels in a clip raise `ValueError`. `cuts` bounds the linear
    programmes a problem may take, each of a few rows; two to twenty are usual. The best point met is returned, the clean
    one included. Best where few scores decide; it knows the goals of `robustav.attacks.flips.FLIPS`.
    """

    steps: int = 10
    rivals: int = 3
    rows: int = 32
    cuts: int = 60
    stop: bool = False

    survivors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps(self.steps)
        for name in ("rivals", "rows", "cuts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")

    def check(self, model: Classifier, threat: ThreatModel) -> None:
        """Raise `ValueError` for a goal that is no set of linear inequalities."""
        check_goal(threat.goal)

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        whole, found = Pursuit(model, inputs, labels, threat, draws), inputs
        for count, group in self._groups(whole).items():
            found = put(found, group, self._pursue(whole.at(group), self.steps if count else 0))
        return found

    def _groups(self, pursuit: Pursuit) -> dict[int, Tensor]:
        """The clips by how many scores decide, so that no clip pays for the backward passes of its batch mates."""
        like = next(iter(pursuit.inputs.values()))
        anywhere = like.new_zeros(
            len(like), len(pursuit.model.classes)
        )  # how many they are does not hang on the scores
        counts = [len(one.classes) for one in self._flips(pursuit, anywhere)]
        groups = {n: [i for i, count in enumerate(counts) if count == n] for n in sorted(set(counts))}
        return {n: torch.tensor(rows, device=like.device) for n, rows in groups.items()}

    def _pursue(self, pursuit: Pursuit, steps: int) -> Inputs:
        found, rows = pursuit.inputs, torch.arange(len(pursuit.labels), device=pursuit.labels.device)
        x = best = self._look(pursuit, pursuit.inputs)
        reach = torch.ones_like(best.loss)
        for _ in range(steps):
            if self.stop and best.reached.any():
                found, going = put(found, rows, best.inputs), (~best.reached).nonzero().flatten()
                rows, pursuit, reach = rows[going], pursuit.at(going), reach[going]
                x, best = _at(x, going), _at(best, going)
            if not len(rows):
                return found
            solution = self._solve(pursuit, self._linearise(pursuit, x.inputs))
            tried = [self._look(pursuit, _between(pursuit, x.inputs, solution, reach * share)) for share in SHARES]
            for point in tried:
                best = best.or_better(point)
            slack = torch.stack([point.loss for point in tried])
            improved, taken = slack.amax(0) > x.loss, torch.tensor(SHARES).to(reach)[slack.argmax(0)]
            for point in tried:
                x = _higher(x, point)
            reach = reach * torch.where(improved, 2 * taken, SHARES[-1] / 2)
            reach = reach.clamp(max=1)
        return put(found, rows, best.inputs)

    def _flips(self, pursuit: Pursuit, logits: Tensor) -> list[Flips]:
        return flips(pursuit.threat.goal, logits, pursuit.labels, self.rivals, self.rows)

    def _look(self, pursuit: Pursuit, inputs: Inputs) -> Point:
        """The point with its slack for a loss."""
        with torch.no_grad():
            trace = pursuit.model.trace(inputs)
            return _noted(pursuit, inputs, trace, self._flips(pursuit, trace.logits))

    def _linearise(self, pursuit: Pursuit, inputs: Inputs) -> Lines:
        """One forward pass, and a backward pass for each score that decides."""
        leaves = {m: inputs[m].detach().requires_grad_() for m in pursuit.threat.budgets}
        with torch.enable_grad():
            trace = pursuit.model.trace({**inputs, **leaves})
            found = self._flips(pursuit, trace.logits)
            chosen = torch.tensor([one.classes for one in found], device=trace.logits.device)
            scores = trace.logits.gather(1, chosen).sum(0)
        _noted(pursuit, inputs, trace, found)
        slopes = {m: x.new_zeros(len(x), len(scores), *x.shape[1:]) for m, x in leaves.items()}
        for row, score in enumerate(scores if scores.requires_grad else ()):
            wanted = torch.autograd.grad(
                score, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for m, gradient in zip(leaves, wanted, strict=True):
                slopes[m][:, row] = gradient
        for m, slope in slopes.items():
            if (bad := ~slope.flatten(1).sum(1).isfinite()).any():
                raise FloatingPointError(
                    f"the gradient by {m!r} is not finite for {int(bad.sum())} samples of the batch: look for a "
                    "logarithm or square root of zero in the front end"
                )
        return Lines(inputs, _numbers(trace.logits), found, slopes)

    def _solve(self, pursuit: Pursuit, lines: Lines) -> Inputs:
        """Clip by clip, the perturbed inputs that give the linearised goal its largest slack."""
        rows = torch.arange(len(lines.flips), device=pursuit.labels.device)
        solved = [self._solve_one(pursuit.at(row), lines, int(row)) for row in rows.split(1)]
        return {m: torch.cat([one[m] for one in solved]) for m in solved[0]}

    def _solve_one(self, one: Pursuit, lines: Lines, row: int) -> Inputs:
        slopes = {m: lines.slopes[m][row].double().flatten(1) for m in one.threat.budgets}
        moved = {m: (lines.inputs[m][row].double() - one.inputs[m][0].double()).flatten() for m in slopes}
        flip = lines.flips[row]
        # What the scores would be at the clean input if they were linear.
        level = lines.scores[row][flip.classes] - sum((slopes[m] @ moved[m]).cpu().numpy() for m in slopes)
        best, floor = dict.fromkeys(slopes, torch.zeros(())), -np.inf
        for way in flip.ways:
            found = most_slack(way.weights @ level + way.offset, _oracle(one, slopes, way), self.cuts, floor)
            if found is not None:
                floor, best = found
        return {m: (x.double() + best[m].to(x.device)).to(x) for m, x in one.inputs.items() if m in slopes}


def _oracle(one: Pursuit, slopes: Inputs, way: Way) -> Callable[[Vector], tuple[Inputs, Vector]]:
    """From weights of a way's rows to the perturbation of one clip that raises their sum most, and what each row gains."""

    def furthest(weights: Vector) -> tuple[Inputs, Vector]:
        vertex, gain = {}, np.zeros(len(weights))
        for m, budget in one.threat.budgets.items():
            clean = one.inputs[m]
            towards = torch.as_tensor(weights @ way.weights).to(slopes[m]) @ slopes[m]
            towards = towards.reshape(clean.shape)
            if budget.writable is not None:
                towards = torch.where(budget.writable, towards, 0)
            vertex[m] = budget.rules.furthest(towards, budget.radius(clean), clean - budget.low, budget.high - clean)
            vertex[m] = vertex[m].double()
            gain += way.weights @ (slopes[m] @ vertex[m].flatten()).cpu().numpy()
        return vertex, gain

    return furthest


def most_slack(
    level: Vector, oracle: Callable[[Vector], tuple[Inputs, Vector]], cuts: int, floor: float = -np.inf
) -> tuple[float, Inputs] | None:
    """The perturbation with the largest `min(level + gain)` that mixtures of the oracle's vertices reach; None where it
    is found not to exceed `floor`.

    By column generation: the best mixture of the vertices so far is a linear programme with few rows, whose multipliers
    ask the oracle for the next vertex. That vertex also bounds from above what any perturbation could reach, so the
    answer is within `GAP` of the optimum, unless `cuts` ran out.
    """
    weights, value = np.full(len(level), 1 / len(level)), -np.inf
    vertices: list[Inputs] = []
    gains: list[Vector] = []
    mixture = np.ones(1)
    for _ in range(cuts):
        vertex, gain = oracle(weights)
        bound = weights @ (level + gain)
        size = max(np.abs(one).max() for one in [*gains, gain])
        if bound <= floor:
            return None
        if bound - value <= GAP * size:
            break
        vertices.append(vertex)
        gains.append(gain)
        value, mixture, weights = _best_mixture(level[:, None] + np.stack(gains, 1), size)
    if value <= floor:
        return None
    parts = list(zip(mixture.tolist(), vertices, strict=True))
    return value, {m: torch.stack([share * vertex[m] for share, vertex in parts]).sum(0) for m in vertices[0]}


def _best_mixture(slack: Float[np.ndarray, "row vertex"], size: float) -> tuple[float, np.ndarray, Vector]:
    """The largest least row of a mixture of columns, the mixture, and the multipliers of the rows."""
    rows, columns = slack.shape
    if columns == 1:
        return float(slack.min()), np.ones(1), np.eye(rows)[slack[:, 0].argmin()]
    # In units of what there is to gain: a solver's tolerance is absolute, and the slacks may be far from 0.
    table = (slack - slack.min()) / max(size, np.finfo(float).tiny)
    solved = linprog(
        np.append(np.zeros(columns), -1.0),
        A_ub=np.hstack([-table, np.ones((rows, 1))]),
        b_ub=np.zeros(rows),
        A_eq=np.append(np.ones(columns), 0.0)[None],
        b_eq=np.ones(1),
        method="highs",
    )
    assert solved.success, solved.message
    mixture, weights = solved.x[:-1].clip(min=0), (-solved.ineqlin.marginals).clip(min=0)
    mixture = mixture / mixture.sum()
    return float((slack @ mixture).min()), mixture, weights / weights.sum()


def _noted(pursuit: Pursuit, inputs: Inputs, trace: Trace, found: list[Flips]) -> Point:
    with torch.no_grad():
        slack = [one.slack(scores) for one, scores in zip(found, _numbers(trace.logits), strict=True)]
        loss = torch.tensor(slack).to(trace.logits)
        reached = pursuit.threat.goal.reached(trace, pursuit.labels)
        pursuit.model.note(loss, reached)
        return Point(inputs, loss, reached)


def _numbers(logits: Tensor) -> list[np.ndarray]:
    return list(logits.detach().double().cpu().numpy())


def _at(point: Point, rows: Tensor) -> Point:
    return Point({m: x[rows] for m, x in point.inputs.items()}, point.loss[rows], point.reached[rows])


def _higher(point: Point, other: Point) -> Point:
    """Sample by sample, the point with the larger slack."""
    blind = [Point(one.inputs, one.loss, torch.zeros_like(one.reached)) for one in (point, other)]
    return blind[0].or_better(blind[1])


def _between(pursuit: Pursuit, x: Inputs, solution: Inputs, share: Tensor) -> Inputs:
    """Some of the way from `x` to the solution: inside wherever both are, but for rounding."""
    moved = {m: x[m] + per_sample(share, x[m]) * (end - x[m]) for m, end in solution.items()}
    return pursuit.threat.project(pursuit.inputs, {**x, **moved})
