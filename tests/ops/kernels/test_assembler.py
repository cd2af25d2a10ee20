"""Hopper's assembler is never given one place in shared memory as tiles of two widths (`launch.narrowest`), and what it
makes leaves the registers of a running product alone (`machine_code`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("triton")

SCRIPT = """
import re, sys
import machine_code, offline, torch
offline.start()
from ostinato import backend, ops
from ostinato.ops import cells
from ostinato.ops.kernels.triton import ahead, launch
ahead.ENABLED = False
launch.LINE = int(sys.argv[4])

def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype).requires_grad_()

def call(engine, K, V):
    q, k, v, w = leaf(1, 300, 2, K), leaf(1, 300, 2, K), leaf(1, 300, 2, V), leaf(2, V, V)
    head, channel, beta = (-torch.rand(1, 300, 2), -torch.rand(1, 300, 2, K), torch.rand(1, 300, 2))
    reset, state = torch.zeros(1, 300, dtype=torch.bool), torch.zeros(1, 2, K, V)
    return {
        "linear": lambda: ops.linear_attention(q, k, v, head, reset=reset, state=state),
        "linear_channels": lambda: ops.linear_attention(q, k, v, channel),
        "linear_channels_reset": lambda: ops.linear_attention(q, k, v, channel, reset=reset, state=state),
        "delta": lambda: ops.delta_rule(q, k, v, beta, head, normalize=True, reset=reset, state=state),
        "delta_channels": lambda: ops.delta_rule(q, k, v, beta, channel, reset=reset),
        "m2rnn": lambda: ops.recurrent_scan(cells.M2RNN(), (w,), (k, v, beta.bfloat16()), reset=reset),
        "exponential": lambda: ops.exponential_attention(q, k, v, beta, head, reset=reset),
    }[engine]()[0]

engines = ("linear_attention", "delta_rule", "exponential_attention", "recurrent_scan")
with backend(**dict.fromkeys(engines, "triton")):
    call(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).sum().backward()
kernels = products = assembled = 0
for name, kernel in offline.compiled():
    places, kernels = {}, kernels + 1
    # A description's place is added to, or joined with, a constant that says in its upper half how wide the tile is.
    for place, constant in re.findall(r"(?:or|add)\\.[bs]64\\s+%rd\\d+, (%rd\\d+), (-?\\d{15,});", kernel.asm["ptx"]):
        places.setdefault(place, set()).add(int(constant) >> 32)
    products += len(places)
    if any(len(kinds) > 1 for kinds in places.values()):
        print(f"{name} {sys.argv[1:]}: {places}")
    count, faults = machine_code.faults(kernel.asm["cubin"])
    assembled += count
    if faults:
        print(f"{name} {sys.argv[1:]}: {faults}")
print(kernels > 1 and products > 0 and assembled > 0)
"""


CASES = [
    ("linear", 24, 100),
    ("linear", 64, 64),
    ("linear_channels", 24, 100),
    ("linear_channels_reset", 64, 32),
    ("delta", 64, 32),
    ("delta", 256, 64),
    ("delta_channels", 24, 100),
    ("exponential", 64, 32),
    ("m2rnn", 70, 64),
]


@pytest.mark.parametrize(("engine", "keys", "values"), CASES)
def test_what_is_assembled(engine: str, keys: int, values: int, alone: Callable[..., str]) -> None:
    assert alone(SCRIPT, engine, str(keys), str(values), "64") == "True"


def test_tiles_of_two_widths(alone: Callable[..., str]) -> None:
    """What the test above looks for is there where tiles are narrower than a line."""
    assert "walk" in alone(SCRIPT, "linear", "24", "100", "32")


RUNNING = """
import sys
import machine_code
machine_code.instructions = lambda _: iter(sys.argv[1:])
print(machine_code.faults(b""))
"""
PRODUCT = "HGMMA.64x32x16.F32.BF16 R56, R120, gdesc[UR4].tnspB, R56, gsb0"
ANOTHER = "HGMMA.64x32x16.F32.BF16 R88, gdesc[UR4], R88, gsb0"
ALL, ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
OF_FACTOR, OF_SUM = "LDSM.16.M88.2 R119, [R2]", "STS.128 [R3], R56"
ELSEWHERE = ("STG.E.64 [R2.64], R4", "R2UR UR4, R120", "LDSM.16.M88.2 R118, [R2]", "SHFL.BFLY PT, R3, R121, 0x1, 0x1f")


@pytest.mark.parametrize(
    ("code", "early"),
    [
        ((PRODUCT, OF_FACTOR), [OF_FACTOR]),
        ((PRODUCT, OF_SUM), [OF_SUM]),
        ((PRODUCT, "FADD R1, R57, R2"), ["FADD R1, R57, R2"]),
        ((PRODUCT, "SHFL.BFLY PT, R121, R3, 0x1, 0x1f"), ["SHFL.BFLY PT, R121, R3, 0x1, 0x1f"]),
        ((PRODUCT, *ELSEWHERE), []),
        ((PRODUCT, ALL, OF_FACTOR, OF_SUM), []),
        ((PRODUCT, ANOTHER, ALL_BUT_ONE, OF_SUM, "FADD R1, R89, R2"), ["FADD R1, R89, R2"]),
    ],
)
def test_what_touches_a_running_product(code: tuple[str, ...], early: list[str], alone: Callable[..., str]) -> None:
    products = sum(instruction.startswith("HGMMA") for instruction in code)
    assert alone(RUNNING, *code) == str((products, early))
