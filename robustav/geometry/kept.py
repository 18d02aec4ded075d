"""The adversarial examples that a run kept, as clips like any others."""

from collections.abc import Sequence

from robustav import keep
from robustav.classifier import LabelKind
from robustav.data.samples import Sample, Samples
from robustav.geometry.targets import size_of_budgets
from robustav.ledger import Ledger, digest_of
from robustav.plan import CLEAN, is_attack


class KeptSamples:
    """The examples of one condition of a run: the strongest that kept any, with the labels of the clips they came from.

    Strongest: the most modalities, then the largest budget, then the last attack. Raises `ValueError` if the run kept
    none, or is about other data.
    """

    def __init__(self, ledger: Ledger, clean: Samples) -> None:
        identity = ledger.record()["identity"]
        if identity["data"] != clean.digest:
            raise ValueError(f"{ledger.folder} attacked other data than {clean.name}: survey the run's own with --data")
        rows = ledger.read(CLEAN.key)
        usable = list(rows.loc[rows["skipped"].isna(), "sample"])
        attacks = {key: d for key, d in identity["conditions"].items() if is_attack(d)}
        kept = {key: [name for name in usable if keep.has(ledger.folder, key, name)] for key in attacks}
        ranked = [key for key in attacks if kept[key]]
        if not ranked:
            raise ValueError(
                f"{ledger.folder} kept no adversarial examples: run the same attack again with --keep {len(usable)}"
            )
        self.condition = max(
            ranked,
            key=lambda key: (
                len(attacks[key]["attacked"]),
                size_of_budgets(attacks[key]),
                list(attacks).index(key),
            ),
        )
        self.ledger, self.clean = ledger, clean
        self.name = f"{self.condition} of {ledger.folder.name}"
        self.classes: tuple[str, ...] = clean.classes
        self.label_kind: LabelKind = clean.label_kind
        self.ids: Sequence[str] = kept[self.condition]
        self.digest = digest_of([identity, self.condition, list(self.ids)])
        self.places = {name: i for i, name in enumerate(clean.ids)}

    def load(self, index: int) -> Sample:
        """The example at `index`, bit for bit as it was scored."""
        name = self.ids[index]
        inputs = keep.load(keep.folder_of(self.ledger.folder, self.condition, name))
        return Sample(name, inputs, self.clean.load(self.places[name]).labels)
