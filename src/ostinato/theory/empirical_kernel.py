"""The tangent kernel of a finite module, Θ(x, x') = J(x) J(x')ᵀ over its parameters, and the module's linearisation.

    theta = empirical_ntk(module, x, x2, method="vjp_jvp")     # (n, m, outputs, outputs)

Three ways, which agree:

- "jacobian": both Jacobians, contracted parameter by parameter. Memory n · outputs · parameters.
- "vjp_jvp": Θ e = J(x) (J(x')ᵀ e) for every basis vector e, a vector–Jacobian product and then a
  Jacobian–vector product. The least memory, for any module.
- "layers": Σ over linear layers of (Σ_ts (g_t·g'_s)(a_t·a'_s)) with a the layer's inputs and g the gradients
  at its outputs, over all the times t, s that the layer is used. For modules of linear layers only.

Source: Jacot et al. (arXiv 1806.07572), section 4; Novak et al., Fast Finite Width NTK (arXiv 2206.08720).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from ostinato.errors import ConfigurationError
from ostinato.theory.wide_networks import ScaledLinear

METHODS = ("jacobian", "vjp_jvp", "layers")
Parameters = dict[str, Tensor]
Function = Callable[[Parameters, Tensor], Tensor]


def function_of(module: nn.Module) -> Function:
    """f(parameters, x) -> (batch, outputs): the module's first output, all axes but the batch flattened."""

    def function(parameters: Parameters, x: Tensor) -> Tensor:
        outputs = functional_call(module, parameters, (x,))
        return (outputs[0] if isinstance(outputs, tuple) else outputs).flatten(1)

    return function


def empirical_ntk(
    module: nn.Module,
    x: Float[Tensor, "n ..."],
    x2: Float[Tensor, "m ..."] | None = None,
    *,
    method: str = "vjp_jvp",
    parameters: Parameters | None = None,
) -> Float[Tensor, "n m outputs outputs"]:
    """Θ(x, x') of a module that treats the rows of a batch apart (batch norm in training mode does not).

    Args:
        module: of one tensor, or a tuple whose first element counts (a mixer's outputs, without its state).
        x, x2: batches; without x2 the kernel of x with itself.
        method: "jacobian", "vjp_jvp" or "layers".
        parameters: values in place of the module's own. With "jacobian" and "vjp_jvp" the call may stand in `vmap`
            over draws of them.

    In the type of the parameters. Raises `ConfigurationError` for the method, for "layers" on a module with other
    parameters, and for a module without parameters.
    """
    if parameters is None:
        parameters = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    if not parameters:
        raise ConfigurationError(f"{type(module).__name__} has no parameters that are trained: its kernel is empty")
    other = x if x2 is None else x2
    if method == "jacobian":
        return _by_jacobian(function_of(module), parameters, x, other)
    if method == "vjp_jvp":
        return _by_products(function_of(module), parameters, x, other)
    if method == "layers":
        return _by_layers(module, parameters, x, other)
    raise ConfigurationError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _by_jacobian(function: Function, parameters: Parameters, x: Tensor, other: Tensor) -> Tensor:
    def jacobian(inputs: Tensor) -> Parameters:
        return vmap(jacrev(lambda p, row: function(p, row.unsqueeze(0)).squeeze(0)), (None, 0))(parameters, inputs)

    left = jacobian(x)
    right = left if other is x else jacobian(other)
    terms = [torch.einsum("nop,mqp->nmoq", left[k].flatten(2), right[k].flatten(2)) for k in parameters]
    return torch.stack(terms).sum(0)


def _by_products(function: Function, parameters: Parameters, x: Tensor, other: Tensor) -> Tensor:
    outputs, pull = vjp(lambda p: function(p, other), parameters)
    rows, width = outputs.shape

    def column(direction: Tensor) -> Tensor:
        (change,) = pull(direction.view(rows, width))
        return jvp(lambda p: function(p, x), (parameters,), (change,))[1]

    basis = torch.eye(rows * width, dtype=outputs.dtype, device=outputs.device)
    # Not all columns at once: each holds a change of all parameters.
    columns = vmap(column, chunk_size=16)(basis) if rows * width > 1 else column(basis[0]).unsqueeze(0)
    return columns.view(rows, width, -1, width).permute(2, 0, 3, 1)


def _by_layers(module: nn.Module, parameters: Parameters, x: Tensor, other: Tensor) -> Tensor:
    left = _layer_terms(module, parameters, x)
    right = left if other is x else _layer_terms(module, parameters, other)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for (scale, shift, inputs, gradients), (_, _, inputs2, gradients2) in zip(left, right, strict=True):
        # (n, m, outputs, outputs, times, times) would be large: the weight's gradient is contracted over times first
        # only where there is more than one.
        if inputs.shape[1] == 1:
            alike = torch.einsum("ntf,msf->nm", inputs, inputs2) * scale**2 + shift**2
            total = total + torch.einsum("notz,mqsz->nmoq", gradients, gradients2) * alike[..., None, None]
        else:
            weight, weight2 = (
                torch.einsum("notz,ntf->nozf", g, a).flatten(2) for g, a in ((gradients, inputs), (gradients2, inputs2))
            )
            total = total + scale**2 * torch.einsum("nok,mqk->nmoq", weight, weight2)
            total = total + shift**2 * torch.einsum("notz,mqsz->nmoq", gradients, gradients2)
    return total


def _layer_terms(module: nn.Module, parameters: Parameters, x: Tensor) -> list[tuple[float, float, Tensor, Tensor]]:
    """Of each linear layer: the factors of weight and bias, its inputs (n, times, features) and the gradients of every
    output at its own (n, outputs, times, width).
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | ScaledLinear)}
    covered = {
        f"{name}.{own}" if name else own for name, layer in layers.items() for own, _ in layer.named_parameters()
    }
    if set(parameters) - covered:
        raise ConfigurationError(
            f"method 'layers' needs every parameter in a linear layer; {', '.join(sorted(set(parameters) - covered))} "
            "do not; use 'vjp_jvp'"
        )
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name].append((inputs[0], output))

        return hook

    handles = [layer.register_forward_hook(remember(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            fixed = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            outputs = function_of(module)(fixed, x)
    finally:
        for handle in handles:
            handle.remove()
    calls = [(name, a, z) for name in layers for a, z in seen[name]]
    by_output = [
        torch.autograd.grad(outputs[:, k].sum(), [z for *_, z in calls], retain_graph=True, materialize_grads=True)
        for k in range(outputs.shape[1])
    ]
    terms = []
    for name, layer in layers.items():
        places = [i for i, (called, *_) in enumerate(calls) if called == name]
        if not places:
            continue
        inputs = torch.cat([calls[i][1].detach().reshape(len(x), -1, calls[i][1].shape[-1]) for i in places], 1)
        gradients = torch.stack(
            [torch.cat([g[i].reshape(len(x), -1, g[i].shape[-1]) for i in places], 1) for g in by_output], dim=1
        )
        scale, shift = (
            (layer.scale, layer.shift) if isinstance(layer, ScaledLinear) else (1.0, float(layer.bias is not None))
        )
        terms.append((scale, shift, inputs, gradients))
    return terms


class Linearized(nn.Module):
    """f₀(x) + J(x) (θ − θ₀): the module's first-order expansion in its parameters, at the values that it had.

    Its own parameters θ start at θ₀; training them is training the kernel machine of the empirical kernel.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = [name for name, _ in module.named_parameters()]
        self.current = nn.ParameterList(value.detach().clone() for _, value in module.named_parameters())
        self._start = [value.detach().clone() for _, value in module.named_parameters()]
        self._function = function_of(module)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        """The expansion at x."""
        start = dict(zip(self.names, self._start, strict=True))
        change = {n: now - s for n, now, s in zip(self.names, self.current, self._start, strict=True)}
        value, slope = jvp(lambda p: self._function(p, x), (start,), (change,))
        return value + slope


def linearized(module: nn.Module) -> Linearized:
    """The module's expansion at its present parameters, as a module of its own: f₀(x) + J(x)(θ − θ₀).

    Source: Jacot et al. (arXiv 1806.07572), section 5.
    """
    return Linearized(module)
