"""The first call rehearsed: what it computes is the same, and its kernels are compiled before it launches one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ostinato import backend, mixer, ops
from ostinato.ops import cells

pytest.importorskip("triton")
from ostinato.ops.kernels.triton import ahead

OFFLINE = """
import sys, torch, offline
offline.start()
from ostinato.ops.kernels.triton import ahead, diagonal_scan
ahead.ENABLED = sys.argv[1] == "ahead"
a, b = torch.rand(2, 40, 8).requires_grad_(), torch.rand(2, 40, 8).requires_grad_()
for _ in range(2):
    diagonal_scan.run(a, b, None)[0].sum().backward()
print("".join(kind[1] for kind, _ in offline.events))
"""


def test_all_kernels_are_loaded_before_the_first_launch(alone: Callable[..., str]) -> None:
    """Whether kernels were loaded (o) or launched (a), in order."""
    together = alone(OFFLINE, "ahead")
    loaded = together.count("o")
    assert loaded >= 2
    assert together == "o" * loaded + "a" * together.count("a")
    one_by_one = alone(OFFLINE, "as ever")
    assert one_by_one.count("o") == loaded and one_by_one.count("a") == together.count("a")
    assert one_by_one.startswith("oa")


FIRST = """
import torch
from ostinato import ops
q, k, v = (torch.randn(2, 130, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
gate = torch.randn(2, 130, 2, device="cuda", requires_grad=True)
{call}[0].sum().backward()
print(all(bool(x.grad.isfinite().all() and x.grad.any()) for x in (q, k, v)))
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what autograd's thread knows of a card shows on a card")
@pytest.mark.parametrize(
    "call", ["ops.exponential_attention(q, k, v, gate, -gate.exp())", "ops.linear_attention(q, k, v)"]
)
def test_the_first_backward_pass_of_a_process(call: str, alone: Callable[..., str]) -> None:
    """Its thread has launched nothing yet, and its kernels were loaded by others."""
    assert alone(FIRST.format(call=call)) == "True"


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


PARA_GRU = mixer("para_gru", 16, iterations=2)
CALLS = {
    "diagonal_scan": lambda: (ops.diagonal_scan, (leaf(1, 5, 4), leaf(1, 5, 4))),
    "linear_attention": lambda: (ops.linear_attention, (leaf(1, 5, 1, 16), leaf(1, 5, 1, 16), leaf(1, 5, 1, 16))),
    "delta_rule": lambda: (ops.delta_rule, (leaf(1, 5, 1, 16), leaf(1, 5, 1, 16), leaf(1, 5, 1, 16))),
    "exponential_attention": lambda: (
        ops.exponential_attention,
        (leaf(1, 5, 1, 16), leaf(1, 5, 1, 16), leaf(1, 5, 1, 16), leaf(1, 5, 1), leaf(1, 5, 1)),
    ),
    "recurrent_scan": lambda: (
        lambda weight, x: ops.recurrent_scan(cells.LSTM(), (weight,), x),
        (leaf(4, 1, 16, 16), leaf(1, 5, 4, 1, 16)),
    ),
    "newton_scan": lambda: (lambda x, *_: PARA_GRU(x), (leaf(1, 5, 16), *PARA_GRU.parameters())),
    "rms_norm": lambda: (lambda x, weight: (ops.rms_norm(x, weight),), (leaf(1, 5, 16), leaf(16))),
    "swiglu": lambda: (lambda a, b: (ops.swiglu(a, b),), (leaf(1, 5, 16), leaf(1, 5, 16))),
    "short_convolution": lambda: (ops.short_convolution, (leaf(1, 5, 4), leaf(3, 4))),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_rehearsal_goes_through_and_changes_nothing(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = CALLS[name]()
    PARA_GRU.to(device)  # in place: its parameters stay the same objects
    arguments = tuple(
        argument if isinstance(argument, nn.Parameter) else argument.detach().to(device).requires_grad_()
        for argument in arguments
    )
    rehearsed = []

    def rehearse(operator: str, _: object, call: object) -> None:
        with torch.no_grad():
            call()  # type: ignore[operator]
        rehearsed.append(operator)

    def solve() -> list[torch.Tensor]:
        with backend(**{name: "triton"}):
            outputs = function(*arguments)[0]
        return [outputs.detach(), *torch.autograd.grad(outputs.sum(), arguments)]

    expected = solve()
    monkeypatch.setattr(ahead, "ENABLED", True)
    monkeypatch.setattr(ahead, "rehearse", rehearse)
    assert all(map(torch.equal, solve(), expected))
    assert rehearsed


def test_the_same_kind_is_rehearsed_once_and_failures_are_not_raised() -> None:
    pytest.importorskip("triton.runtime._async_compile")
    calls = []

    def fail() -> None:
        calls.append(ahead._rehearsing.get())
        ahead.rehearse("inner", (), lambda: calls.append("nested"))
        raise ValueError

    x = torch.zeros(2, 5, 3)
    ahead.rehearse("a test", (x, None, 2), fail)
    ahead.rehearse("a test", (x + 1, None, 2), fail)
    assert calls == [True] and not ahead._rehearsing.get()
    ahead.rehearse("a test", (x.half(), None, 2), fail)
    ahead.rehearse("a test", (x, None, 3), fail)
    assert len(calls) == 3
