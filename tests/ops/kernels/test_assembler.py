"""What Hopper's assembler is given: never one place in shared memory as tiles of two widths (`launch.narrowest`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("triton")

SCRIPT = """
import re, sys
import offline, torch
offline.start()
from ostinato import backend, ops
from ostinato.ops.kernels.triton import ahead, launch
ahead.ENABLED = False
launch.LINE = int(sys.argv[4])

def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype).requires_grad_()

def call(engine, K, V):
    q, k, v = leaf(1, 300, 2, K), leaf(1, 300, 2, K), leaf(1, 300, 2, V)
    head, channel, beta = (-torch.rand(1, 300, 2), -torch.rand(1, 300, 2, K), torch.rand(1, 300, 2))
    reset, state = torch.zeros(1, 300, dtype=torch.bool), torch.zeros(1, 2, K, V)
    return {
        "linear": lambda: ops.linear_attention(q, k, v, head, reset=reset, state=state),
        "linear_channels": lambda: ops.linear_attention(q, k, v, channel),
        "linear_channels_reset": lambda: ops.linear_attention(q, k, v, channel, reset=reset, state=state),
        "delta": lambda: ops.delta_rule(q, k, v, beta, head, normalize=True, reset=reset, state=state),
        "delta_channels": lambda: ops.delta_rule(q, k, v, beta, channel, reset=reset),
        "exponential": lambda: ops.exponential_attention(q, k, v, beta, head, reset=reset),
    }[engine]()[0]

with backend(linear_attention="triton", delta_rule="triton", exponential_attention="triton"):
    call(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).sum().backward()
kernels = products = 0
for name, kernel in offline.compiled():
    places, kernels = {}, kernels + 1
    # A description's place is added to, or joined with, a constant that says in its upper half how wide the tile is.
    for place, constant in re.findall(r"(?:or|add)\\.[bs]64\\s+%rd\\d+, (%rd\\d+), (-?\\d{15,});", kernel.asm["ptx"]):
        places.setdefault(place, set()).add(int(constant) >> 32)
    products += len(places)
    if any(len(kinds) > 1 for kinds in places.values()):
        print(f"{name} {sys.argv[1:]}: {places}")
print(kernels > 1 and products > 0)
"""


CASES = [
    ("linear", 24, 100),
    ("linear_channels", 24, 100),
    ("linear_channels_reset", 64, 32),
    ("delta", 64, 32),
    ("delta", 256, 64),
    ("delta_channels", 24, 100),
    ("exponential", 64, 32),
]


@pytest.mark.parametrize(("engine", "keys", "values"), CASES)
def test_no_place_is_described_in_two_ways(engine: str, keys: int, values: int, alone: Callable[..., str]) -> None:
    assert alone(SCRIPT, engine, str(keys), str(values), "64") == "True"


def test_tiles_of_two_widths(alone: Callable[..., str]) -> None:
    """What the test above looks for is there where tiles are narrower than a line."""
    assert "walk" in alone(SCRIPT, "linear", "24", "100", "32")
