"""What is written down while a training runs: a line an epoch, and curves for TensorBoard where that is installed."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

Scalars = Callable[[Mapping[str, float]], None]  # told the line of an epoch


def log_lines(history: Sequence[Mapping[str, float]]) -> bytes:
    """A CSV, a line an epoch; a column for everything that any epoch knew."""
    text = io.StringIO()
    columns = dict.fromkeys(name for line in history for name in line)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def no_scalars(line: Mapping[str, float]) -> None:
    """Nobody watches."""


def tensorboard_scalars(folder: Path, step: int) -> Scalars:
    """Writes each epoch's line for `tensorboard --logdir`, from `step` on; raises `ValueError` without the package."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "TensorBoard's curves need the package tensorboard: pip install tensorboard, or leave them out"
        )
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(line: Mapping[str, float]) -> None:
        for name in line.keys() - {"epoch", "step"}:
            writer.add_scalar(name, line[name], int(line["step"]))
        writer.flush()

    return write
