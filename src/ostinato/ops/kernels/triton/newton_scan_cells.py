"""ParaGRU and ParaLSTM in Triton: a step, its Jacobian and its pull-back, on tiles of any shape.

Equations and names are those of `ostinato.ops.cells.channelwise`. The exponentials are powers of two of
arguments that were scaled beforehand, so that the scaling is not part of a chain of dependent steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x of numbers from 1 to infinity, to the last bit but one: no range has to be minded."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def gate(scaled):
    """σ(x), given −x log₂e."""
    return reciprocal(1.0 + tl.exp2(scaled))


@triton.jit
def series(x):
    """tanh x near zero, to x⁹: its other form, 2σ(2x) − 1, cancels there. Use it where x² < 1/16."""
    s = x * x
    return x * (1 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488))))


@triton.jit
def squash(x):
    """tanh x."""
    far = 2.0 * reciprocal(1.0 + tl.exp2(x * (-2 * LOG2E))) - 1.0
    return tl.where(x * x < 0.0625, series(x), far)


@triton.jit
def gru_step(h, xz, xr, xn, az, ar, an):
    """z, r, n and h'. `xz`, `xr`, `az`, `ar` are scaled by −log₂e.

    Arranged so that little stands between h and h': exponential and reciprocal of r, then those of n.
    """
    z = gate(tl.fma(az, h, xz))
    r = gate(tl.fma(ar, h, xr))
    nh = an * h
    x = tl.fma(nh, r, xn)
    half = reciprocal(1.0 + tl.exp2(tl.fma(nh * (-2 * LOG2E), r, xn * (-2 * LOG2E))))
    near, small = series(x), x * x < 0.0625
    n = tl.where(small, near, 2.0 * half - 1.0)
    # (1 − z) h + z (2 half − 1)
    stays = h - z * h
    return z, r, n, tl.where(small, tl.fma(z, near, stays), tl.fma(2.0 * z, half, stays - z))


@triton.jit
def lstm_step(c, h, xf, xz, xo, af, az, ao, pf, po):
    """f, z, o, c', tanh c' and h'. `xf`, `xo`, `af`, `ao`, `pf`, `po` are scaled by −log₂e."""
    f = gate(tl.fma(af, h, tl.fma(pf, c, xf)))
    x = tl.fma(az, h, xz)
    half = reciprocal(1.0 + tl.exp2(tl.fma(az * (-2 * LOG2E), h, xz * (-2 * LOG2E))))
    near, small = series(x), x * x < 0.0625
    z = tl.where(small, near, 2.0 * half - 1.0)
    cell = tl.fma(f, tl.where(small, c - near, (c + 1.0) - 2.0 * half), z)
    o = gate(tl.fma(po, cell, tl.fma(ao, h, xo)))
    squashed = squash(cell)
    return f, z, o, cell, squashed, o * squashed


@triton.jit
def gru_pull(h, z, r, n, az, ar, an):
    """∂h'/∂(pre-activation of z, r, n), and ∂h'/∂h. Weights are as they are, not scaled."""
    dz = (n - h) * z * (1 - z)
    dn = z * (1 - n * n)
    dr = dn * an * h * r * (1 - r)
    return dz, dr, dn, tl.fma(dz, az, 1 - z) + tl.fma(dr, ar, dn * an * r)


@triton.jit
def lstm_pull(c, f, z, o, squashed, pf, po, af, az, ao):
    """The factors of the pull-back of a step; weights are as they are.

    With μ_c, μ_h what reaches c' and h': e = μ_c + μ_h through, then ∂f = e df, ∂z = e dz, ∂o = μ_h do (before
    the activations), ∂c = e keep, ∂h = e turn + μ_h do a_o.
    """
    do = squashed * o * (1 - o)
    through = tl.fma(do, po, o * (1 - squashed * squashed))
    df = (c - z) * f * (1 - f)
    dz = (1 - f) * (1 - z * z)
    return through, df, dz, do, tl.fma(df, pf, f), tl.fma(df, af, dz * az), do * ao
