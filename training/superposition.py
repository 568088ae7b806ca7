"""Rigid superposition of point sets."""

from __future__ import annotations

import torch
from torch import Tensor


def superposing_rotation(arms: Tensor, goals: Tensor) -> Tensor:
    """Return the proper rotations R that bring ``arms @ R`` closest to `goals` by least squares.

    Kabsch, Acta Cryst. A 32, 922 (1976). Where the points leave the rotation open (one point, or
    all in line), it is one of those that fit.

    Parameters
    ----------
    arms, goals
        (S, n, 3) each, Å, relative to their centres.

    Returns
    -------
    Tensor
        (S, 3, 3).
    """
    u, _, v = torch.linalg.svd(arms.transpose(1, 2) @ goals)
    u[:, :, 2] *= torch.linalg.det(u @ v)[:, None]
    return u @ v
