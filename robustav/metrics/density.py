"""How dense latents lie at each sample: nearest neighbours, Gaussians, kernels, and the dimension they spread in."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.special import digamma
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from robustav.metrics.latents import blocks, check_k, checked, negligible
from robustav.metrics.neighbours import nearest_within
from robustav.metrics.spaces import principal

MEDIAN_ROWS = 4096  # whose pairs give the bandwidth of a kernel; all pairs of more rows would not fit in memory


def knn_log_density(
    latents: Float[Tensor, "sample dim"], k: int = 10, dim: float | None = None
) -> Float[Tensor, " sample"]:
    """Log density by the ball that reaches the k-th other row [Loftsgaarden & Quesenberry, 1965].

    doi:10.1214/aoms/1177700079. log(k / n) - log(volume of the unit ball) - d log(radius), in nats, unbounded; high
    where rows crowd. nan where the radius is 0, at rows with `k` exact copies: a mass has no density. Depends on the
    scale of the latents, so never compare it between layers or models (`relative_density` may be). From about 50
    dimensions on d log(radius) drowns everything: give the intrinsic dimension as `dim` (see `local_dimension`; nan
    everywhere unless it is finite), or use `negative_log_radius`.

    >>> knn_log_density(torch.arange(4.0)[:, None], k=1).exp()
    tensor([0.1250, 0.1250, 0.1250, 0.1250], dtype=torch.float64)
    """
    closeness = negative_log_radius(latents, k)
    dim = latents.shape[1] if dim is None else dim
    if dim <= 0:
        raise ValueError(f"`dim` must be a positive number of dimensions, got {dim:g}")
    if not math.isfinite(dim):
        return torch.full_like(closeness, torch.nan)
    return math.log(k / len(latents)) - _log_ball(dim) + dim * closeness


def negative_log_radius(latents: Float[Tensor, "sample dim"], k: int = 10) -> Float[Tensor, " sample"]:
    """Minus the log distance to the k-th other row: orders rows as `knn_log_density` does, without the factor d.

    nan where that distance is 0. Scaling the latents by a adds -log a to every row.

    >>> negative_log_radius(torch.tensor([[0.0], [1.0], [4.0]]), k=1).exp()
    tensor([1.0000, 1.0000, 0.3333], dtype=torch.float64)
    """
    latents = checked(latents)
    check_k(k, len(latents) - 1, "other rows")
    radius = nearest_within(latents, k).distances[:, -1]
    return -radius.where(radius > negligible(latents), torch.nan).log()


def knn_entropy_terms(latents: Float[Tensor, "sample dim"], k: int = 10) -> Float[Tensor, " sample"]:
    """What each row adds to `knn_entropy`, their mean; for bootstraps that draw rows.

    >>> terms = knn_entropy_terms(torch.arange(4.0)[:, None], k=1)
    >>> bool((terms == terms[0]).all())
    True
    """
    closeness = negative_log_radius(latents, k)
    dim = latents.shape[1]
    return float(digamma(len(latents)) - digamma(k)) + _log_ball(dim) - dim * closeness


def knn_entropy(latents: Float[Tensor, "sample dim"], k: int = 10) -> Float[Tensor, ""]:
    """Differential entropy in nats from distances to the k-th other row [Kozachenko & Leonenko, 1987].

    Low for compact latents; scaling them by a adds d log a. Rows with `k` exact copies have no term and are left out
    (count the nan in `knn_entropy_terms`): what is estimated then is the entropy of the rest, for with a mass on one
    point the entropy itself would be minus infinity. nan where no row is left. Biased upwards when n is small for d.

    >>> square = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> f"{knn_entropy(square, k=3).item():.1f} {knn_entropy(10 * square, k=3).item():.1f}"
    '0.0 4.6'
    """
    return knn_entropy_terms(latents, k).nanmean()


def local_dimension(latents: Float[Tensor, "sample dim"], k: int = 20) -> Float[Tensor, " sample"]:
    """How many dimensions the latents spread in around each row, by maximum likelihood [Levina & Bickel, 2004].

    (k - 1) / sum of log(r_k / r_i) over the nearest k others. Dividing by k - 1 makes the inverse unbiased, hence
    average it by `harmonic_mean` [MacKay & Ghahramani, 2005]; the arithmetic mean is too high by (k - 1) / (k - 2).
    Low for a compact class. Standard deviation about dimension / sqrt(k); too low where rows are few for the dimension,
    by 6 % at 10 dimensions and 5000 rows. Exact copies are dropped from the neighbours; nan where fewer than two
    others remain, infinite where all remaining ones are equally far.

    >>> local_dimension(torch.tensor([[0.0], [1.0], [-2.0], [4.0]]), k=3)[0] * math.log(4 * 2)
    tensor(2., dtype=torch.float64)
    """
    latents = checked(latents)
    check_k(k, len(latents) - 1, "other rows")
    if k < 2:
        raise ValueError(f"`k` must be at least 2, got {k}: one radius has no ratio to another")
    radii = nearest_within(latents, k).distances
    apart = radii > negligible(latents)
    ratios = (radii[:, -1:] / radii).log().where(apart, 0)
    terms = apart.sum(dim=1) - 1
    return (terms / ratios.sum(dim=1)).where(terms > 0, torch.nan)


def harmonic_mean(values: Float[Tensor, " sample"]) -> Float[Tensor, ""]:
    """One over the mean of one over each value, nan left out; nan where none is left, infinity counting as 1 / 0.

    >>> harmonic_mean(torch.tensor([1.0, 3.0, torch.nan]))
    tensor(1.5000)
    """
    if (values <= 0).any():
        raise ValueError(f"`values` must be positive, got {values[values <= 0][0].item():g}")
    return 1 / (1 / values).nanmean()


@dataclass(frozen=True, eq=False)
class SharedGaussian:
    """Gaussians of one shape around the mean of each class [Lee et al., 2018, arXiv:1807.03888].

    >>> latents = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    >>> labels = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    >>> SharedGaussian.fit(latents, labels).apply(torch.tensor([[1.0], [4.0]]))
    tensor([[ -0.0000, -50.0000],
            [ -4.5000, -24.5000]], dtype=torch.float64)
    """

    means: Float[Tensor, "class dim"]  # nan for a class without samples
    covariance: Float[Tensor, "dim dim"]
    shrinkage: float  # weight of the round part of the covariance, in [0, 1]

    @classmethod
    def fit(cls, latents: Float[Tensor, "sample dim"], labels: Bool[Tensor, "sample class"]) -> "SharedGaussian":
        """Class means, and the covariance around them with Ledoit and Wolf's shrinkage.

        A sample of several classes counts once for each. Takes 8 bytes per (label, dim).
        """
        latents = checked(latents)
        sample, column = labels.nonzero(as_tuple=True)
        members = labels.to(latents.dtype)
        means = (members.T @ latents) / members.sum(dim=0)[:, None]
        residuals = latents[sample] - means[column]
        if not (residuals.abs() > negligible(latents)).any():
            raise ValueError(
                "`latents` must vary within at least one class of `labels`, but every class is a single point: "
                "give at least two different samples of a class"
            )
        covariance, shrinkage = ledoit_wolf(residuals.cpu().numpy(), assume_centered=True)
        shared = torch.as_tensor(covariance, dtype=latents.dtype, device=latents.device)
        if torch.linalg.cholesky_ex(shared).info:
            raise ValueError(
                f"`latents` are too few or too flat to give {latents.shape[1]} dims a covariance: use `principal`"
            )
        return cls(means, shared, float(shrinkage))

    def apply(self, latents: Float[Tensor, "sample dim"]) -> Float[Tensor, "sample class"]:
        """Minus half the squared Mahalanobis distance to each class, at most 0; nan for a class without samples.

        Log densities up to one constant for all. Flattering on the samples of the fit, most where a class has few.
        """
        latents = checked(latents).to(self.means.dtype)
        root = torch.linalg.cholesky(self.covariance)
        centre = self.means.nanmean(dim=0)
        round_latents, round_means = (
            torch.linalg.solve_triangular(root, (x - centre).T, upper=False).T for x in (latents, self.means)
        )
        distances = torch.cdist(round_latents, round_means, compute_mode="donot_use_mm_for_euclid_dist")
        return -distances.square() / 2


def kde_log_density(members: Float[Tensor, "sample dim"], dims: int = 20) -> Float[Tensor, " sample"]:
    """Log density at each row under Gaussian kernels on the other rows, after [Feinman et al., 2017, arXiv:1703.00410].

    In nats, on the first `dims` principal axes of `members`; more than about 20 measure little but the bandwidth. That
    is the median distance between two rows (of 4096 spread over the set, if it is larger). Unlike theirs the kernels
    integrate to 1, so that sets of different bandwidth compare; for that, project all sets together with `principal`
    first, since each has axes of its own here. nan everywhere when over half of the pairs are exact copies.

    >>> kde_log_density(torch.tensor([[0.0], [2.0]])).exp()  # a kernel of width 2, two away from its centre
    tensor([0.1210, 0.1210], dtype=torch.float64)
    """
    members = checked(members, "members")
    if len(members) < 2:
        raise ValueError("`members` must have at least 2 rows, got 1: its density would rest on nothing")
    if dims < 1:
        raise ValueError(f"`dims` must be at least 1, got {dims}")
    samples, dim = members.shape
    rounding = negligible(members)
    if dim > dims:
        members = principal(members, min(dims, samples - 1))
    spread = torch.linspace(0, samples - 1, min(samples, MEDIAN_ROWS), device=members.device).long()
    width = torch.pdist(members[spread]).median()
    if width <= rounding:
        return members.new_full((samples,), torch.nan)
    values = members.new_empty(samples)
    for rows in blocks(samples, 3 * members.element_size() * samples):
        exponents = torch.cdist(members[rows], members, compute_mode="donot_use_mm_for_euclid_dist").div(width)
        exponents = exponents.square_().div_(-2)
        exponents.diagonal(rows.start).fill_(-torch.inf)
        values[rows] = exponents.logsumexp(dim=1)
    return values - math.log(samples - 1) - members.shape[1] * (width * math.sqrt(2 * math.pi)).log()


def _log_ball(dim: float) -> float:
    """Log volume of the unit ball in `dim` dimensions, which need not be a whole number."""
    return dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
