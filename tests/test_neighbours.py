import logging
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from robustav.metrics import neighbours, products
from robustav.metrics.neighbours import approximate, nearest, nearest_within

ENGINES = ["torch", "sklearn"]
DTYPES = [torch.float32, torch.float64]
# Relative, of a distance.
PRECISION = {torch.float32: 1e-5, torch.float64: 1e-12}


def gaussian(rows, dim, dtype=torch.float64, seed=0):
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def clusters(rows, dim, spread, dtype=torch.float64, number=4):
    """Shuffled rows around `number` centres that are about the square root of `dim` from one another."""
    centres = gaussian(number, dim, seed=1) + 1
    points = centres.repeat(-(-rows // number), 1)[:rows] + spread * gaussian(rows, dim, seed=2)
    return points[torch.randperm(rows, generator=torch.Generator().manual_seed(3))].to(dtype)


def by_differences(queries, reference, exclude=None):
    """All distances, from differences in float64 alone."""
    distances = torch.from_numpy(cdist(queries.double().numpy(), reference.double().numpy()))
    if exclude is not None:
        rows = torch.nonzero(exclude >= 0)[:, 0]
        distances[rows, exclude[rows]] = math.inf
    return distances


def assert_nearest(found, distances, rtol):
    """Distances are the k least, in order; the indices are theirs, no row twice."""
    least = distances.sort(dim=1).values[:, : found.distances.shape[1]]
    torch.testing.assert_close(found.distances.double(), least, rtol=rtol, atol=0)
    torch.testing.assert_close(distances.gather(1, found.indices), least, rtol=10 * rtol, atol=0)
    assert (found.distances.diff(dim=1) >= 0).all()
    ties = found.distances.diff(dim=1) == 0
    assert (found.indices.diff(dim=1)[ties] > 0).all()
    assert (found.indices.sort(dim=1).values.diff(dim=1) > 0).all()
    assert found.distances.shape == found.indices.shape and found.indices.dtype == torch.int64


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 64])
@pytest.mark.parametrize(
    "make", [gaussian, lambda *a: clusters(a[0], a[1], 0.05, a[2]), lambda *a: gaussian(*a) + 1000]
)
def test_agrees_with_differences(engine, dtype, dim, make):
    rows = make(700, dim, dtype)
    queries, reference = rows[:100], rows[50:]
    exclude = torch.arange(-50, 50).clamp(min=-1)
    found = nearest(queries, reference, 9, exclude=exclude, engine=engine)
    assert found.distances.dtype == dtype
    assert_nearest(found, by_differences(queries, reference, exclude), PRECISION[dtype])


@pytest.mark.parametrize("engine", ENGINES)
def test_agrees_with_another_library(engine):
    rows = gaussian(300, 12)
    distances, indices = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(rows.numpy()).kneighbors()
    found = nearest_within(rows, 5, engine=engine)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_agrees_with_differences(data):
    """Grid points too, where most distances tie."""
    queries, samples, dim = (data.draw(st.integers(1, most)) for most in (20, 150, 8))
    seed, dtype = data.draw(st.integers(0, 999)), data.draw(st.sampled_from(DTYPES))
    levels = data.draw(st.sampled_from([2, 5, 0]))  # values on the grid; 0: no grid
    scale = 10.0 ** data.draw(st.integers(-15, 15))
    rows = gaussian(queries + samples, dim, seed=seed)
    rows = (rows if not levels else (rows * levels).round()).mul(scale).to(dtype)
    asked, reference = rows[:queries], rows[queries:]
    exclude = torch.randint(-1, samples, (queries,), generator=torch.Generator().manual_seed(seed))
    if samples == 1:
        exclude = torch.full_like(exclude, -1)
    k = data.draw(st.integers(1, samples - bool((exclude >= 0).any())))
    distances = by_differences(asked, reference, exclude)
    for engine in ENGINES:
        found = nearest(asked, reference, k, exclude=exclude, engine=engine)
        assert_nearest(found, distances, PRECISION[dtype])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_are_at_zero_and_near_duplicates_keep_their_digits(engine, dtype):
    rows = gaussian(2000, 64, dtype) + 3
    rows[1000:1500] = rows[:500]
    rows[1500:] = rows[:500] + 1e-6 * rows[:500].norm(dim=1, keepdim=True) * gaussian(500, 64, dtype, seed=1) / 8
    found = nearest_within(rows, 5, engine=engine)
    assert (found.distances[:500, 0] == 0).all() and (found.distances[1000:1500, 0] == 0).all()
    torch.testing.assert_close(found.indices[:500, 0], torch.arange(1000, 1500))
    exclude = torch.arange(2000)
    near = found.distances < 1
    assert near[:500].sum(dim=1).eq(2).all()
    expected = by_differences(rows, rows, exclude).sort(dim=1).values[:, :5]
    torch.testing.assert_close(found.distances[near].double(), expected[near], rtol=1e-7, atol=0)
    assert_nearest(found, by_differences(rows, rows, exclude), PRECISION[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_tight_clusters_keep_their_digits(dtype, spread):
    """Products cannot tell apart rows this near to one another, not even in float64 when there are hundreds."""
    rows = clusters(1600, 32, spread, dtype)
    found = nearest(rows[:200], rows, 10, exclude=torch.arange(200), engine="torch")
    expected = by_differences(rows[:200], rows, torch.arange(200))
    torch.testing.assert_close(found.distances.double(), expected.sort(dim=1).values[:, :10], rtol=1.2e-7, atol=0)
    assert_nearest(found, expected, 1.2e-7)


def test_each_precision_is_tried_where_the_one_before_leaves_doubt(monkeypatch):
    searched = []
    by_products = products._by_products

    def spy(asked, reference, k, spare, frame, dtype):
        searched.append((dtype, len(asked[1])))
        return by_products(asked, reference, k, spare, frame, dtype)

    monkeypatch.setattr(products, "_by_products", spy)
    nearest_within(gaussian(500, 32), 10, engine="torch")
    assert searched == [(torch.float32, 500)]
    searched.clear()
    nearest_within(gaussian(4, 32).repeat(125, 1), 10, engine="torch")
    assert searched == [(torch.float32, 500)]  # nothing is nearer than 0
    searched.clear()
    nearest_within(clusters(1600, 32, 1e-4), 10, engine="torch")
    assert searched == [(torch.float32, 1600), (torch.float64, 1600)]
    searched.clear()
    nearest_within(clusters(1600, 32, 1e-9), 10, engine="torch")
    assert searched == [(torch.float32, 1600), (torch.float64, 1600)] + 4 * [(torch.float64, 400)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [gaussian, lambda *a: clusters(a[0], a[1], 1e-9, a[2])])
def test_block_sizes_change_nothing(dtype, make, monkeypatch):
    rows = make(400, 16, dtype)
    rows[300:] = rows[:100]
    queries, exclude = rows[:150], torch.arange(150)
    expected = nearest(queries, rows, 7, exclude=exclude, engine="torch")
    sizes = {"QUERY_BLOCK": 13, "TILE": 50, "GROUP": 3, "STATE_BYTES": 16 * (7 + 8) * 40, "GATHER_BYTES": 8 * 16 * 50}
    for name, size in sizes.items():
        monkeypatch.setattr(products, name, size)
    monkeypatch.setattr(products, "GATHER_ROWS", 11)
    monkeypatch.setattr(neighbours, "CHECKED_ROWS", 9)
    found = nearest(queries, rows, 7, exclude=exclude, engine="torch")
    torch.testing.assert_close(found.distances, expected.distances, rtol=PRECISION[dtype], atol=0)
    assert_nearest(found, by_differences(queries, rows, exclude), PRECISION[dtype])
    monkeypatch.setattr(products, "TILE_BYTES", 1)
    again = nearest(queries, rows, 7, exclude=exclude, engine="torch")
    torch.testing.assert_close(again.distances, expected.distances, rtol=PRECISION[dtype], atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_order_of_rows_changes_nothing(engine):
    rows = gaussian(300, 10)
    order = torch.randperm(300)
    found, shuffled = nearest_within(rows, 6, engine=engine), nearest_within(rows[order], 6, engine=engine)
    torch.testing.assert_close(shuffled.distances, found.distances[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(order[shuffled.indices], found.indices[order])


@pytest.mark.parametrize("engine", ENGINES)
def test_rotation_and_shift_change_nothing_and_scale_scales(engine):
    rows = gaussian(300, 10)
    rotation = torch.linalg.qr(gaussian(10, 10, seed=5)).Q
    found = nearest_within(rows, 6, engine=engine)
    moved = nearest_within(7 * rows @ rotation + gaussian(1, 10, seed=6), 6, engine=engine)
    torch.testing.assert_close(moved.distances, 7 * found.distances, rtol=1e-9, atol=0)
    torch.testing.assert_close(moved.indices, found.indices)


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 100), (torch.float32, -100), (torch.float64, 900)])
@pytest.mark.parametrize("engine", ENGINES)
def test_squares_may_leave_the_range_of_the_numbers(engine, dtype, power):
    rows = gaussian(200, 10, dtype)
    found = nearest_within(rows, 6, engine=engine)
    scaled = nearest_within(rows * 2.0**power, 6, engine=engine)
    torch.testing.assert_close(scaled.distances, found.distances * 2.0**power, rtol=PRECISION[dtype], atol=0)
    torch.testing.assert_close(scaled.indices, found.indices)


def test_an_outlier_does_not_blind_the_search():
    rows = gaussian(300, 10, torch.float32)
    rows[7] = 1e30
    kept = torch.arange(300) != 7
    found = nearest_within(rows, 6, engine="torch")
    expected = nearest_within(rows[kept], 6, engine="torch")
    torch.testing.assert_close(found.distances[kept], expected.distances, rtol=1e-5, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_rows_the_same(engine):
    found = nearest_within(torch.full((40, 5), 3.7), 3, engine=engine)
    assert (found.distances == 0).all()
    assert (found.indices != torch.arange(40)[:, None]).all()
    again = nearest_within(torch.full((40, 5), 3.7), 3, engine=engine)
    torch.testing.assert_close(found.indices, again.indices)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_row_can_be_asked_for(engine):
    rows = gaussian(90, 4)
    found = nearest_within(rows, 89, engine=engine)
    assert_nearest(found, by_differences(rows, rows, torch.arange(90)), 1e-12)
    assert nearest(rows, rows, 90, engine=engine).indices[:, 0].tolist() == list(range(90))
    assert nearest(rows[:2], rows[:1], 1, engine=engine).indices.tolist() == [[0], [0]]


def test_auto_takes_the_tree_in_few_dimensions(monkeypatch):
    asked = []
    for name in ("_by_tree", "search"):
        engine = getattr(neighbours, name)
        monkeypatch.setattr(neighbours, name, lambda *a, name=name, engine=engine: [asked.append(name), engine(*a)][1])
    nearest_within(gaussian(50, neighbours.TREE_DIM), 3)
    nearest_within(gaussian(50, neighbours.TREE_DIM + 1), 3)
    nearest_within(gaussian(50, 2), 3, engine="torch")
    assert asked == ["_by_tree", "search", "search"]


@pytest.mark.parametrize("engine", ENGINES)
def test_arguments_are_left_alone(engine):
    rows = gaussian(60, 12, torch.float32).T.contiguous().T.requires_grad_()
    exclude = torch.arange(60, dtype=torch.int32)
    before = rows.detach().clone()
    found = nearest(rows, rows, 4, exclude=exclude, engine=engine)
    torch.testing.assert_close(rows.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(exclude, torch.arange(60, dtype=torch.int32))
    assert not found.distances.requires_grad
    assert_nearest(found, by_differences(before, before, exclude.long()), 1e-5)


def test_products_are_not_rounded_to_what_the_caller_allows():
    rows = gaussian(400, 64, torch.float32)
    expected = nearest_within(rows, 5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest_within(rows, 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found.distances, expected.distances, rtol=1e-5, atol=0)


def peak_memory():
    """Peak resident bytes since the last call, and then resident now; Linux alone lets a process set its peak back."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return [int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024 for name in ("VmHWM", "VmRSS")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_bounded(dtype):
    """All scores at once would take 800 MB in float32."""
    try:
        peak_memory()
    except OSError:
        pytest.skip("no peak of memory that can be set back on this system")
    reference = torch.rand(100_000, 128, dtype=dtype)
    _, before = peak_memory()
    nearest(reference[:2048], reference, 20, engine="torch")
    peak, _ = peak_memory()
    assert peak - before < 256e6


@pytest.mark.extra("faiss")
def test_approximate_finds_most_and_says_how_much(caplog):
    rows = gaussian(3000, 24, torch.float32)
    rows[2000:] = rows[:1000]
    exclude = torch.arange(-100, 1900).clamp(min=-1)
    exact = nearest(rows[:2000], rows, 10, exclude=exclude)
    with caplog.at_level(logging.WARNING):
        (distances, indices), recall = approximate(rows[:2000], rows, 10, exclude=exclude, sample=2000)
    assert 0.98 <= recall <= 1
    near = distances <= exact.distances[:, -1:] * (1 + 1e-5)
    assert recall == pytest.approx(float(near.double().mean()))
    assert caplog.messages == [
        f"approximate: {100 * recall:.2f} % of the 10 nearest rows found, by 2000 of the queries"
    ]
    torch.testing.assert_close(distances, (rows[:2000, None] - rows[indices]).norm(dim=2), rtol=1e-5, atol=1e-6)
    assert (indices != exclude[:, None]).all()
    hasty = approximate(rows[:2000], rows, 10, exclude=exclude, effort=1, sample=50)
    assert hasty.recall < recall


@pytest.mark.extra("faiss")
def test_approximate_marks_what_it_does_not_find():
    """A graph of one row has no second one."""
    found, recall = approximate(torch.ones(3, 4), torch.tensor([[0.0] * 4, [1.0] * 4]), 2)
    assert recall == 1 and found.indices.tolist() == 3 * [[1, 0]]


def test_approximate_without_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"`approximate` needs faiss: pip install 'robustav\[faiss\]'"):
        approximate(gaussian(9, 4), gaussian(9, 4), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [gaussian, lambda *a: clusters(a[0], a[1], 1e-6, a[2])])
def test_cpu_and_gpu_agree(dtype, make):
    rows = make(3000, 96, dtype)
    rows[2900:] = rows[:100]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # a GPU may then round to ten bits
        found = nearest_within(rows.cuda(), 10)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.distances.is_cuda and found.indices.is_cuda
    expected = nearest_within(rows, 10)
    torch.testing.assert_close(found.distances.cpu(), expected.distances, rtol=PRECISION[dtype], atol=0)
    assert_nearest(
        type(found)(*(x.cpu() for x in found)), by_differences(rows, rows, torch.arange(3000)), PRECISION[dtype]
    )


def test_errors_name_what_is_wrong():
    rows = gaussian(10, 4)
    broken = gaussian(3000, 4)
    broken[1500, 2], broken[2000] = math.nan, math.inf
    for engine in ENGINES:
        with pytest.raises(ValueError, match="`reference` must be finite, got nan first at row 1500, dim 2"):
            nearest(rows, broken, 2, engine=engine)
        with pytest.raises(ValueError, match="`queries` must be finite, got inf first at row 0, dim 0"):
            nearest(broken[2000:], rows, 2, engine=engine)
        with pytest.raises(ValueError, match="`latents` must be finite, got nan first at row 1500, dim 2"):
            nearest_within(broken, 2, engine=engine)
    with pytest.raises(ValueError, match=r"`k` must be .*at most 10, .*got 11"):
        nearest(rows, rows, 11)
    with pytest.raises(ValueError, match=r"`k` must be .*at most 9, .*got 10"):
        nearest_within(rows, 10)
    with pytest.raises(ValueError, match=r"`k` must be .*got 0"):
        nearest(rows, rows, 0)
    with pytest.raises((ValueError, TypeCheckError), match="dim"):
        nearest(rows, rows[:, :3], 2)
    with pytest.raises(ValueError, match=r"same dtype, got torch\.float64 and torch\.float32"):
        nearest(rows, rows.float(), 2)
    with pytest.raises(ValueError, match=r"`queries` must be float32 or float64, got torch\.float16"):
        nearest(rows.half(), rows.half(), 2)
    with pytest.raises(ValueError, match=r"`queries` must be \[sample, dim\] with at least one of each, got \[0, 4\]"):
        nearest(rows[:0], rows, 2)
    with pytest.raises(ValueError, match=r"`reference` must be .* got \[0, 4\]"):
        nearest(rows, rows[:0], 2)
    with pytest.raises(ValueError, match=r"`latents` must be .* got \[10, 0\]"):
        nearest_within(rows[:, :0], 2)
    with pytest.raises((ValueError, TypeCheckError), match="exclude"):
        nearest(rows, rows, 2, exclude=torch.arange(9))
    for wrong in (-2, 10):
        with pytest.raises(ValueError, match=f"`exclude` must hold rows of `reference`, 0 to 9, or -1 .*got {wrong}"):
            nearest(rows, rows, 2, exclude=torch.arange(10).index_fill(0, torch.tensor(3), wrong))
    with pytest.raises((ValueError, TypeCheckError), match="engine"):
        nearest(rows, rows, 2, engine="faiss")
    with pytest.raises(ValueError, match="`effort` and `sample` must be at least 1, got 0 and 256"):
        approximate(rows, rows, 2, effort=0)


def test_errors_without_the_checker_of_shapes():
    """What the checker of annotations says first while tests run."""
    rows = gaussian(10, 4)
    with pytest.raises(ValueError, match="same dim, got 4 and 3"):
        neighbours._checked(rows, rows[:, :3], 2, None, ("queries", "reference"))
    with pytest.raises(ValueError, match=r"`exclude` must be one row for each of 10 queries, got \[9\]"):
        neighbours._checked(rows, rows, 2, torch.arange(9), ("queries", "reference"))
    with pytest.raises(ValueError, match='`engine` must be "auto", "torch" or "sklearn", got \'faiss\''):
        neighbours._nearest(rows, rows, 2, None, "faiss", ("queries", "reference"))
