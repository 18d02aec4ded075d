"""What an evaluation reads from: labelled clips by index, and the exception for a clip that cannot be used."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from robustav.classifier import LabelKind

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


class Sample(NamedTuple):
    """One clip, in raw units and without a batch axis.

    `labels` is a float tensor `[class]` of zeros and ones (multilabel), a scalar class index (multiclass), or None
    where nobody labelled the clip. `signal` names, for a modality that had to be padded, the part that is not padding:
    a boolean tensor that broadcasts against the input. A modality it does not name is signal throughout.
    """

    id: str
    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    signal: Mapping[str, Tensor] = {}


class SkippedError(Exception):
    """A clip that cannot be used; the message is the reason, in words for the table of skipped clips."""


@runtime_checkable  # so that the checker of annotations, which runs in the tests, can ask isinstance
class Samples(Protocol):
    """A set of clips with declared classes and a declared label kind; `digest` identifies its content."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def label_kind(self) -> LabelKind: ...

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def digest(self) -> str: ...

    def load(self, index: int) -> Sample:
        """The clip at `index` of `ids`; raises `SkippedError` with the reason if it cannot be used."""
        ...
