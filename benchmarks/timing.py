"""What things cost beside one another: interleaved rounds, ratios within a round, and the page they are kept on."""

import gc
import platform
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HEADER = """# Benchmarks

Each section is written by the script that it names and replaced when that script runs again with `--write`.
All times are ratios of two things measured in one process, in rounds that run every contestant once in shuffled order;
a cell holds the median over the rounds and, in brackets, the quartiles.
"""


class Spread(NamedTuple):
    """Median and quartiles over rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def clock(device: torch.device) -> float:
    """Seconds: of this process's CPU, all threads together; of the wall for work that a GPU does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """Contestant -> seconds in each round; the order within a round is shuffled."""
    order, shuffler = list(contestants), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            gc.collect()
            began = clock(device)
            contestants[name]()
            seconds[name].append(clock(device) - began)
    return seconds


def ratio(seconds: list[float], over: list[float]) -> Spread:
    """Spread of the ratio of two contestants, each round on its own."""
    return Spread(*np.quantile(np.divide(seconds, over), [0.25, 0.5, 0.75]).tolist())


def machine(device: torch.device) -> str:
    """When and on what this is measured, in a sentence."""
    cores = ""
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cores = found[1] if found else ""
    what = f"{cores or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        what = f"{torch.cuda.get_device_name(device)} ({what})"
    return f"{datetime.now(timezone.utc):%Y-%m-%d}, {what}, torch {torch.__version__}"


def write_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers of section `name`, which is added at the end if the page has none."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before = page.read_text(encoding="utf-8") if page.exists() else HEADER
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    if begin in before and end in before:
        after = before[: before.index(begin)] + section + before[before.index(end) + len(end) :]
    else:
        after = f"{before.rstrip()}\n\n{section}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(after, encoding="utf-8")
