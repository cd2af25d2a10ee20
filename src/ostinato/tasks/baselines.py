"""What text can be predicted with before any network: counts of n-grams, and general compressors.

All are measured on the same held-out bytes as the models, and reported in bits per byte.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable

import numpy as np

_RADIX = np.uint64(257)
"""Contexts are numbers in this base: a byte b is the digit b + 1, so that lengths cannot be confused."""


class NGram:
    """An interpolated n-gram model of bytes with Witten–Bell smoothing (Witten and Bell 1991, equation 2).

        p_k(c | h) = (N(h c) + D(h) p_{k−1}(c | h')) / (N(h) + D(h)),   p_{−1} = 1/256

    where h are the last k bytes and h' the last k − 1 of them, N counts occurrences in the training text, and D(h) is
    the number of different bytes that were seen after h. A context never seen falls through to the shorter one.
    `order` is the number of preceding bytes that are looked at: order 3 counts groups of four bytes. The counts are
    fixed after training: held-out text teaches nothing.
    """

    def __init__(self, text: bytes, order: int = 3) -> None:
        if not 0 <= order <= 6:
            raise ValueError(f"order must be between 0 and 6, got {order}")
        self.order = order
        codes = np.frombuffer(text, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
        self._counts: list[tuple[np.ndarray, ...]] = []
        for length in range(order + 1):
            groups, count = np.unique(_windows(codes, length + 1), return_counts=True)
            contexts, first = np.unique(groups // _RADIX, return_index=True)
            total = np.add.reduceat(count, first) if len(first) else count
            different = np.diff(np.append(first, len(groups)))
            self._counts.append((groups, count, contexts, total, different))

    def probabilities(self, context: bytes, text: bytes) -> np.ndarray:
        """p(text[i] | context and text[:i]) for every i; float64, shape (len(text),)."""
        codes = np.frombuffer(context[-self.order :] + text if self.order else text, dtype=np.uint8)
        codes = codes.astype(np.uint64) + np.uint64(1)
        probability = np.full(len(text), 1 / 256)
        for length, (groups, count, contexts, total, different) in enumerate(self._counts):
            # The first bytes of all may have fewer than `length` before them: there the shorter context stands.
            windows = _windows(codes, length + 1)[-len(text) :] if len(text) else codes[:0]
            seen = _look_up(groups, count, windows)
            history = windows // _RADIX
            occurrences, kinds = _look_up(contexts, total, history), _look_up(contexts, different, history)
            part = probability[len(text) - len(windows) :]
            known = occurrences > 0
            part[known] = ((seen + kinds * part) / np.maximum(occurrences + kinds, 1))[known]
        return probability

    def bits_per_byte(self, context: bytes, text: bytes) -> float:
        """−mean log2 p over the bytes of `text`, read after `context`."""
        return float(-np.log2(self.probabilities(context, text)).mean())


def _windows(codes: np.ndarray, length: int) -> np.ndarray:
    """Every run of `length` digits as one number; the last byte is the lowest digit."""
    count = len(codes) - length + 1
    if count <= 0:
        return codes[:0]
    number = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        number = number * _RADIX + codes[offset : offset + count]
    return number


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is none; keys are sorted."""
    if not len(keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(np.float64)


def compressed_bits_per_byte(compress: Callable[[bytes], bytes], context: bytes, text: bytes) -> float:
    """8 (|compress(context + text)| − |compress(context)|) / |text|: what the text costs after the context.

    The compressor has read the training text first, as a model has. Deflate (gzip) looks back 32 KiB only.
    """
    return 8 * (len(compress(context + text)) - len(compress(context))) / len(text)


def gzip_bits_per_byte(context: bytes, text: bytes) -> float:
    """gzip -9; of the context, the last 256 KiB are given (it can see 32 KiB)."""
    return compressed_bits_per_byte(lambda data: gzip.compress(data, 9, mtime=0), context[-(1 << 18) :], text)


def xz_bits_per_byte(context: bytes, text: bytes) -> float:
    """xz -9e; of the context, the last 16 MiB are given, to bound the time."""
    preset = 9 | lzma.PRESET_EXTREME
    return compressed_bits_per_byte(lambda data: lzma.compress(data, preset=preset), context[-(1 << 24) :], text)
