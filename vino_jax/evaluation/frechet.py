"""Fréchet distance of two sets of features, from means and covariances gathered batch by batch, in float64."""
import numpy as np


class Moments:
    """Mean and covariance of feature vectors that come in batches; what it holds does not grow with their number (D x D float64).

    Batches are merged as Chan, Golub and LeVeque (1979) do: sums of raw squares would lose the variance of features whose mean is large.
    """

    def __init__(self):
        self.count = 0
        self.mean_D = np.zeros(0)
        self._scatter_DD = np.zeros((0, 0))

    def add(self, features_ND: np.ndarray) -> None:
        """Takes a batch, any float dtype. Raises ValueError for one of another width, or with values that are not finite."""
        x = np.asarray(features_ND, np.float64)
        if x.ndim != 2 or (self.count and x.shape[1] != len(self.mean_D)):
            raise ValueError(f"features of shape {x.shape} do not go with {len(self.mean_D) or 'any number of'} features a sample")
        if not np.isfinite(x).all():
            raise ValueError("features that are not finite")
        if not len(x):
            return
        if not self.count:
            self.mean_D, self._scatter_DD = np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
        mean_D, total = x.mean(0), self.count + len(x)
        away_ND, apart_D = x - mean_D, mean_D - self.mean_D
        self._scatter_DD += away_ND.T @ away_ND + np.outer(apart_D, apart_D) * (self.count * len(x) / total)
        self.mean_D = self.mean_D + apart_D * (len(x) / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """(D, D), divided by count - 1. Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, there are {self.count}")
        return self._scatter_DD / (self.count - 1)


def frechet_distance(mean_a_D: np.ndarray, cov_a_DD: np.ndarray, mean_b_D: np.ndarray, cov_b_DD: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of covariances A and B: the squared 2-Wasserstein distance of two Gaussians (Dowson and
    Landau 1982; of Inception's features the FID of Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of R' B R, A = R R': the same as those of A B, but R' B R is symmetric,
    so no complex part arises, and rounding below 0 is cut off. Works with singular covariances. Never below 0.
    """
    values, vectors = np.linalg.eigh(np.asarray(cov_a_DD, np.float64))
    real = values > values[-1] * len(values) * np.finfo(np.float64).eps  # of few samples few: what follows is small, and fast
    root_DR = vectors[:, real] * np.sqrt(values[real])
    product_RR = root_DR.T @ np.asarray(cov_b_DD, np.float64) @ root_DR
    shared = np.sqrt(np.linalg.eigvalsh((product_RR + product_RR.T) / 2).clip(0)).sum()
    apart = np.square(np.asarray(mean_a_D, np.float64) - mean_b_D).sum()
    return max(0.0, float(apart + np.trace(cov_a_DD) + np.trace(cov_b_DD) - 2 * shared))


def distance(outputs: Moments, references: Moments) -> tuple[float, list[str]]:
    """The distance of two sets, and what is to be said of it: a covariance of too few samples has not its full rank, and makes the
    distance too large. Raises ValueError where a set has fewer than two samples or the widths differ."""
    if outputs.count and references.count and len(outputs.mean_D) != len(references.mean_D):
        raise ValueError(f"{len(outputs.mean_D)} and {len(references.mean_D)} features a sample")
    value = frechet_distance(outputs.mean_D, outputs.covariance(), references.mean_D, references.covariance())
    notes = [f"rank-deficient {name}: {m.count} samples for {len(m.mean_D)} features; too large, and compares only with sets of this size"
             for name, m in (("outputs", outputs), ("references", references)) if m.count <= len(m.mean_D)]
    return value, notes
