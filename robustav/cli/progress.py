"""Progress bars with an estimate, on standard error, where only a terminal sees them."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars:
    """A context in which data generation and attacks each draw a bar; gone when it ends."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def generation(self, description: str, done: int, total: int) -> None:
        """Show `done` of `total` under a bar of its own."""
        self._show(description, description, done, total)

    def attacks(self, what: str, done: int, total: int) -> None:
        """Show clips x conditions, and the condition in progress, in one bar."""
        self._show("attacks", what, done, total)

    def _show(self, name: str, description: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(description, total=total)
        self.bars.update(self.tasks[name], completed=done, total=total, description=description)
