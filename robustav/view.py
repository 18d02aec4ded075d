"""What an attack sees of a model: the attacked modalities alone, the rest held; and a tally of what it does."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustav.classifier import Classifier

LATE = 10  # looks: how much of an attack's end must have stopped gaining [Pintor et al., 2022, arXiv:2106.09947]


@dataclass
class Tally:
    """What an attack spent on each clip of a batch, and what it saw on the way, [batch] each."""

    size: int
    modalities: Sequence[str]
    device: torch.device | str = "cpu"  # where the model runs, so that counting waits for nothing
    forwards: Tensor = field(init=False)
    backwards: Tensor = field(init=False)
    asked: dict[str, Tensor] = field(init=False)  # forward passes after which a gradient was wanted
    came: dict[str, Tensor] = field(init=False)  # gradients that were not zero
    ever_reached: Tensor = field(init=False)  # 1 where some point on the way reached the goal
    looks: Tensor = field(init=False)  # how often the clip was looked at
    best: Tensor = field(init=False)  # largest loss so far after each of the last looks, [batch, LATE + 1], in turn
    worst: Tensor = field(init=False)  # smallest loss ever looked at

    def __post_init__(self) -> None:
        none = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        self.forwards, self.backwards, self.ever_reached = none.clone(), none.clone(), none.clone()
        self.looks = none.clone()
        self.best = torch.full((self.size, LATE + 1), -torch.inf, dtype=torch.float64, device=self.device)
        self.worst = torch.full((self.size,), torch.inf, dtype=torch.float64, device=self.device)
        self.asked = {m: none.clone() for m in self.modalities}
        self.came = {m: none.clone() for m in self.modalities}

    def zero_by_modality(self) -> dict[str, Tensor]:
        """Share of wanted gradients that were exactly zero, or never came."""
        return {m: (1 - self.came[m] / asked.clamp(min=1)) * (asked > 0) for m, asked in self.asked.items()}

    def zero_gradients(self) -> Tensor:
        """The same of the worst attacked modality."""
        return torch.stack(list(self.zero_by_modality().values())).amax(0)

    def hear(self, rows: Tensor, loss: Tensor, reached: Tensor) -> None:
        """One look at the clips `rows`, each named once: the loss and the verdict."""
        loss, now = loss.double(), self.looks[rows]
        before = self.best[rows, now % (LATE + 1)]
        self.best[rows, (now + 1) % (LATE + 1)] = before.maximum(loss)
        self.worst[rows] = self.worst[rows].minimum(loss)
        self.looks[rows] = now + 1
        self.ever_reached[rows] = self.ever_reached[rows].maximum(reached.long())

    def highest(self, ago: int = 0) -> Tensor:
        """The largest loss of each clip, up to so many looks ago (at most `LATE`); minus infinity where there was none."""
        clips = torch.arange(self.size, device=self.device)
        return self.best[clips, (self.looks - ago) % (LATE + 1)]

    def late_gain(self) -> Tensor:
        """Share of the whole gain in loss that came in a clip's last `LATE` looks; nan after fewer than twice as many."""
        last, before = self.highest(), self.highest(LATE)
        return ((last - before) / (last - self.worst).clamp(min=1e-12)).where(self.looks >= 2 * LATE, torch.nan)


class AttackView(Classifier):
    """A classifier of the attacked modalities alone; the others' features were encoded once and are held.

    Of a stochastic model the others are held as they are read, and encoded at every pass.

    Whatever passes through it is entered into `tally`. `rows` are the places of these clips in the batch of the tally.
    """

    def __init__(
        self,
        model: Classifier,
        attacked: Sequence[str],
        held: dict[str, Tensor],
        tally: Tally,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.held, self.tally = model, held, tally
        self.rows = torch.arange(tally.size, device=tally.device) if rows is None else rows
        self.specs = {m: model.specs[m] for m in attacked}
        self.classes, self.label_kind, self.stochastic = model.classes, model.label_kind, model.stochastic

    def at(self, rows: Tensor) -> "AttackView":
        held = {m: x[rows] for m, x in self.held.items()}
        return AttackView(self.model, tuple(self.specs), held, self.tally, self.rows[rows])

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        if raw.requires_grad:
            self._enter(self.tally.asked[modality])
            seen = torch.zeros_like(self.rows)  # a pass that is gone back through more than once counts once
            raw.register_hook(lambda gradient: self._note_gradient(modality, gradient, seen))
        return self.model.front_end(modality, raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.model.encode(modality, x)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        self._enter(self.tally.forwards)
        # Copies, since a model may write into what it is given to fuse.
        held = {m: x.clone() for m, x in self.held.items()}
        others = self.model.features(held) if self.stochastic else held
        latent = self.model.fuse({**others, **features})
        if latent.requires_grad:  # every goal's gradient comes through here, also that of the latent itself
            latent.register_hook(lambda _: self._enter(self.tally.backwards))
        return latent

    def classify(self, latent: Tensor) -> Tensor:
        return self.model.classify(latent)

    def note(self, loss: Tensor, reached: Tensor) -> None:
        self.tally.hear(self.rows, loss, reached)

    def _enter(self, count: Tensor) -> None:
        count.index_add_(0, self.rows, torch.ones_like(self.rows))

    def _note_gradient(self, modality: str, gradient: Tensor, seen: Tensor) -> None:
        moved = (gradient.flatten(1).abs().amax(1) > 0).long()
        self.tally.came[modality].index_add_(0, self.rows, moved * (1 - seen))
        seen.clamp_(min=moved)
