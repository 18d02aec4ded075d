"""Exact nearest neighbours: ours, torch.cdist, scikit-learn and faiss over the cost of the products alone.

`python benchmarks/neighbours.py --write` measures everything (a quarter of an hour on two idle cores, 8 GB of memory) and
writes its section of docs/benchmarks.md; `--quick` is a smoke run in less than a minute. Without faiss
(`pip install 'robustav[faiss]'`) its rows are left out.
"""

import argparse
import importlib.util
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import numpy as np
import sklearn
import torch
from sklearn.neighbors import NearestNeighbors
from timing import Spread, interleave, machine, ratio, write_section
from torch import Tensor

from robustav.metrics.neighbours import LINKS, TREE_DIM, nearest
from robustav.prepare import quick_products

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU = torch.device("cpu")
DIM, K = 768, 50
BLOCK, TILE = 512, 20_480  # of the floor's products
FLOOR, OURS, DOUBLE, REPEATED = "floor", "ours, float32", "ours, float64", "ours, near duplicates"
CDIST, BRUTE, FLAT, HNSW = "torch.cdist, topk", "scikit-learn, brute", "faiss, flat", "faiss, HNSW"
EFFORTS = (64, 256)  # faiss's efSearch
FAISS = importlib.util.find_spec("faiss") is not None

Search = Callable[[], Tensor | np.ndarray | None]  # indices [query, K], each query's own row skipped or first


def spaced(number: int) -> str:
    """With thousands apart."""
    return f"{number:,}".replace(",", " ")


class Case(NamedTuple):
    """The first `queries` of `samples` random rows look for their neighbours among all."""

    samples: int
    queries: int

    def __str__(self) -> str:
        asked = "all pairs" if self.queries == self.samples else f"{self.queries} queries"
        return f"{spaced(self.samples)} rows, {asked}"

    @property
    def operations(self) -> int:
        return 2 * self.queries * self.samples * DIM

    def rows(self, dtype: torch.dtype = torch.float32, *, repeated: bool = False) -> Tensor:
        """Gaussian rows; `repeated` makes half of them copies of the others, moved by a millionth of their length."""
        rows, generator = torch.empty(self.samples, DIM, dtype=dtype), torch.Generator().manual_seed(0)
        for part in rows.split(1000):  # the same numbers in either precision, and no second copy
            part.copy_(torch.empty(len(part), DIM).normal_(generator=generator))
        if repeated:
            half = self.samples // 2
            torch.mul(rows[:half], 1 + 1e-6, out=rows[self.samples - half :])
        return rows


def products(rows: Tensor, queries: int) -> None:
    """The floor: every query times every row, in blocks, nothing done with the result."""
    scores = torch.empty(BLOCK * TILE)
    with quick_products():
        for tile in rows.split(TILE):
            for block in rows[:queries].split(BLOCK):
                out = scores[: len(block) * len(tile)].view(len(block), len(tile))
                torch.mm(block, tile.T, out=out)


def ours(rows: Tensor, queries: int) -> Tensor:
    return nearest(rows[:queries], rows, K, exclude=torch.arange(queries), engine="torch").indices


def cdist(rows: Tensor, queries: int) -> Tensor:
    return torch.cat(
        [torch.cdist(block, rows).topk(K + 1, largest=False).indices for block in rows[:queries].split(BLOCK)]
    )


def brute(rows: Tensor, queries: int) -> np.ndarray:
    model = NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(rows.numpy())
    return model.kneighbors(rows[:queries].numpy(), return_distance=False)


def flat(rows: Tensor, queries: int) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatL2(DIM)
    index.add(rows.numpy())
    return index.search(rows[:queries].numpy(), K + 1)[1]


def graph(rows: Tensor) -> Any:
    """An HNSW index of the rows."""
    import faiss

    index = faiss.IndexHNSWFlat(DIM, LINKS)
    index.add(rows.numpy())
    return index


def walk(index: Any, rows: Tensor, queries: int, effort: int) -> np.ndarray:
    index.hnsw.efSearch = effort
    return index.search(rows[:queries].numpy(), K + 1)[1]


def searches(case: Case) -> dict[str, Search]:
    """Whatever is measured, but for the graph, which is built beforehand."""
    rows, queries = case.rows(), case.queries
    found: dict[str, Search] = {
        FLOOR: partial(products, rows, queries),
        OURS: partial(ours, rows, queries),
        DOUBLE: partial(ours, case.rows(torch.float64), queries),
        REPEATED: partial(ours, case.rows(repeated=True), queries),
        CDIST: partial(cdist, rows, queries),
        BRUTE: partial(brute, rows, queries),
    }
    return found | ({FLAT: partial(flat, rows, queries)} if FAISS else {})


class Row(NamedTuple):
    """What one contestant needed in one case."""

    over: Spread  # CPU time over the floor's
    wall: float  # seconds, median
    recall: float  # share of the true neighbours, on at most 1024 queries
    memory: float | None  # extra MB at the peak, in a process of its own


def recall(indices: Tensor | np.ndarray, truth: Tensor) -> float:
    """Share of the true neighbours among those found, each query's own row left out."""
    rows = torch.as_tensor(indices)[: len(truth)]
    return float((truth[:, :, None] == rows[:, None, :]).any(dim=2).double().mean())


def measure(case: Case, rounds: int) -> tuple[dict[str, Row], float, float | None]:
    """The rows of a case, the floor's rate in GFLOP per CPU second, and what building the graph costs in floors."""
    contestants, building = searches(case), None
    if FAISS:
        rows, began = case.rows(), time.process_time()
        index = graph(rows)
        building = time.process_time() - began
        contestants |= {f"{HNSW}, ef {e}": partial(walk, index, rows, case.queries, e) for e in EFFORTS}
    asked = min(case.queries, 1024)
    truth = {repeated: ours(case.rows(repeated=repeated).double(), asked) for repeated in (False, True)}
    walls: dict[str, list[float]] = {name: [] for name in contestants}
    shares = dict.fromkeys(contestants, 1.0)

    def run(name: str) -> None:
        began = time.perf_counter()
        indices = contestants[name]()
        walls[name].append(time.perf_counter() - began)
        if indices is not None and len(walls[name]) == 1:
            shares[name] = recall(indices, truth[name == REPEATED])

    run(FLOOR), run(OURS)
    seconds = interleave({name: partial(run, name) for name in contestants}, rounds, CPU)
    asking = [name for name in contestants if name not in (FLOOR, f"{HNSW}, ef {EFFORTS[1]}")]  # one graph is enough
    memory = {name: alone("--peak", str(case.samples), str(case.queries), name)[0] for name in asking}
    table = {
        name: Row(ratio(seconds[name], seconds[FLOOR]), float(np.median(walls[name])), shares[name], memory.get(name))
        for name in contestants
    }
    floor = float(np.median(seconds[FLOOR]))
    return table, case.operations / floor / 1e9, building / floor if building else None


def resident(which: str) -> float:
    """MB resident in this process, now (VmRSS) or at most so far (VmHWM)."""
    if Path("/proc/self/status").exists():
        found = re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def peak_memory(case: Case, name: str) -> float:
    """MB at the peak of one search beyond what was resident with its rows in memory; the result is part of it."""

    def once(case: Case) -> float:
        rows = case.rows(torch.float64 if name == DOUBLE else torch.float32, repeated=name == REPEATED)
        before = resident("VmRSS")
        if name.startswith(HNSW):
            walk(graph(rows), rows, case.queries, int(name.split()[-1]))
        else:
            {OURS: ours, DOUBLE: ours, REPEATED: ours, CDIST: cdist, BRUTE: brute, FLAT: flat}[name](rows, case.queries)
        return resident("VmHWM") - before

    once(Case(300, 20))  # what only a first call takes
    return once(case)


def alone(*what: str) -> list[float]:
    """Numbers that a fresh process prints when asked for them."""
    done = subprocess.run([sys.executable, __file__, *what], capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def low_dims(samples: int, queries: int, rounds: int) -> dict[str, dict[str, str]]:
    """The kd-tree's CPU time over that of the products, by dimension."""
    table: dict[str, dict[str, str]] = {}
    for dim in (2, 4, 6, 8, 16):
        generator = torch.Generator().manual_seed(dim)
        rows = torch.empty(samples, dim).normal_(generator=generator)
        centres = torch.empty(50, dim).normal_(generator=generator)
        grouped = 0.1 * rows + centres[torch.randint(50, (samples,), generator=generator)]
        for name, points in {"Gaussian": rows, "50 clusters": grouped}.items():
            skipped = torch.arange(queries)
            engines: dict[str, Callable[[], object]] = {
                engine: partial(nearest, points[:queries], points, K, exclude=skipped, engine=engine)
                for engine in ("torch", "sklearn")
            }
            seconds = interleave(engines, rounds, CPU)
            table.setdefault(str(dim), {})[name] = str(ratio(seconds["sklearn"], seconds["torch"]))
    return table


def large(samples: int) -> list[float]:
    """Wall and CPU seconds of 512 and of 1536 queries among many rows, CPU seconds of the latter's floor, extra MB."""
    rows = Case(samples, 0).rows()
    before, found = resident("VmRSS"), []
    for queries in (512, 1536):
        wall, cpu = time.perf_counter(), time.process_time()
        ours(rows, queries)
        found += [time.perf_counter() - wall, time.process_time() - cpu]
    cpu = time.process_time()
    products(rows, 1536)
    return [*found, time.process_time() - cpu, resident("VmHWM") - before]


def available() -> float:
    """Bytes of memory that are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


ABOUT = """
## Nearest neighbours: ours, other libraries, and the floor

`python benchmarks/neighbours.py --write`. {machine}, scikit-learn {sklearn}{faiss}. CPU time over the floor's.

The first rows look for their {k} nearest among all; {dim} dimensions, Gaussian: no structure helps anybody (real latents
have some; it is the graph that finds more of their neighbours, the exact searches cost the same). The **floor** is the matrix product alone in float32, in blocks of {block} x {tile}, by the CPU's faster kernels where those
are as exact, nothing done with its result: 2 operations a dimension and pair.

- **ours** is `metrics.neighbours.nearest` with the engine "torch". In float64 the candidates come from the same float32
  products and are measured again by differences. **Near duplicates**: half of the rows are copies of the others, a
  millionth of their length away, so that float32 must measure every candidate again too.
- **torch.cdist, topk** in blocks of {block} queries. **scikit-learn** is `NearestNeighbors(algorithm="brute")`,
  **faiss, flat** `IndexFlatL2`, **HNSW** an approximate graph with {links} links ({k} nearest; efSearch in the row), which
  is built before: that comes on top.
- **Recall** is the share of the true {k} (found in float64) on at most 1024 of the queries. **Memory** is what a fresh
  process takes at its peak beyond the rows themselves; the result is part of it, and building the graph.
"""

LARGE = """
### A set of the size of AudioSet

{samples} x {dim}, float32 ({gigabytes:.1f} GB). 512 queries take {few:.1f} s, 1536 take {many:.1f} s ({over:.2f} of the floor's CPU
time), with {memory:.0f} MB beside the rows. The difference is {each:.1f} ms a query on {threads} threads: **{hours:.1f} hours for
all pairs** ({cores:.1f} of CPU time), extrapolated, not run.
"""


def lines(header: list[str], rows: dict[str, list[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *([name, *row] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def section(case: Case, rows: dict[str, Row], rate: float, building: float | None, rounds: int) -> str:
    """One case as a table."""
    header = ["", "CPU time over floor", "wall, s", "recall", "memory, MB"]
    cells = {
        name: [str(r.over), f"{r.wall:.2f}", f"{r.recall:.4f}", "" if r.memory is None else f"{r.memory:.0f}"]
        for name, r in rows.items()
    }
    cells[FLOOR][2] = ""
    built = f" Building the HNSW graph costs {building:.1f} floors." if building else ""
    return f"### {case}\n\nThe floor ran at {rate:.0f} GFLOP a CPU second; {rounds} rounds.{built}\n\n{lines(header, cells)}"


def goals(case: Case, rows: dict[str, Row]) -> dict[str, list[str]]:
    """What is to be met, what is, and whether."""
    mine = rows[OURS]
    figures = {"over floor": (mine.over.median, 1.40), "MB beyond the rows": (mine.memory or 0.0, 256.0)}
    bars = {FLAT: 0.90, BRUTE: 0.45}
    figures |= {
        f"over {name}": (mine.over.median / rows[name].over.median, bars[name]) for name in bars if name in rows
    }
    return {
        f"{case}: ours, float32, {what}": [f"{x:.2f}", f"{bar:.2f}", "met" if x <= bar else f"missed by {x - bar:.2f}"]
        for what, (x, bar) in figures.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rows, one round, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    parser.add_argument(
        "--peak", nargs=3, help=argparse.SUPPRESS
    )  # what a fresh process is asked for: samples, queries, name
    parser.add_argument("--large", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_memory(Case(int(options.peak[0]), int(options.peak[1])), options.peak[2]))
        return 0
    if options.large:
        print(*large(options.large))
        return 0
    rounds = 1 if options.quick else options.rounds
    cases = [Case(6000, 600)] if options.quick else [Case(20_000, 20_000), Case(200_000, 2048)]
    many = 30_000 if options.quick else 2_000_000
    faiss = ""
    if FAISS:
        import faiss as module

        faiss = f", faiss {module.__version__}"
    about = ABOUT.format(
        machine=machine(CPU),
        sklearn=sklearn.__version__,
        faiss=faiss,
        k=K,
        dim=DIM,
        block=BLOCK,
        tile=TILE,
        links=LINKS,
    )
    parts, met = [about], {}
    for case in cases:
        rows, rate, building = measure(case, rounds)
        parts.append(section(case, rows, rate, building, rounds))
        met |= goals(case, rows)
        print(parts[-1], file=sys.stderr, flush=True)
    dims = low_dims(2000 if options.quick else 20_000, 2000, rounds)
    names = ["Gaussian", "50 clusters"]
    parts.append(
        f'### Few dimensions\n\nA kd-tree (the engine "sklearn") over matrix products ("torch"), CPU time, {K} '
        f'neighbours of 2 000 among 20 000 rows in float32. "auto" takes the tree up to {TREE_DIM} dimensions, on a CPU.\n\n'
        + lines(["dimensions", *names], {dim: [row[name] for name in names] for dim, row in dims.items()})
    )
    if available() > 1.3 * 4 * many * DIM:
        few, some, more, cpu, floor, memory = alone("--large", str(many))
        each = (more - few) / 1024
        parts.append(
            LARGE.format(
                samples=spaced(many),
                dim=DIM,
                gigabytes=4 * many * DIM / 1e9,
                few=few,
                many=more,
                over=cpu / floor,
                memory=memory,
                each=1000 * each,
                threads=torch.get_num_threads(),
                hours=each * many / 3600,
                cores=(cpu - some) / 1024 * many / 3600,
            )
        )
    else:
        print(f"not enough memory for {many} rows: that part is left out", file=sys.stderr)
    parts.append(f"### Goals\n\n{lines(['', 'figure', 'at most', 'goal'], met)}")
    text = "\n\n".join(part.strip() for part in parts)
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + text)
    if options.write and not options.quick:
        write_section(PAGE, "neighbours", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
