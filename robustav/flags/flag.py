"""A flag, and the table of all flags. A new flag is a new row of `FLAGS` and the function that raises it."""

from typing import NamedTuple


class Flag(NamedTuple):
    """A reason to doubt a robust score, in words that stand alone; flags never change a score."""

    name: str  # a key of `FLAGS`
    sentence: str  # what was seen, where, with figures
    advice: str  # what to try
    condition: str = ""  # key of the condition concerned, "" for the whole run


class Meaning(NamedTuple):
    """What a flag stands for, who proposed to look for it, and what to do about it."""

    means: str
    source: str
    advice: str


AUTO = "Croce and Hein, 2020, arXiv:2003.01690"
CHECKLIST = "Carlini et al., 2019, arXiv:1902.06705"
INDICATORS = "Pintor et al., 2022, arXiv:2106.09947"
OBFUSCATED = "Athalye et al., 2018, arXiv:1802.00420"

FLAGS: dict[str, Meaning] = {
    "MODE": Meaning(
        "A part of the model is in train mode, or its parameters or buffers change while it scores.",
        CHECKLIST,
        "Call `eval()` on the whole model, and keep every forward pass from writing into parameters and buffers.",
    ),
    "RANDOMISED": Meaning(
        "The same clips score differently from one pass to the next.",
        AUTO,
        "Declare `stochastic = True` if the defence is random by design; otherwise find what is drawn in `forward`.",
    ),
    "DYNAMIC": Meaning(
        "The model computes gradients of its own while it scores, as defences do that optimise at test time.",
        AUTO,
        "Attack through the inner optimisation (unroll it, or give a `surrogate` with the same number of steps), and "
        "trust attacks that need no gradient more.",
    ),
    "PROBABILITIES": Meaning(
        "The model returns probabilities where logits are expected, so thresholds are wrong and gradients may vanish.",
        AUTO,
        "Return the scores before sigmoid or softmax.",
    ),
    "ZERO-GRAD": Meaning(
        "The gradient by an attacked modality is exactly zero, so that attacks which follow it are blind.",
        f"{OBFUSCATED}; {AUTO}",
        "Look for rounding, clamping or `detach` on that modality's way; give a differentiable stand-in by `surrogate` "
        "(BPDA), and add an attack that needs no gradient.",
    ),
    "BAD-GRAD": Meaning(
        "The gradient is not a number, infinite, or cannot be computed at all.",
        OBFUSCATED,
        "Look for a logarithm or square root of zero, a division by a norm, or a step outside torch in the front end.",
    ),
    "UNSTABLE": Meaning(
        "The loss jumps under moves far smaller than the budget, so a gradient says nothing of the next step.",
        INDICATORS,
        "Average the gradient over random moves (EOT), attack through a smooth `surrogate`, or use attacks that need no "
        "gradient.",
    ),
    "UNBOUNDED-FAILS": Meaning(
        "A gradient attack that may use the whole valid range does not reach the goal, though it can be reached.",
        f"{CHECKLIST}; {INDICATORS}",
        "The gradients lead nowhere: treat every gradient attack on this model as failed, and attack without gradients "
        "or through a `surrogate`.",
    ),
    "LOGIT-SCALE": Meaning(
        "The same attack does better once the logits are brought to a usual size: their scale hides the gradient.",
        AUTO,
        "Attack with a loss that ignores scale (DLR or a margin), or divide the logits by a temperature.",
    ),
    "FEW-CLASSES": Meaning(
        "A margin loss compares more classes than the model has to offer.",
        AUTO,
        "Use BCE or cross-entropy; DLR needs at least four classes.",
    ),
    "TOO-MANY-TARGETS": Meaning(
        "An attack was told to aim at more classes than there are wrong ones.",
        AUTO,
        "Set its targets to at most the number of classes less one.",
    ),
    "NOT-CONVERGED": Meaning(
        "Clips that stand were still being won when the attack stopped: its loss was rising to the last.",
        INDICATORS,
        "Give the attack more steps, or steps that shrink (APGD).",
    ),
    "SILENT-SUCCESS": Meaning(
        "An attack passed through a point that reaches the goal and returned another that does not.",
        INDICATORS,
        "Have the attack return its best point; if it does, the model scores one input in two ways.",
    ),
    "BLACK-BOX-WINS": Meaning(
        "An attack without gradients fools clips that every gradient attack of the same threat left standing.",
        f"{AUTO}; {OBFUSCATED}",
        "The gradients are masked: find where, give a `surrogate`, and do not quote the gradient attacks alone.",
    ),
    "TRANSFER-GAP": Meaning(
        "Examples that fool the model they were made on do not fool this one, on clips where little else was found.",
        INDICATORS,
        "Make them on a model more like this one (same data, same inputs), or on several at once.",
    ),
    "NOISE-WINS": Meaning(
        "Random noise of the same size succeeds more often than an attack.",
        CHECKLIST,
        "The attack is broken or the gradient is masked: check its step size, then the gradient.",
    ),
    "NOT-MONOTONE": Meaning(
        "A larger budget leaves more clips standing than a smaller one that it contains.",
        CHECKLIST,
        "The attack oversteps: use more and smaller steps, and read the worst case instead of this row.",
    ),
    "BUDGET": Meaning(
        "A returned example lies outside the budget, the valid range or the modalities that the threat allows.",
        AUTO,
        "The row is not valid: the attack must project what it returns.",
    ),
    "RESCORE": Meaning(
        "Scoring the same example again gave other scores.",
        CHECKLIST,
        "The row is not valid: make the model deterministic and independent of batch mates, or declare it stochastic.",
    ),
}


def raised(name: str, sentence: str, condition: str = "", *, advice: str = "") -> Flag:
    """A flag of the table, with the table's advice unless there is a better one."""
    return Flag(name, sentence, advice or FLAGS[name].advice, condition)


def percent(share: float) -> str:
    """A share as a sentence gives it: `12.5 %`."""
    return f"{100 * share:.3g} %"


def clips(count: int, total: int) -> str:
    """A count as a sentence gives it: `3 of 24 clips (12.5 %)`."""
    return f"{count} of {total} clips ({percent(count / total)})"
