"""The matrix mixers against other people's code: the same weights, the same outputs.

Whole layers of Transformers; the plain recurrences of mlstm-kernels and of flash-linear-attention, whose
files are loaded by their path because the package itself wants a GPU compiler. What is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ostinato
from ostinato.mixers.base import Mixer
from ostinato.mixers.parts import ShortConvolution, l2_normalize
from ostinato.ops.exponential_attention import exponential_attention
from ostinato.ops.linear_attention import linear_attention

D_MODEL, HEADS, BATCH, TIME = 32, 4, 2, 37


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What other packages warn of is not our business."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def transformers(model: str, name: str) -> Any:
    """A module of a model in Transformers, or a skip where it does not have it."""
    pytest.importorskip("transformers")
    return pytest.importorskip(f"transformers.models.{model}.{name}_{model}")


def flash_linear_attention(path: str) -> ModuleType:
    """A plain-PyTorch file of flash-linear-attention, loaded without its package."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed")
    pytest.importorskip("einops")
    file = Path(next(iter(found.submodule_search_locations))) / "ops" / path
    if not file.exists():
        pytest.skip(f"this version of flash-linear-attention has no ops/{path}")
    spec = importlib.util.spec_from_file_location("peer", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shaken(module: nn.Module, size: float = 0.3) -> nn.Module:
    """Every parameter moved at random, so that no initial zero or one hides a difference."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def copy(target: nn.Parameter | None, source: Tensor) -> None:
    assert target is not None
    with torch.no_grad():
        target.copy_(source.reshape(target.shape))


def copy_convolution(ours: ShortConvolution | None, theirs: nn.Conv1d) -> None:
    """Theirs has the newest tap last, (channels, 1, width); ours has it first, (width, channels)."""
    assert ours is not None
    copy(ours.weight, theirs.weight[:, 0].T.flip(0))
    if theirs.bias is not None:
        copy(ours.bias, theirs.bias)


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert wanted.abs().max() > 1e-3, "an output of zeros compares nothing"
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance, f"differs by {error:.1e} of the largest output"


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, TIME, D_MODEL)))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_that_of_transformers(groups: int) -> None:
    config = transformers("mamba2", "configuration").Mamba2Config(
        hidden_size=D_MODEL, num_heads=HEADS, head_dim=16, state_size=8, n_groups=groups, chunk_size=16,
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = shaken(transformers("mamba2", "modeling").Mamba2Mixer(config, layer_idx=0)).eval()
    ours: Any = ostinato.mixer("mamba2", D_MODEL, heads=HEADS, state_dim=8, groups=groups)
    copy(ours.to_input.weight, theirs.in_proj.weight)
    copy_convolution(ours.convolution, theirs.conv1d)
    copy(ours.log_rate, theirs.A_log)
    copy(ours.step_bias, theirs.dt_bias)
    copy(ours.skip, theirs.D)
    copy(ours.norm_weight, theirs.norm.weight)
    copy(ours.to_output.weight, theirs.out_proj.weight)
    x = inputs()
    assert_same(ours(x)[0], theirs(x))


def copy_delta(ours: Any, theirs: Any) -> None:
    """The parts that have the same name in Transformers' delta layers with separate projections."""
    copy(ours.project.to_queries.weight, theirs.q_proj.weight)
    copy(ours.project.to_keys.weight, theirs.k_proj.weight)
    copy(ours.project.to_values.weight, theirs.v_proj.weight)
    copy_convolution(ours.project.convolution, theirs.conv1d)
    copy(ours.to_beta.weight, theirs.b_proj.weight)
    copy(ours.norm.norm.weight, theirs.o_norm.weight)
    copy(ours.to_output.weight, theirs.o_proj.weight)


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True])
def test_gated_delta_net_is_that_of_olmo_hybrid(negative: bool) -> None:
    config = transformers("olmo_hybrid", "configuration").OlmoHybridConfig(
        hidden_size=D_MODEL, num_attention_heads=HEADS, num_hidden_layers=4, linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS, linear_key_head_dim=6, linear_value_head_dim=12,
        linear_allow_neg_eigval=negative,
    )  # fmt: skip
    theirs = shaken(transformers("olmo_hybrid", "modeling").OlmoHybridGatedDeltaNet(config, layer_idx=0)).eval()
    ours: Any = ostinato.mixer("gated_delta_net", D_MODEL, heads=HEADS, negative_eigenvalues=negative)
    copy_delta(ours, theirs)
    copy(ours.to_steps.weight, theirs.a_proj.weight)
    copy(ours.log_rate, theirs.A_log)
    copy(ours.step_bias, theirs.dt_bias)
    copy(ours.to_gate.weight, theirs.g_proj.weight)
    x = inputs()
    assert_same(ours(x)[0], theirs(x))


@torch.no_grad()
def test_gated_delta_net_is_that_of_qwen3_next() -> None:
    config = transformers("qwen3_next", "configuration").Qwen3NextConfig(
        hidden_size=D_MODEL, num_hidden_layers=4, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
        linear_key_head_dim=6, linear_value_head_dim=12, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = shaken(transformers("qwen3_next", "modeling").Qwen3NextGatedDeltaNet(config, layer_idx=0)).eval()
    ours: Any = ostinato.mixer("gated_delta_net", D_MODEL, heads=HEADS)
    # Theirs is laid out by head, each with its q, k, v and gate, and with its β and decay.
    fused = theirs.in_proj_qkvz.weight.unflatten(0, (HEADS, -1)).split([6, 6, 12, 12], dim=1)
    project = ours.project
    for linear, part in zip((project.to_queries, project.to_keys, project.to_values, ours.to_gate), fused, strict=True):
        copy(linear.weight, part)
    rate = theirs.in_proj_ba.weight.unflatten(0, (HEADS, 2))
    copy(ours.to_beta.weight, rate[:, 0])
    copy(ours.to_steps.weight, rate[:, 1])
    copy_convolution(project.convolution, theirs.conv1d)
    copy(ours.log_rate, theirs.A_log)
    copy(ours.step_bias, theirs.dt_bias)
    copy(ours.norm.norm.weight, theirs.norm.weight)
    copy(ours.to_output.weight, theirs.out_proj.weight)
    x = inputs()
    assert_same(ours(x)[0], theirs(x))


@torch.no_grad()
def test_gated_delta_net_has_the_recurrence_of_qwen3_next_in_both_its_forms() -> None:
    peer = transformers("qwen3_next", "modeling")
    ours: Any = shaken(ostinato.mixer("gated_delta_net", D_MODEL, heads=HEADS, output_gate=False))
    x, start = inputs(), ours.initial_state(BATCH)
    start = start._replace(memory=torch.randn_like(start.memory))
    queries, keys, values, _ = ours.project(x, start.window, None)
    arguments = (F.silu(queries), F.silu(keys), F.silu(values))
    y, last = ours(x, start)
    for form in (peer.torch_chunk_gated_delta_rule, peer.torch_recurrent_gated_delta_rule):
        outputs, state = form(
            *arguments, g=ours.log_decay(x), beta=ours.beta(x), initial_state=start.memory, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        assert_same(y, ours.read_out(outputs, x))
        assert_same(last.memory, state)


@torch.no_grad()
def test_kimi_delta_attention_is_that_of_transformers() -> None:
    config = transformers("kimi_linear", "configuration").KimiLinearConfig(
        hidden_size=D_MODEL, num_hidden_layers=4, linear_head_dim=8, linear_num_heads=HEADS,
    )  # fmt: skip
    theirs = shaken(
        transformers("kimi_linear", "modeling").KimiLinearDeltaAttention(config, layer_idx=0).apply(_defined)
    ).eval()
    ours: Any = ostinato.mixer("kimi_delta_attention", D_MODEL, heads=HEADS)
    copy_delta(ours, theirs)
    copy(ours.to_steps[0].weight, theirs.forget_gate.f_a_proj.weight)
    copy(ours.to_steps[1].weight, theirs.forget_gate.f_b_proj.weight)
    copy(ours.log_rate, theirs.forget_gate.A_log)
    copy(ours.step_bias, theirs.forget_gate.dt_bias)
    copy(ours.to_gate[0].weight, theirs.g_a_proj.weight)
    copy(ours.to_gate[1].weight, theirs.g_b_proj.weight)
    nn.init.zeros_(ours.to_gate[1].bias)  # Transformers leaves out this bias, which the authors' code has.
    x = inputs()
    assert_same(ours(x)[0], theirs(x))


def _defined(module: nn.Module) -> None:
    """Values for parameters that Transformers leaves to a later initialisation."""
    for name, parameter in module.named_parameters(recurse=False):
        if name in ("A_log", "dt_bias"):
            nn.init.normal_(parameter)


@torch.no_grad()
def test_mlstm_is_that_of_transformers() -> None:
    peer = transformers("xlstm", "modeling")
    config = transformers("xlstm", "configuration").xLSTMConfig(
        hidden_size=D_MODEL, num_heads=HEADS, num_hidden_layers=1, chunk_size=16, autocast_kernel_dtype="float32",
        mode="inference",
    )  # fmt: skip
    if peer.external_xlstm:
        pytest.skip("Transformers takes the layer from the xlstm package here")
    theirs = shaken(peer.xLSTMLayer(config)).eval()
    ours: Any = ostinato.mixer("mlstm", D_MODEL, heads=HEADS)
    names = ("project.to_queries", "project.to_keys", "project.to_values", "to_gate", "to_output")
    for name, source in zip(names, (theirs.q, theirs.k, theirs.v, theirs.ogate_preact, theirs.out_proj), strict=True):
        copy(ours.get_submodule(name).weight, source.weight)
    for name, source in (("to_input", theirs.igate_preact), ("to_forget", theirs.fgate_preact)):
        copy(ours.get_submodule(name).weight, source.weight)
        copy(ours.get_submodule(name).bias, source.bias)
    copy(ours.norm.weight, theirs.multihead_norm.weight)
    x = inputs()
    y, state = ours(x)
    wanted, (memory, normalizer, maximum) = theirs(x)
    assert_same(y, wanted)
    assert_same(state.memory, memory)
    assert_same(state.normalizer, normalizer)
    assert_same(state.maximum, maximum[..., 0])


def gates(*, shift: float) -> tuple[Tensor, ...]:
    """q, k, v (batch, heads, time, dim) and the gates' inputs (batch, heads, time), as mlstm-kernels has them."""
    q, k = (torch.randn(BATCH, HEADS, TIME, 8, dtype=torch.float64) for _ in range(2))
    v = torch.randn(BATCH, HEADS, TIME, 6, dtype=torch.float64)
    i, f = (2 * torch.randn(BATCH, HEADS, TIME, dtype=torch.float64) + shift for _ in range(2))
    return q, k, v, i, f


@pytest.mark.parametrize("shift", [-5.0, 0.0, 3.0])
def test_the_exponential_gate_is_that_of_mlstm_kernels(shift: float) -> None:
    peer = pytest.importorskip("mlstm_kernels.torch.parallel.native_stablef.fw")
    q, k, v, i, f = gates(shift=shift)
    # Without ε: it is added in units of the running maximum, which starts at 0 in ours (and in the steps of
    # mlstm-kernels, see below), and without a bound in its parallel form.
    wanted = peer.mlstm_parallel_fw(q, k, v, i, f, eps=0.0)[0]
    turned = (x.transpose(1, 2) for x in (q * 8**-0.5, k, v, i, F.logsigmoid(f)))
    found, _ = exponential_attention(*turned, eps=0.0)
    assert_same(found.transpose(1, 2), wanted, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_the_sigmoid_gate_is_that_of_mlstm_kernels(normalize: bool) -> None:
    peer = pytest.importorskip("mlstm_kernels.torch.parallel.native_siging.fw")
    options = {"input_gate": "sigmoid", "normalize": normalize, "input_bias": 1.0, "soft_cap": None}
    ours: Any = shaken(ostinato.mixer("mlstm", D_MODEL, heads=HEADS, **options).double(), 1.0)
    x = inputs().double()
    queries, keys, values, _ = ours.project(x, None, None)
    turned = (part.transpose(1, 2) for part in (queries, keys, values, ours.to_input(x), ours.to_forget(x)))
    hidden, divisor = peer.mlstm_siging_parallel_fw(*turned, eps=1e-6, normalize=normalize)
    if normalize:
        assert divisor.max() > 1.5 and (divisor == 1).any(), "both sides of max(|n·q|, 1) should be tried"
    wanted = ours.to_output(torch.sigmoid(ours.to_gate(x)) * ours.norm(hidden.transpose(1, 2)))
    assert_same(ours(x)[0], wanted, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("shift", [-10.0, 0.0])
def test_mlstm_streams_as_the_step_of_mlstm_kernels(shift: float) -> None:
    peer = pytest.importorskip("mlstm_kernels.torch.recurrent.native_step")
    ours: Any = shaken(ostinato.mixer("mlstm", D_MODEL, heads=HEADS, input_bias=shift).double())
    state = ours.initial_state(BATCH)
    memory, normalizer, maximum = state.memory, state.normalizer, state.maximum.unsqueeze(-1)
    for _ in range(7):
        x = inputs(BATCH, D_MODEL).double()
        y, state = ours.step(x, state)
        queries, keys, values, _ = (part for part in ours.project(x.unsqueeze(1), None, None))
        raw_input, forget = (15 * torch.tanh(gate(x) / 15) for gate in (ours.to_input, ours.to_forget))
        hidden, (memory, normalizer, maximum) = peer.mlstm_recurrent_step__native(
            queries[:, 0], keys[:, 0], values[:, 0], raw_input.unsqueeze(-1), forget.unsqueeze(-1),
            memory, normalizer, maximum, dtype_state=torch.float64,
        )  # fmt: skip
        assert_same(y, ours.to_output(torch.sigmoid(ours.to_gate(x)) * ours.norm(hidden)), 1e-9)
        torch.testing.assert_close(state.memory, memory, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state.normalizer, normalizer, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state.maximum, maximum[..., 0], rtol=1e-9, atol=1e-12)


def swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Time and heads exchanged."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


@torch.no_grad()
def test_gla_is_that_of_flash_linear_attention() -> None:
    peer = flash_linear_attention("gla/naive.py")
    ours: Any = shaken(ostinato.mixer("gla", D_MODEL, heads=HEADS, temperature=1.0))
    x, start = inputs(), ours.initial_state(BATCH)
    start = start._replace(memory=torch.randn_like(start.memory))
    queries, keys, values, _ = ours.project(x, None, None)
    outputs, memory = peer.naive_recurrent_gla(queries, keys, values, ours.log_decay(x), start.memory, True)
    y, last = ours(x, start)
    assert_same(y, ours.read_out(outputs, x))
    assert_same(last.memory, memory)


@torch.no_grad()
def test_retention_is_that_of_flash_linear_attention() -> None:
    peer = flash_linear_attention("retention/naive.py")
    ours: Any = ostinato.mixer("retnet", D_MODEL, heads=HEADS)
    q, k, v = (torch.randn(BATCH, HEADS, TIME, 8) for _ in range(3))
    decay = ours.log_decay().expand(BATCH, TIME, HEADS)
    found, _ = linear_attention(*swapped(q * 8**-0.5, k, v), decay)
    assert_same(found.transpose(1, 2), peer.naive_retention(q, k, v))


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention_is_that_of_flash_linear_attention(normalize: bool) -> None:
    peer = flash_linear_attention("linear_attn/naive.py")
    ours: Any = shaken(ostinato.mixer("linear_attention", D_MODEL, heads=HEADS, normalize=normalize, eps=1e-10))
    x = inputs()
    queries, keys, values, _ = ours.project(x, None, None)
    outputs, _ = peer.naive_recurrent_linear_attn(F.elu(queries) + 1, F.elu(keys) + 1, values, normalize=normalize)
    assert_same(ours(x)[0], ours.read_out(outputs, x))


def delta_arguments(ours: Any, x: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values, _ = ours.project(x, start.window, None)
    return l2_normalize(F.silu(queries)), l2_normalize(F.silu(keys)), F.silu(values)


def started(ours: Mixer) -> Any:
    start = ours.initial_state(BATCH)
    return start._replace(memory=torch.randn_like(start.memory))


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True])
def test_delta_net_is_that_of_flash_linear_attention(negative: bool) -> None:
    peer = flash_linear_attention("delta_rule/naive.py")
    ours: Any = shaken(ostinato.mixer("delta_net", D_MODEL, heads=HEADS, negative_eigenvalues=negative))
    x, start = inputs(), started(ours)
    arguments = swapped(*delta_arguments(ours, x, start), ours.beta(x))
    outputs, memory = peer.delta_rule_recurrence(*arguments, start.memory)
    y, last = ours(x, start)
    assert_same(y, ours.read_out(outputs.transpose(1, 2), x))
    assert_same(last.memory, memory)


@torch.no_grad()
@pytest.mark.parametrize("name", ["delta_product", "gated_delta_product"])
def test_delta_product_is_that_of_flash_linear_attention(name: str) -> None:
    peer = flash_linear_attention("gated_delta_product/naive.py")
    ours: Any = shaken(ostinato.mixer(name, D_MODEL, heads=HEADS, householders=3, negative_eigenvalues=True))
    x, start = inputs(), started(ours)
    queries, keys, values = delta_arguments(ours, x, start)
    outputs, memory = peer.naive_recurrent_gated_delta_product(
        queries, keys, values, ours.log_decay(x), ours.beta(x), ours.key_dim**-0.5, initial_state=start.memory,
        num_householder=3,
    )  # fmt: skip
    y, last = ours(x, start)
    assert_same(y, ours.read_out(outputs, x))
    assert_same(last.memory, memory)


@torch.no_grad()
def test_kimi_delta_attention_is_that_of_flash_linear_attention() -> None:
    peer = flash_linear_attention("kda/naive.py")
    ours: Any = shaken(ostinato.mixer("kimi_delta_attention", D_MODEL, heads=HEADS))
    x, start = inputs(), started(ours)
    arguments = (*delta_arguments(ours, x, start), ours.log_decay(x), ours.beta(x))
    outputs, memory = peer.naive_recurrent_kda(*arguments, initial_state=start.memory, output_final_state=True)
    y, last = ours(x, start)
    assert_same(y, ours.read_out(outputs, x))
    assert_same(last.memory, memory)


@torch.no_grad()
def test_rwkv7_has_the_recurrence_of_flash_linear_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its diagonal-plus-low-rank form reads the memory before the decay; ours reads it after, with other keys."""
    peer = flash_linear_attention("generalized_delta_rule/dplr/naive.py")
    ours: Any = shaken(ostinato.mixer("rwkv7", D_MODEL, heads=HEADS))
    seen: list[int] = []

    def recurrence(queries: Tensor, keys: Tensor, values: Tensor, beta: None, log_decay: Tensor, state: Tensor,
                   *, read_keys: Tensor, erase_keys: Tensor, reset: None) -> tuple[Tensor, Tensor]:  # fmt: skip
        seen.append(queries.shape[1])
        undecayed = read_keys * log_decay.exp()
        torch.testing.assert_close(undecayed.norm(dim=-1), torch.ones(BATCH, TIME, HEADS))
        scaled = queries * queries.shape[-1] ** 0.5  # theirs scales the queries
        turned = swapped(scaled, keys, values, -undecayed, erase_keys, log_decay)
        outputs, memory = peer.dplr_recurrence(*turned, initial_state=state)
        return outputs.transpose(1, 2), memory

    x, start = inputs(), started(ours)
    y, last = ours(x, start)
    monkeypatch.setattr("ostinato.mixers.rwkv7.delta_rule", recurrence)
    wanted, state = ours(x, start)
    assert seen == [TIME]
    assert_same(y, wanted)
    assert_same(last.memory, state.memory)
