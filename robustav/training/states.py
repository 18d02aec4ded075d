"""What a killed training goes on from: a file for each process and epoch, of which the last that all have is good."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustav.ledger import write_atomically

FILES = "state-*.pt"


@dataclass(frozen=True)
class States:
    """The states of one process among `processes`, numbered by the epochs that are finished."""

    folder: Path
    process: int
    processes: int

    def save(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Tensors, numbers and texts."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        write_atomically(self._path(epoch, self.process), content.getvalue())

    def last(self, epochs: int) -> dict[str, Any] | None:
        """This process's state after the last epoch that all processes have finished, of so many."""
        for epoch in range(epochs, 0, -1):
            if all(self._path(epoch, process).exists() for process in range(self.processes)):
                found: dict[str, Any] = torch.load(self._path(epoch, self.process), weights_only=True)
                return found
        return None

    def forget(self, before: int) -> None:
        """Remove this process's states of earlier epochs."""
        for epoch in range(before):
            self._path(epoch, self.process).unlink(missing_ok=True)

    def _path(self, epoch: int, process: int) -> Path:
        return self.folder / FILES.replace("*", f"{epoch:05d}-{process}")


def forget_all(folder: Path) -> None:
    """Remove what any process left there."""
    for left in folder.glob(FILES):
        left.unlink(missing_ok=True)
