"""The types of blocks that can be written, and weights that quantizers stumble over."""

import numpy as np

GGUF_TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
OF_2023 = ["q4_0_2023", "q4_0_2023_planar", "q4_1_2023"]


def nasty() -> np.ndarray:
    """[64, 64] of what quantizers stumble over; the same value often stands for a half step exactly."""
    steps = np.arange(64, dtype=np.float32)
    random = np.random.default_rng(0).standard_normal((49, 64), dtype=np.float32)
    rows = [
        np.zeros(64),
        -1 - steps / 64,
        1 + steps / 64,
        np.full(64, -3.0),
        np.full(64, 1e-30),
        np.where(steps % 2, 0.5, -0.5),
        np.where(steps % 2, -0.5, 0.5),
        (steps % 16 - 7) / 2,
        (steps % 16) / 2,
        np.where(steps % 32 == 0, 7.0, np.float32(0.49999997)),
        np.where(steps % 32 == 0, -7.0, np.float32(-0.49999997)),
        np.where(steps % 32 == 0, 127.0, (steps % 5) - 2.5),
        np.where(steps % 32 == 31, 15.0, steps % 4 * 0.5),
        np.where(steps % 32 == 5, 60000.0, 1e-7),
        np.where(steps % 32 < 2, -2.0, 2.0),
    ]
    return np.concatenate([np.array(rows, dtype=np.float32), random])
