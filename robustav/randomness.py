"""Random generators derived from what is being drawn for, so that a draw depends on nothing else."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def draws_for(seed: int, samples: Iterable[str], *purpose: str) -> list[torch.Generator]:
    """One CPU generator a sample, fixed by (seed, sample id, purpose): the same in any batch, order or shard."""
    generators = []
    for sample in samples:
        key = hashlib.sha256("\x1f".join([str(seed), sample, *purpose]).encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True)))
    return generators


def draw_for(seed: int, *purpose: str) -> torch.Generator:
    """One CPU generator for something that belongs to no single sample, fixed by (seed, purpose)."""
    (generator,) = draws_for(seed, [""], *purpose)
    return generator


@contextmanager
def seeded(seed: int, *purpose: str) -> Iterator[None]:
    """Global generators fixed by (seed, purpose), for models that draw from them; afterwards they are as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(draw_for(seed, *purpose).initial_seed() % 2**63)
        yield
