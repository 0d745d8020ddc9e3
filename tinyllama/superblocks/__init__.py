"""Blocks of 256 weights that share a scale of scales: q2_k to q6_k (k.py), iq4_nl and iq4_xs (iq4.py)."""

from . import iq4, k

__all__ = ["iq4", "k"]
