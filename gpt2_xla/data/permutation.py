"""A seeded random order of N things that is computed element by element instead of stored."""

import numpy as np


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends `indices` (n,) int64; one round per key of `keys` (uint64).

    A Feistel network permutes 0..4^b - 1, the smallest such range that holds `size`. A result beyond `size` is sent through
    it again until it falls inside ("cycle walking", Black and Rogaway 2002), which is a permutation of 0..size-1 and takes
    fewer than 4 rounds through the network on average.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    values = _feistel(indices.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass of a balanced Feistel network over 2 * `half` bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): each output bit depends on each input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
