"""What a model gives away by itself: looked at on a few clips, before or beside any attack of a run."""

import torch
from torch import Tensor

from robustav.attacks.ascent import Pursuit
from robustav.classifier import Classifier, Inputs, Trace
from robustav.flags import scores, slopes
from robustav.flags.flag import Flag, raised
from robustav.goals import Goal, Stealth
from robustav.randomness import draws_for
from robustav.threat import ThreatModel

PASSES = 5  # clean passes that must agree


def probe(
    model: Classifier,
    inputs: Inputs,
    labels: Tensor,
    goal: Goal,
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int = 8,
) -> list[Flag]:
    """Every flag of the model itself, seen on a few clips (16 to 32 do) under the largest set that is attacked.

    `inputs` holds every modality that the model reads. A clip costs about 50 forward passes, a gradient counted as three;
    30 more where logits are very large, 30 where the attack without a budget fails; and eight of the clips 100 more.
    Gradients are those of `model.surrogate()`, which is what attacks see; verdicts are the model's. The model ends as it
    was, and so do torch's generators.
    """
    with scores.undisturbed(model, inputs, seed) as state:
        found = scores.in_train_mode(model)
        model.eval()
        with scores.autograd_calls() as calls:
            passes = [scores.scores(model, inputs, batch_size) for _ in range(PASSES)]
        found = found or scores.in_train_mode(model)
        model.eval()
        clean = passes[0]
        goal = goal.given(clean)
        random = scores.randomised(passes, labels, goal, declared=model.stochastic)
        found += scores.changed(model, state) + scores.dynamic(calls) + random
        found += scores.few_classes(goal, len(model.classes))
        draws = draws_for(seed, map(str, range(len(labels))), "probe")
        subject = Pursuit(model.surrogate(), inputs, labels, ThreatModel(threat.budgets, goal), draws)
        # A clip that is where the adversary wants it may have nothing left to climb.
        rows = (~goal.reached(clean, labels)).nonzero().flatten()
        rows = rows if len(rows) else torch.arange(len(labels), device=labels.device)
        there = Trace({}, clean.latent[rows], clean.logits[rows])
        found += _of_gradients(model, subject.at(rows), there, batch_size, deterministic=not random)
        return found


def _of_gradients(
    model: Classifier, subject: Pursuit, clean: Trace, batch_size: int, *, deterministic: bool
) -> list[Flag]:
    """The flags of the gradients, and PROBABILITIES, for which the inputs farthest from the clean ones are needed."""
    found: list[Flag] = []
    seen = [clean.logits, scores.scores(model, slopes.corners(subject), batch_size).logits]
    try:
        start = slopes.all_slopes(subject, batch_size)
        found += slopes.zero(start) + slopes.bad(start)
        usable = start.finite().nonzero().flatten()
        part, few = subject.at(usable), usable[: slopes.MOVED_CLIPS]
        # A model that draws its scores is unstable and answers each attack differently: that has been said already.
        if len(usable) and deterministic:
            found += slopes.unstable(subject.at(few), start.at(few))
            found += slopes.logit_scale(part, model, clean.logits, batch_size)
        if len(usable):
            flags, logits = slopes.without_budget(part, model, batch_size)
            # To hide and leave the rest alone asks for a small step: without a budget the loss may go elsewhere.
            found += [] if isinstance(part.threat.goal, Stealth) else flags
            seen.append(logits)
    except torch.cuda.OutOfMemoryError:
        raise
    except (FloatingPointError, RuntimeError) as error:  # whatever stands in autograd's way, in the user's code or ours
        found.append(raised("BAD-GRAD", f"A gradient could not be computed: {error}."))
    return found + scores.probabilities(torch.cat(seen), model.label_kind)
