"""Geodesics of a space whose metric is given by a few matrices: the acceleration of a point, and steps of its motion.

    g(x) = diag(d) + U U^T,      d = exp(P h + p),      U = Q h + q in R^{D x R},      h = tanh(W x + c)
    x'' = -Gamma(x)[x', x'] = g^-1 ( 1/2 grad_x(v^T g v) - (dg/dt) v ),      v = x'

The D^3 Christoffel symbols are never made: dg/dt follows from dh/dt = (1 - h^2) W v, the gradient from v^T g v through
h, and g^-1 is Woodbury's, in O(D R) numbers. v^T g v stays the same on a geodesic.

Shapes: B points, D width, R rank, M features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Point = tuple[Tensor, Tensor]
"""Position and velocity, each (B, D)."""


class Space(NamedTuple):
    """The matrices of a metric: W, c, P, p, Q, q. Q and q hold U row by row: (D R, M) and (D R,)."""

    w_MD: Tensor
    c_M: Tensor
    p_DM: Tensor
    p_D: Tensor
    q_KM: Tensor
    q_K: Tensor

    def metric(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """d (B, D) and U (B, D, R) at some points."""
        return self._metric(torch.tanh(F.linear(x_BD, self.w_MD, self.c_M)))

    def energy(self, x_BD: Tensor, v_BD: Tensor) -> Tensor:
        """v^T g(x) v, the square of a speed. (B,)."""
        d_BD, u_BDR = self.metric(x_BD)
        return (d_BD * v_BD.square()).sum(-1) + (v_BD[:, None] @ u_BDR).square().sum((-2, -1))

    def acceleration(self, x_BD: Tensor, v_BD: Tensor) -> Tensor:
        """(B, D): of points at x that move by v and on which nothing acts."""
        h_BM = torch.tanh(F.linear(x_BD, self.w_MD, self.c_M))
        slope_BM = 1 - h_BM.square()
        d_BD, u_BDR = self._metric(h_BM)
        turn_BM = slope_BM * F.linear(v_BD, self.w_MD)
        along_B1R = v_BD[:, None] @ u_BDR
        energy_BM = F.linear(d_BD * v_BD.square(), self.p_DM.T) / 2
        energy_BM = energy_BM + F.linear((v_BD[..., None] * along_B1R).flatten(1), self.q_KM.T)
        du_BDR = self._folded(F.linear(turn_BM, self.q_KM))
        drift_BD = d_BD * F.linear(turn_BM, self.p_DM) * v_BD
        drift_BD = drift_BD + (du_BDR @ along_B1R.mT + u_BDR @ (v_BD[:, None] @ du_BDR).mT).squeeze(-1)
        return woodbury(d_BD, u_BDR, F.linear(slope_BM * energy_BM, self.w_MD.T) - drift_BD)

    def _metric(self, h_BM: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(h_BM, self.p_DM, self.p_D).exp(), self._folded(F.linear(h_BM, self.q_KM, self.q_K))

    def _folded(self, u_BK: Tensor) -> Tensor:
        return u_BK.unflatten(-1, (len(self.p_D), -1))


def woodbury(d_BD: Tensor, u_BDR: Tensor, y_BD: Tensor) -> Tensor:
    """(diag(d) + U U^T)^-1 y, by a system of R equations."""
    y_BD1, scaled_BDR = (y_BD / d_BD)[..., None], u_BDR / d_BD[..., None]
    inner_BRR = torch.eye(u_BDR.shape[-1], dtype=u_BDR.dtype, device=u_BDR.device) + u_BDR.mT @ scaled_BDR
    return (y_BD1 - scaled_BDR @ torch.linalg.solve(inner_BRR, u_BDR.mT @ y_BD1)).squeeze(-1)


def acceleration_naive(space: Space, x_D: Tensor, v_D: Tensor) -> Tensor:
    """The acceleration of one point by its equation, with all Christoffel symbols. (D,)."""

    def metric(x_D: Tensor) -> Tensor:
        d_1D, u_1DR = space.metric(x_D[None])
        return torch.diag(d_1D[0]) + u_1DR[0] @ u_1DR[0].T

    slope_IJK = torch.func.jacrev(metric)(x_D)
    lower_KIJ = (torch.einsum("kji->kij", slope_IJK) + torch.einsum("kij->kij", slope_IJK)) / 2
    lower_KIJ = lower_KIJ - torch.einsum("ijk->kij", slope_IJK) / 2
    return -torch.linalg.solve(metric(x_D), torch.einsum("kij,i,j->k", lower_KIJ, v_D, v_D))


def rk4(acceleration: Callable[[Tensor, Tensor], Tensor], point: Point, dt: float) -> Point:
    """One step of Runge and Kutta's method of fourth order: four accelerations."""
    (x, v), slopes = point, list[Point]()
    for share in (0.0, 0.5, 0.5, 1.0):
        dx, dv = slopes[-1] if slopes else (0.0, 0.0)
        at, by = x + share * dt * dx, v + share * dt * dv
        slopes.append((by, acceleration(at, by)))
    (x1, v1), (x2, v2), (x3, v3), (x4, v4) = slopes
    return x + dt / 6 * (x1 + 2 * (x2 + x3) + x4), v + dt / 6 * (v1 + 2 * (v2 + v3) + v4)


def semi_implicit(acceleration: Callable[[Tensor, Tensor], Tensor], point: Point, dt: float) -> Point:
    """One step of Euler's semi-implicit method, first order: the position moves by the new velocity."""
    x, v = point
    v = v + dt * acceleration(x, v)
    return x + dt * v, v
