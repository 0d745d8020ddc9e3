"""Block types whose scales are quantized, too: more weights share a float, and fewer an integer.

planes      how small integers share bytes
k           q2_k, q3_k, q4_k, q5_k, q6_k: layouts, and the three steps of quantizing
search      the first of them: which scale errs least
iq4         iq4_nl and iq4_xs, whose levels stand in a table
importance  what an error in each weight counts, given an importance matrix; so q4_0 to q5_1 are searched, too
"""

from . import iq4, k
from .importance import searched

__all__ = ["iq4", "k", "searched"]
