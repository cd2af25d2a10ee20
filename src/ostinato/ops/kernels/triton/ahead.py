"""The kernels of a first call compiled side by side.

A call launches its kernels one after the other, and each is compiled when it is launched for the first time: seconds
that add up. So the first call of a kind is rehearsed: made once without launching anything, backward pass included,
while threads compile and load what it asks for. What the rehearsal did not foresee is compiled at its launch, as ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ostinato.ops.kernels.triton.launch import INTERPRETED

ENABLED = not INTERPRETED and os.environ.get("OSTINATO_COMPILE_AHEAD", "1") != "0"
"""Whether first calls are rehearsed; `OSTINATO_COMPILE_AHEAD=0` turns it off."""

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)
_seen: set[Hashable] = set()


def kind(arguments: tuple[Any, ...]) -> Hashable:
    """What tells calls with other kernels apart: types, dimensions, roughly the numbers of rows and steps."""
    found: list[Hashable] = []
    for a in arguments:
        if isinstance(a, Tensor):
            found.append((a.dtype, a.shape[2:], *(size.bit_length() for size in a.shape[:2])))
        else:
            found.append(kind(tuple(a)) if isinstance(a, (list, tuple)) else a)
    return tuple(found)


def rehearse(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> None:
    """Compile what `call` launches, if it is the first of its kind for the operator `name`."""
    key = (name, kind(arguments), torch.is_grad_enabled())
    if key in _seen or _rehearsing.get():
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # a graph would record what the rehearsal does beside its kernels
    _seen.add(key)
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # an older Triton
        return
    _watch()
    workers = min(16, os.cpu_count() or 1)  # no call has more kernels than that
    with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(_Loading(pool), ignore_errors=True):
        _begin(pool)
        token = _rehearsing.set(True)
        try:
            with torch.no_grad():
                call()
        except Exception:  # the performance will say what is wrong
            pass
        finally:
            _rehearsing.reset(token)


def _begin(pool: ThreadPoolExecutor) -> None:
    """What every compilation waits for, side by side: the compiler's hash (of 400 MB) and a module in C."""
    from triton.runtime import cache, driver

    hashed = pool.submit(getattr(cache, "triton_key", lambda: None))  # Triton keeps it, once it is known
    with suppress(RuntimeError):  # no card: the performance will say so
        driver.active.get_current_target()
    hashed.result()


class _Loading:
    """An executor that loads what it has compiled: the launcher is built, the code is on this thread's device."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        def work() -> Any:
            if self.device is not None:
                torch.cuda.set_device(self.device)  # a thread begins with the first device
            kernel = compile_kernel()
            kernel._init_handles()
            return kernel

        return self.pool.submit(work)


def _watch() -> None:
    """Let the kernels of this package ask, when they are launched, whether this is a rehearsal."""
    from triton.runtime.jit import JITFunction

    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(__package__ + "."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction) and "run" not in vars(kernel):
                    kernel.run = _attentive(kernel.run)


def _attentive(run: Callable[..., Any]) -> Callable[..., Any]:
    def attentive(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(*arguments, grid=grid, warmup=warmup or _rehearsing.get(), **options)

    return attentive
