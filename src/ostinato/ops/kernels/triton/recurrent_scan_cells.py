"""The steps of the head-wise cells, as Triton functions on tiles: forward, and backward from the pre-activations.

Every function works element by element on tiles (dim, batch) in float32. The kernels that call them do the
products with the recurrent weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.launch import INTERPRETED

# Numbers for the cells inside kernels.
ELMAN = tl.constexpr(0)
LSTM = tl.constexpr(1)
GRU = tl.constexpr(2)
SLSTM = tl.constexpr(3)


if INTERPRETED:

    @triton.jit
    def power_of_2(x):
        """2^x."""
        return tl.exp2(x)

    @triton.jit
    def reciprocal(x):
        """1/x."""
        return 1 / x

    @triton.jit
    def to_half(x):
        """float16, no larger than its largest number."""
        return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)

else:
    # The card's own instructions, without the care for denormal numbers that Triton's functions take: a third of
    # the instructions of a step, and all of them on its critical path. Errors of 2 units in the last place.

    @triton.jit
    def power_of_2(x):
        """2^x; 0 where that is denormal."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def reciprocal(x):
        """1/x; 0 where that is denormal."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def to_half(x):
        """float16, no larger than its largest number: two by one instruction."""
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def exponential(x):
    """e^x."""
    return power_of_2(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1/(1 + e^{−x}); e^{−x} may be infinite, and the result is then 0."""
    return reciprocal(1 + power_of_2(x * -1.4426950408889634))


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh x = 2σ(2x) − 1; PRECISE: near 0, where that cancels, by its series."""
    value = 2 * reciprocal(1 + power_of_2(x * -2.8853900817779268)) - 1
    if PRECISE:
        s = x * x
        series = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        value = tl.where(s < 0.09, series, value)
    return value


@triton.jit
def log_sigmoid(x, PRECISE: tl.constexpr):
    """log σ(x) = min(x, 0) − log(1 + e^{−|x|}); PRECISE: the logarithm near 1 by its series."""
    y = exponential(-tl.abs(x))
    tail = tl.log(1 + y)
    if PRECISE:
        tail = tl.where(y < 0.02, y * (1 + y * (-0.5 + y * (1 / 3 - 0.25 * y))), tail)
    return tl.minimum(x, 0.0) - tail


@triton.jit
def lstm_step(i, f, g, o, cell, PRECISE: tl.constexpr):
    """(h, c) from the pre-activations and the cell that enters."""
    cell = sigmoid(f) * cell + sigmoid(i) * tanh(g, PRECISE)
    return sigmoid(o) * tanh(cell, PRECISE), cell


@triton.jit
def lstm_factors(i, f, g, o, old, PRECISE: tl.constexpr):
    """What `lstm_adjoint` needs and no gradient enters: ∂h/∂c, ∂c by i, f, g, ∂h by o, and f."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g, PRECISE), sigmoid(o)
    squashed = tanh(f * old + i * g, PRECISE)
    by_i, by_f, by_g = g * (i * (1 - i)), old * (f * (1 - f)), i * (1 - g * g)
    return o * (1 - squashed * squashed), by_i, by_f, by_g, squashed * (o * (1 - o)), f


@triton.jit
def lstm_adjoint(factors, dh, dc):
    """Gradients of the pre-activations i, f, g, o, and of the cell that enters."""
    through, by_i, by_f, by_g, by_o, f = factors
    dc += dh * through
    return dc * by_i, dc * by_f, dc * by_g, dh * by_o, dc * f


@triton.jit
def gru_step(r, z, candidate, n, hidden, PRECISE: tl.constexpr):
    """h from r, z (pre-activations), the candidate's recurrent part (with its bias) and its input part."""
    z = sigmoid(z)
    n = tanh(n + sigmoid(r) * candidate, PRECISE)
    return n + z * (hidden - n)


@triton.jit
def gru_factors(r, z, candidate, n, old, PRECISE: tl.constexpr):
    """What `gru_adjoint` needs and no gradient enters: ∂h by r, z, n, and r, z."""
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n + r * candidate, PRECISE)
    by_n = (1 - z) * (1 - n * n)
    return by_n * (candidate * (r * (1 - r))), (old - n) * (z * (1 - z)), by_n, by_n * r, z


@triton.jit
def gru_adjoint(factors, dh):
    """Gradients of r, z, of the candidate's input part and its recurrent part, and directly of the old h."""
    by_r, by_z, by_n, by_candidate, z = factors
    return dh * by_r, dh * by_z, dh * by_n, dh * by_candidate, dh * z


@triton.jit
def slstm_step(i, f, z, o, cell, normalizer, maximum, PRECISE: tl.constexpr):
    """(h, c, n, m) from the pre-activations and the state that enters."""
    carried = log_sigmoid(f, PRECISE) + maximum
    maximum = tl.where(normalizer == 0, i, tl.maximum(i, carried))
    write = exponential(i - maximum)
    keep = exponential(tl.minimum(carried - maximum, 0.0))
    cell = keep * cell + write * tanh(z, PRECISE)
    normalizer = tl.maximum(write + keep * normalizer, 1.0)
    return sigmoid(o) * cell * reciprocal(normalizer), cell, normalizer, maximum


@triton.jit
def slstm_factors(i, f, z, o, old_c, old_n, old_m, PRECISE: tl.constexpr):
    """What `slstm_adjoint` needs and no gradient enters.

    A tie of the two under the maximum shares the gradient; the floor under n, and the ceiling of 0 over the
    exponent of f', pass it where they do not bind, and at equality: as automatic differentiation has it.
    """
    carried = log_sigmoid(f, PRECISE) + old_m
    fresh = old_n == 0
    maximum = tl.where(fresh, i, tl.maximum(i, carried))
    write = exponential(i - maximum)
    keep = exponential(tl.minimum(carried - maximum, 0.0))
    z, o = tanh(z, PRECISE), sigmoid(o)
    raw = write + keep * old_n
    inverse = reciprocal(tl.maximum(raw, 1.0))
    ratio = (keep * old_c + write * z) * inverse
    through = o * inverse
    passes = tl.where(raw >= 1, 1.0, 0.0)
    share = tl.where(fresh | (i > carried), 1.0, tl.where(i == carried, 0.5, 0.0))
    moving = tl.where(carried > maximum, 0.0, keep)
    return (
        through,
        through * ratio,
        passes,
        (write, write * z),
        (moving * old_n, moving * old_c),
        (share, sigmoid(-f)),
        write * (1 - z * z),
        ratio * (o * (1 - o)),
        keep,
    )


@triton.jit
def slstm_adjoint(factors, dh, dc, dn, dm):
    """Gradients of i, f, z, o and of the c, n, m that enter."""
    through, drop, passes, by_write, by_keep, shares, by_z, by_o, keep = factors
    dc += dh * through
    dn = (dn - dh * drop) * passes
    written = dn * by_write[0] + dc * by_write[1]
    kept = dn * by_keep[0] + dc * by_keep[1]
    dm -= written + kept
    from_input = shares[0] * dm
    carried = kept + (dm - from_input)
    return written + from_input, carried * shares[1], dc * by_z, dh * by_o, dc * keep, dn * keep, carried
