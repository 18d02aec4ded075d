"""How well embeddings of one modality find their own clip's in another: recall among the first few, median rank."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real, Shaped


class Retrieval(NamedTuple):
    """`r1`, `r5`, `r10`: share of queries whose own item is among the first 1, 5, 10; `median_rank` counts from 1."""

    r1: float
    r5: float
    r10: float
    median_rank: float


def retrieval(queries: Real[np.ndarray, "query dim"], items: Real[np.ndarray, "item dim"]) -> Retrieval:
    """Retrieval by cosine, as CAV-MAE is scored [Gong et al., 2022, arXiv:2210.07839]; query i looks for item i.

    It is not symmetric: swap the arguments for the other direction. It falls with the number of samples, even where
    the embeddings are the same: compare sets of one size.

    >>> retrieval(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.1], [1.0, 0.2]]))
    Retrieval(r1=1.0, r5=1.0, r10=1.0, median_rank=1.0)
    """
    if len(queries) != len(items):
        raise ValueError(f"`items` must have one row for each of {len(queries)} queries, got {len(items)}")
    found = ranks_of_own(cosines(queries, items))
    r1, r5, r10 = (float((found <= k).mean()) for k in (1, 5, 10))
    return Retrieval(r1, r5, r10, float(np.median(found)))


def cosines(
    queries: Real[np.ndarray, "query dim"], items: Real[np.ndarray, "item dim"]
) -> Float[np.ndarray, "query item"]:
    """Cosine of every query with every item; 0 with a vector of zeros."""
    check_embeddings("queries", queries)
    check_embeddings("items", items)
    lengths = (np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (queries, items))
    unit = [
        vectors / np.where(length > 0, length, 1) for vectors, length in zip((queries, items), lengths, strict=True)
    ]
    return unit[0] @ unit[1].T


def ranks_of_own(similarity: Real[np.ndarray, "sample sample"]) -> Int[np.ndarray, " sample"]:
    """Place of item i among all items for query i, from 1; items that tie with it go before it.

    >>> ranks_of_own(np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]]))
    array([1, 2, 3])
    """
    return (similarity >= similarity.diagonal()[:, None]).sum(axis=1)


def check_embeddings(name: str, vectors: Shaped[np.ndarray, "sample dim"]) -> None:
    """Raise `ValueError` unless there are vectors and all of them are finite."""
    if 0 in vectors.shape:
        raise ValueError(f"`{name}` must be [sample, dim] with at least one of each, got {list(vectors.shape)}")
    if not np.isfinite(vectors).all():
        row, column = np.argwhere(~np.isfinite(vectors))[0]
        raise ValueError(f"`{name}` must be finite, got {vectors[row, column]} first at sample {row}")
