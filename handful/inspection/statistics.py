"""What "beyond chance" means here: errors by document, permutations, two halves that agree, and many tests at once.

Legend: D documents · R permutations · n tests, of any shape
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ratio", "adjusted", "both", "permutation_p", "ratio", "student_tail"]


def student_tail(t_n: Tensor, freedom: float | Tensor) -> Tensor:
    """P(T > t) of Student's t with so many degrees of freedom, float64; one-sided. 0.5 where t is not a number.

    I_x(a, b) / 2 by the continued fraction of the incomplete beta function (Press et al., Numerical Recipes, 6.4).
    """
    t_n = torch.nan_to_num(t_n.double(), nan=0.0)
    freedom_n = torch.as_tensor(freedom, dtype=torch.float64).expand_as(t_n)
    good_n = freedom_n > 0
    freedom_n = torch.where(good_n, freedom_n, 1.0)
    half_n = 0.5 * _incomplete_beta(freedom_n / (freedom_n + t_n.square()), freedom_n / 2, torch.full_like(t_n, 0.5))
    return torch.where(good_n, torch.where(t_n >= 0, half_n, 1 - half_n), 0.5)


def _incomplete_beta(x_n: Tensor, a_n: Tensor, b_n: Tensor) -> Tensor:
    turned_n = x_n > (a_n + 1) / (a_n + b_n + 2)  # where the other tail's fraction converges sooner
    x_n = x_n.clamp(0, 1)
    front_n = torch.exp(
        torch.lgamma(a_n + b_n) - torch.lgamma(a_n) - torch.lgamma(b_n)
        + a_n * x_n.clamp_min(1e-300).log() + b_n * (1 - x_n).clamp_min(1e-300).log()
    )  # fmt: skip
    here_n = front_n * _fraction(torch.where(turned_n, 0.0, x_n), a_n, b_n) / a_n
    there_n = 1 - front_n * _fraction(torch.where(turned_n, 1 - x_n, 0.0), b_n, a_n) / b_n
    return torch.where(turned_n, there_n, here_n)


def _fraction(x_n: Tensor, a_n: Tensor, b_n: Tensor) -> Tensor:
    """Lentz's method."""
    tiny = 1e-300
    c_n = torch.ones_like(x_n)
    d_n = 1 / _nonzero(1 - (a_n + b_n) * x_n / (a_n + 1), tiny)
    h_n = d_n
    for m in range(1, 300):
        before_n = h_n
        for step_n in (
            m * (b_n - m) * x_n / ((a_n + 2 * m - 1) * (a_n + 2 * m)),
            -(a_n + m) * (a_n + b_n + m) * x_n / ((a_n + 2 * m) * (a_n + 2 * m + 1)),
        ):
            d_n = 1 / _nonzero(1 + step_n * d_n, tiny)
            c_n = _nonzero(1 + step_n / c_n, tiny)
            h_n = h_n * d_n * c_n
        if bool(((h_n - before_n).abs() <= 1e-15 * h_n.abs()).all()):
            break
    return h_n


def _nonzero(x_n: Tensor, tiny: float) -> Tensor:
    return torch.where(x_n.abs() < tiny, tiny, x_n)


@dataclass(frozen=True, eq=False)
class Ratio:
    """A ratio of sums over documents, and its standard error: documents are independent, their tokens are not.

    value, error   (n…); the error is nan where all is of one document.
    freedom        the effective number of documents, (Σ by)² / Σ by², less one: D - 1 if all count alike.
    """

    value: Tensor
    error: Tensor
    freedom: Tensor

    def above(self) -> Tensor:
        """One-sided p of "not above 0", by Student's t; 1 where nothing can be said."""
        return torch.where(self.error > 0, student_tail(self.value / self.error, self.freedom), 1.0)

    def apart(self) -> Tensor:
        """Two-sided p of "is 0"; 1 where nothing can be said."""
        tail_n = student_tail((self.value / self.error).abs(), self.freedom)
        return torch.where(self.error > 0, (2 * tail_n).clamp_max(1.0), 1.0)


def ratio(of_D: Tensor, by_D: Tensor) -> Ratio:
    """Σ of / Σ by over documents, the first dimension, and its error (Cochran, Sampling Techniques, 6.4).

    by_D   (D,) or of the shape of `of_D`: what a document counts for. Where a few count for nearly all, they alone are
           the evidence, and the error and its degrees of freedom say so.
    """
    of_D, by_D = of_D.double(), by_D.double()
    by_D = by_D.view(*by_D.shape, *[1] * (of_D.dim() - by_D.dim())).expand_as(of_D)
    total = by_D.sum(0)
    value = of_D.sum(0) / total
    effective = total.square() / by_D.square().sum(0)
    freedom = torch.where(effective > 1 + 1e-9, effective - 1, torch.nan)
    rest = (of_D - value * by_D).square().sum(0)
    return Ratio(value, (rest * effective / freedom).sqrt() / total.abs(), torch.nan_to_num(freedom))


def both(one_n: Tensor, two_n: Tensor) -> Tensor:
    """The p of "beyond chance in both halves", of each half's p: the larger one (Berger 1982)."""
    return torch.maximum(one_n, two_n)


def adjusted(p_n: Tensor) -> Tensor:
    """Benjamini and Hochberg's q of p (1995): calling all with q <= a true keeps the expected share of false ones
    among them below a. nan is no test, and stays nan."""
    flat_n = p_n.double().flatten()
    tested_n = ~flat_n.isnan()
    q_n = torch.full_like(flat_n, math.nan)
    p_m, order_m = flat_n[tested_n].sort()
    count = len(p_m)
    if count:
        scaled_m = p_m * count / torch.arange(1, count + 1, dtype=torch.float64)
        least_m = scaled_m.flip(0).cummin(0).values.flip(0).clamp_max(1.0)
        q_n[tested_n.nonzero().squeeze(1)[order_m]] = least_m
    return q_n.view(p_n.shape)


def permutation_p(found_n: Tensor, drawn_Rn: Tensor) -> tuple[Tensor, Tensor]:
    """(p, own p) of statistics that are large where there is something, by what they were in R permutations.

    Each is set on its own null's scale, (value - mean) / deviation. p compares it with all tests' permuted values
    together, which reaches far smaller p than R alone could; own p compares it with its own R alone. A test whose
    permutations are all alike, or that is nan, has p = nan.
    """
    found_n, drawn_Rn = found_n.double(), drawn_Rn.double()
    R = len(drawn_Rn)
    mean_n, deviation_n = drawn_Rn.mean(0), drawn_Rn.std(0)
    good_n = (deviation_n > 1e-12) & ~found_n.isnan()
    score_n = torch.where(good_n, (found_n - mean_n) / deviation_n, math.nan)
    # What was found is no part of its scale; nor is a permuted value of its own, or tails would not be alike.
    off_Rn = (drawn_Rn - mean_n)[:, good_n]
    others_Rn = (off_Rn.square().sum(0) - off_Rn.square() * R / (R - 1)) / (R - 2)
    drawn_m = (off_Rn * R / (R - 1) / others_Rn.clamp_min(1e-30).sqrt()).flatten().sort().values
    # Ties count against: a permutation that gives what was found is as large.
    below_n = torch.searchsorted(drawn_m, torch.nan_to_num(score_n).contiguous() - 1e-9)
    p_n = (1 + len(drawn_m) - below_n) / (1 + len(drawn_m))
    own_n = (1 + (drawn_Rn >= found_n - 1e-12).sum(0)) / (1 + R)
    return torch.where(good_n, p_n.double(), math.nan), torch.where(good_n, own_n.double(), math.nan)
