"""Hopper's machine code of a kernel: are registers of a matrix product left alone until it is waited for?

A product (HGMMA) runs beside the instructions after it. Until WARPGROUP.DEPBAR has waited for it, nothing may write to
the registers that its left factor is in, or touch those of its sum. Assemblers before CUDA 13.3 have been seen to do so
(triton-lang/triton, pull request 11781). Instructions are looked at in the order in which they lie, not along branches.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator

from triton import knobs

PRODUCT = re.compile(r"HGMMA\.\d+x(\d+)x\d+\S* R(\d+), (?:R(\d+)|gdesc)")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")
REGISTER = re.compile(r"(?<!U)\bR(\d+)(\.64)?")
NO_RESULT = ("ST", "RED", "LDGSTS", "BAR", "BRA", "MEMBAR", "UTMA", "SYNCS")


def instructions(cubin: bytes) -> Iterator[str]:
    """Of all functions, without predicates and addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    for line in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text):
        yield line[1]


def width(operation: str) -> int:
    """Registers that an operation writes, or stores."""
    if matrices := re.search(r"88\.([24])", operation):
        return int(matrices[1])
    if ".128" in operation:
        return 4
    return 2 if ".64" in operation or "WIDE" in operation or operation.startswith(("CS2R", "DADD", "DFMA")) else 1


def registers(instruction: str) -> tuple[set[int], set[int]]:
    """Those that it reads, and those that it writes."""
    operation, _, rest = instruction.partition(" ")
    parts = rest.split(",")
    result = parts[1] if re.match(r"U?P[T\d]", parts[0]) and len(parts) > 1 else parts[0]  # a predicate may be first
    if operation.startswith(NO_RESULT) or not re.match(r" ?R\d", result):
        result = None
    reads = {
        int(r[1]) + more for p in parts if p is not result for r in REGISTER.finditer(p) for more in (0, bool(r[2]))
    }
    if result is None and operation.startswith("ST") and (value := re.match(r" ?R(\d+)", parts[-1])):
        reads |= {int(value[1]) + i for i in range(width(operation))}
    first = None if result is None else re.search(r"\d+", result)
    return reads, set() if first is None else {int(first[0]) + i for i in range(width(operation))}


def faults(cubin: bytes) -> tuple[int, list[str]]:
    """How many products there are, and the instructions that come too early."""
    count, found = 0, []
    running: list[tuple[set[int], set[int]]] = []  # groups of products: left factors, sums
    left, total = set[int](), set[int]()
    for instruction in instructions(cubin):
        if product := PRODUCT.search(instruction):
            count += 1
            total |= {int(product[2]) + i for i in range(int(product[1]) // 2)}
            if product[3]:
                left |= {int(product[3]) + i for i in range(4)}
            if "gsb0" in instruction:
                running.append((left, total))
                left, total = set(), set()
        elif wait := WAIT.search(instruction):
            running = running[len(running) - int(wait[1], 16) :]
        elif running or total:
            reads, writes = registers(instruction)
            factors = left.union(*(group[0] for group in running))
            sums = total.union(*(group[1] for group in running))
            if writes & (factors | sums) or reads & sums:
                found.append(instruction)
    return count, found
