"""The types of blocks that can be written, and weights that quantizers stumble over."""

import numpy as np

GGUF_TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
SUPERBLOCKS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]
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


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Nearly normal: sums of four integers, the same for every version of NumPy and on every processor."""
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    quarters = bits.reshape(-1, 1).view(np.uint16).astype(np.int64) - 32768
    return (quarters.sum(axis=1).astype(np.float32) / np.float32(37837)).reshape(shape)


def nasty_rows() -> dict[str, np.ndarray]:
    """[n, 1024] of what searches stumble over, by what it is; within float16's range."""
    shape, steps, x = (16, 1024), np.arange(1024), normal((16, 1024), 0)
    other, chance = normal(shape, 1), np.random.PCG64(2).random_raw(16 * 1024).reshape(shape) % 1000
    powers = np.array([f"1e{n}" for n in range(-40, 3)], np.float32)
    constants = np.array(
        [1, -1, 3.3, -3.3, 1e-7, -1e-7, 1e-15, 2e-14, -1e-20, 1e-40, 65504, -65504], np.float32
    )
    rows = {
        "weights": normal((64, 1024), 3) * np.float32(0.02),
        "normal": normal((192, 1024), 4),
        "heavy tails": np.clip(x / np.where(other == 0, 1, other), -65504, 65504),
        "sparse": np.where(chance < 900, 0, x),
        "very sparse": np.where(chance < 995, 0, x),
        "zeros": np.zeros(shape),
        "zeros of both signs": np.where(chance < 500, np.float32(0), np.float32(-0.0)),
        "constants": np.repeat(constants[:, None], 1024, axis=1),
        "nearly constant": x[:, :1] * (1 + other * np.float32(2e-7)),
        "nearly -1": -1 - np.abs(x) * np.float32(1e-6),
        "negative": -np.abs(x),
        "positive": np.abs(x),
        "far below 0": x - 5,
        "far above 0": x + 5,
        "every magnitude": normal((43, 1024), 5) * powers[:, None],
        "a magnitude for every 16": x * np.repeat(powers[chance[:, :64] % 43], 16, axis=1),
        "magnitudes in a muddle": x * powers[chance % 43],
        "large": normal(shape, 6) * 16000,
        "outliers": np.where(chance < 10, 1000 * x, x),
        "few levels": np.round(x * 4) / 4,
        "two levels": np.where(chance < 500, 1, -1),
        "ramps": np.broadcast_to((steps % 64) / 8 - 3.5, shape),
        "half of it zero": np.where(steps % 512 < 256, 0, x),
    }
    return {name: np.ascontiguousarray(x, np.float32) for name, x in rows.items()}


def nasty_importance() -> np.ndarray:
    """[1024] mean squares, of four kinds: alike, with huge ones, with many zeros, of every magnitude."""
    bits = np.random.PCG64(7).random_raw(1024).reshape(4, 256)
    powers = np.ldexp(np.float32(1), (bits % 100).astype(int) - 66)
    alike, one = (bits[0] % 1000 + 1) / 1000, np.float32(1)
    huge = np.where(bits[1] % 100 < 95, one, np.ldexp(one, (bits[1] // 100 % 40).astype(int)))
    zeros = np.where((bits[2] % 10 < 7) | (np.arange(256) >= 192), 0, bits[2] // 10 % 1000)
    return np.concatenate([alike, huge, zeros, powers[3]]).astype(np.float32)
