"""The calls that `benchmarks/gpu.py` times: ours, the same call of the best public packages, and the least it can cost.

A floor counts the bytes of each input read once and of each output and gradient written once, and the operations of
the recurrence itself (a product with the state a read and a write), without those that a chunked form adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato import ops
from ostinato.ops import cells

Function = Callable[..., Any]


@dataclass
class Side:
    """One way to compute a call: a function, and what it takes."""

    function: Function
    arguments: tuple[Any, ...]

    def forward(self) -> Any:
        with torch.no_grad():
            return self.function(*self.arguments)

    def training(self) -> None:
        outputs = self.outputs()
        torch.autograd.grad(outputs, self.wanted(), self.cotangent(outputs), allow_unused=True)

    def learn(self) -> None:
        """The gradient of a sum, as a training program asks for it."""
        torch.autograd.grad(self.outputs().sum(), self.wanted(), allow_unused=True)

    def outputs(self) -> Tensor:
        out = self.function(*self.arguments)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    def wanted(self) -> list[Tensor]:
        return [a for a in self.arguments if isinstance(a, Tensor) and a.requires_grad]

    def cotangent(self, like: Tensor) -> Tensor:
        if getattr(self, "_cotangent", None) is None:
            self._cotangent = torch.randn_like(like)
        return self._cotangent


@dataclass
class Call:
    """A call of ours, the same call of the peers, and the least that any of them must move and compute."""

    name: str
    shape: str
    ours: Side
    peers: dict[str, Callable[[], Side]] = field(default_factory=dict)
    forward_bytes: int = 0
    training_bytes: int = 0
    forward_operations: float = 0.0
    training_operations: float = 0.0


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def log_decay(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape, device="cuda") + 3).requires_grad_()


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad) for t in tensors)


B, T, H, D = 8, 4096, 16, 128


def matrix_arguments(time: int = T, batch: int = B, micro: int = 1) -> dict[str, Tensor]:
    rows = time * micro
    found = {
        "q": leaf(batch, time, H, D),
        "k": F.normalize(torch.randn(batch, rows, H, D, device="cuda"), dim=-1).to(torch.bfloat16).requires_grad_(),
        "v": leaf(batch, rows, H, D),
        "beta": torch.rand(batch, rows, H, device="cuda").requires_grad_(),
        "gate": leaf(batch, time, H, dtype=torch.float32),
        "scalar": log_decay(batch, time, H),
    }
    with torch.no_grad():
        found["q"].mul_(D**-0.5)
    return found


def matrix_floor(call: Call, reads: list[Tensor], out: Tensor, products: int) -> Call:
    """Bytes: inputs and output once; then inputs, output's gradient and every input's. Products: D×D a token."""
    call.forward_bytes = size(*reads, out)
    call.training_bytes = call.forward_bytes + 2 * size(*reads) + size(out)
    tokens = reads[0].shape[0] * reads[1].shape[1] * H
    call.forward_operations = tokens * products * 2.0 * D * D
    call.training_operations = 3 * call.forward_operations
    return call


def attention_side(a: dict[str, Tensor]) -> Side:
    q, k, v = heads_first(a["q"], a["k"], a["v"])
    return Side(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))


def allow_fla_on_hopper() -> None:
    """Its gated backward refuses some versions of Triton, where it was once wrong: here only its time counts."""
    import fla.ops.common.chunk_o as module

    module.TRITON_ABOVE_3_4_0 = False


def shape_of(batch: int, time: int) -> str:
    return f"B{batch} T{time} H{H} D{D} bf16"


def delta(micro: int = 1, batch: int = B, time: int = T) -> Call:
    a = matrix_arguments(time, batch, micro)
    arguments = (a["q"], a["k"], a["v"], a["beta"], a["scalar"])

    def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
        return ops.delta_rule(q, k, v, beta, g, normalize=True)

    def fla() -> Side:
        from fla.ops.gated_delta_product import chunk_gated_delta_product
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        allow_fla_on_hopper()

        def function(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
            if micro == 1:
                return chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0, use_qk_l2norm_in_kernel=True)
            return chunk_gated_delta_product(
                q, k, v, g, beta, num_householder=micro, scale=1.0, use_qk_l2norm_in_kernel=True
            )

        return Side(function, arguments)

    name = "delta_rule, scalar decay" + (f", {micro} Householders" if micro > 1 else "")
    call = Call(name, shape_of(batch, time), Side(ours, arguments), {"flash-linear-attention": fla})
    return matrix_floor(call, list(arguments), a["q"], 3)


def linear(kind: str, batch: int = B, time: int = T) -> Call:
    a = matrix_arguments(time, batch)
    decay = {"none": None, "scalar": a["scalar"], "vector": log_decay(batch, time, H, D)}[kind]
    arguments = (a["q"], a["k"], a["v"], decay)

    def fla() -> Side:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla

        allow_fla_on_hopper()
        function = chunk_gla if kind == "vector" else chunk_simple_gla
        return Side(lambda q, k, v, g: function(q, k, v, g, scale=1.0), arguments)

    peers: dict[str, Callable[[], Side]] = {"flash-linear-attention": fla, "torch attention": lambda: attention_side(a)}
    call = Call(
        f"linear_attention, {'no' if kind == 'none' else kind} decay",
        shape_of(batch, time),
        Side(ops.linear_attention, arguments),
        peers,
    )
    return matrix_floor(call, [t for t in arguments if t is not None], a["q"], 2)


def mlstm_exponential() -> Call:
    a = matrix_arguments()
    forget = (torch.randn(B, T, H, device="cuda") + 3).requires_grad_()
    arguments = (a["q"], a["k"], a["v"], a["gate"], forget)

    def ours(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Any:
        return ops.exponential_attention(q, k, v, i, F.logsigmoid(f))

    def kernels() -> Side:
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk")
        theirs = heads_first(*arguments)
        return Side(lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f, chunk_size=128), theirs)

    peers: dict[str, Callable[[], Side]] = {"mlstm-kernels": kernels, "torch attention": lambda: attention_side(a)}
    call = Call("exponential_attention (mLSTM)", shape_of(B, T), Side(ours, arguments), peers)
    return matrix_floor(call, list(arguments), a["q"], 2)


def mlstm_sigmoid() -> Call:
    a = matrix_arguments()
    forget = (torch.randn(B, T, H, device="cuda") + 3).requires_grad_()
    arguments = (a["q"], a["k"], a["v"], a["gate"], forget)

    def ours(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Any:
        return ops.linear_attention(q, k * torch.sigmoid(i).unsqueeze(-1).to(k.dtype), v, F.logsigmoid(f))

    def kernels() -> Side:
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk_siging")
        theirs = heads_first(*arguments)
        return Side(lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f, chunk_size=128, normalize=False), theirs)

    peers: dict[str, Callable[[], Side]] = {"mlstm-kernels": kernels, "torch attention": lambda: attention_side(a)}
    call = Call("linear_attention with a sigmoid input gate (mLSTM)", shape_of(B, T), Side(ours, arguments), peers)
    return matrix_floor(call, list(arguments), a["q"], 2)


def diagonal() -> Call:
    batch, channels, length = 8, 4096, 8192
    a = torch.rand(batch, length, channels, device="cuda").requires_grad_()
    b = leaf(batch, length, channels, dtype=torch.float32)

    def scan() -> Side:
        from accelerated_scan.scalar import scan

        turned = tuple(t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (a, b))
        return Side(scan, turned)

    call = Call("diagonal_scan", "B8 C4096 T8192 float32", Side(ops.diagonal_scan, (a, b)), {"accelerated-scan": scan})
    call.forward_bytes, call.training_bytes = size(a, b, b), 8 * size(b)
    return call


def convolution() -> Call:
    batch, length, channels, width = 8, 4096, 2048, 4
    x, taps = leaf(batch, length, channels), leaf(width, channels)

    def fla() -> Side:
        from fla.modules.causal_conv1d import causal_conv1d

        return Side(causal_conv1d, (x, taps.detach().T.contiguous().requires_grad_()))

    peers = {"flash-linear-attention": fla}
    call = Call("short_convolution", "B8 T4096 C2048, 4 taps, bf16", Side(ops.short_convolution, (x, taps)), peers)
    call.forward_bytes, call.training_bytes = 2 * size(x), 5 * size(x)
    return call


def headwise(name: str) -> Call:
    batch, length, heads, dim = 16, 1024, 12, 64
    cell = {"lstm": cells.LSTM, "slstm": cells.SLSTM, "gru": cells.GRU, "elman": cells.Elman}[name]()
    gates = cell.gates
    weight = leaf(gates, heads, dim, dim, scale=dim**-0.5)
    x = leaf(batch, length, gates, heads, dim)
    weights = (weight,) if name != "gru" else (weight, leaf(heads, dim))

    def ours(x: Tensor, *weights: Tensor) -> Any:
        return ops.recurrent_scan(cell, weights, x)

    def flash() -> Side:
        from flashrnn import flashrnn

        bias = leaf(gates, heads, dim)

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return flashrnn(x, weight, bias, function=name, backend="triton_fused", dtype="bfloat16")[0][0]

        return Side(function, (x, weight, bias))

    peers = {"flashrnn (triton_fused)": flash} if name == "slstm" else {}
    call = Call(f"recurrent_scan, {name}", "B16 T1024 12×64 bf16", Side(ours, (x, *weights)), peers)
    out = x.numel() // gates * 2
    call.forward_bytes, call.training_bytes = size(x) + out, 3 * size(x) + 2 * out
    call.forward_operations = 2.0 * x.numel() * dim
    call.training_operations = 3 * call.forward_operations
    return call


def m2rnn() -> Call:
    batch, length, heads, key_dim, value_dim = 8, 2048, 84, 64, 16
    cell = cells.M2RNN()
    k = leaf(batch, length, heads, key_dim, scale=key_dim**-0.5)
    v = leaf(batch, length, heads, value_dim)
    forget = torch.rand(batch, length, heads, device="cuda").to(torch.bfloat16).requires_grad_()
    weight = leaf(heads, value_dim, value_dim, scale=value_dim**-0.5)

    def ours(k: Tensor, v: Tensor, forget: Tensor, weight: Tensor) -> Any:
        return ops.recurrent_scan(cell, (weight,), (k, v, forget))

    call = Call("recurrent_scan, m2rnn", "B8 T2048 84 heads K64 V16 bf16", Side(ours, (k, v, forget, weight)))
    states = 2 * k.numel() * value_dim
    call.forward_bytes = size(k, v, forget) + states
    call.training_bytes = 3 * size(k, v, forget) + 2 * states
    call.forward_operations = batch * length * heads * (2.0 * key_dim * value_dim * (value_dim + 2))
    call.training_operations = 3 * call.forward_operations
    return call


def newton(name: str) -> Call:
    batch, length, width = 8, 4096, 512
    mixer = ostinato.mixer(name, width, iterations=3).cuda()
    x = leaf(batch, length, width, dtype=torch.float32)

    def peer() -> Side:
        import pararnn

        cell = pararnn.ParaGRU if name == "para_gru" else pararnn.ParaLSTM
        module = pararnn.ParaRNN(cell(width, width), config=pararnn.NewtonConfig(max_iters=3)).cuda()
        return Side(lambda x, *_: module(x), (x, *module.parameters()))

    ours = Side(lambda x, *_: mixer(x), (x, *mixer.parameters()))
    gates = 3 if name == "para_gru" else 4
    call = Call(
        f"newton_scan, {name} with its input product, 3 iterations",
        "B8 T4096 d512 float32",
        ours,
        {"pararnn-torch": peer},
    )
    call.forward_bytes = (2 + 2 * gates) * size(x)
    call.training_bytes = (4 + 6 * gates) * size(x)
    call.forward_operations = 2.0 * batch * length * width * gates * width * 12  # float32 in full precision
    call.training_operations = 3 * call.forward_operations
    return call


CALLS: dict[str, Callable[[], Call]] = {
    "delta": delta,
    "delta2": lambda: delta(2),
    "delta_long": lambda: delta(batch=1, time=32768),
    "linear_long": lambda: linear("scalar", batch=1, time=32768),
    "linear": lambda: linear("none"),
    "linear_scalar": lambda: linear("scalar"),
    "linear_vector": lambda: linear("vector"),
    "mlstm": mlstm_exponential,
    "mlstm_sigmoid": mlstm_sigmoid,
    "diagonal": diagonal,
    "short_convolution": convolution,
    "slstm": lambda: headwise("slstm"),
    "lstm": lambda: headwise("lstm"),
    "gru": lambda: headwise("gru"),
    "elman": lambda: headwise("elman"),
    "m2rnn": m2rnn,
    "para_gru": lambda: newton("para_gru"),
    "para_lstm": lambda: newton("para_lstm"),
}
