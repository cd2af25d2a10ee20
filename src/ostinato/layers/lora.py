"""Low-rank adaptation: a frozen linear map, and a small learned correction beside it.

Source: LoRA (arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import CheckpointError, ConfigurationError
from ostinato.files import read_tensors, write_tensors

KIND = "adapters"
ATTENTION = ("mixer.to_query", "mixer.to_key", "mixer.to_value", "q_proj", "k_proj", "v_proj")
"""The projections of attention, by our names and by those of Transformers."""


class LoRALinear(nn.Linear):
    """y = W x + b + (α / r) B A x, with W and b frozen, A (r, inputs) and B (outputs, r) learned.

    It shares W and b with the layer it is made of, under the same names; B starts at zero, so that nothing changes
    at first, and A as a linear layer's weight does. Merged, W + (α / r) B A is the weight, and the two are not added.

    Args:
        linear: the layer to adapt; its parameters are frozen.
        rank: r.
        alpha: α; None takes the rank, a correction of scale 1.

    A and B have the type and the device of W. Raises `ConfigurationError` for a rank below 1.
    """

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: float | None = None) -> None:
        # On "meta" nothing is drawn and nothing is allocated for the weight that is replaced at once.
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        if rank < 1:
            raise ConfigurationError(f"the rank of an adapter must be at least 1, got {rank}")
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
        self.merged = False
        self.train(linear.training)

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """The map itself."""
        outputs = F.linear(input, self.weight, self.bias)
        if self.merged:
            return outputs
        return outputs + self.scale * F.linear(F.linear(input, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the correction to the weight; a second call does nothing."""
        if not self.merged:
            self.weight += self._correction()
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take it out again, up to rounding; without a `merge` before, it does nothing."""
        if self.merged:
            self.weight -= self._correction()
            self.merged = False

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """An ordinary linear layer with the merged weight, learned as before the adaptation. Shares no memory."""
        weight = self.weight if self.merged else self.weight + self._correction()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.clone())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer.train(self.training)

    def _correction(self) -> Tensor:
        return self.scale * (self.lora_b @ self.lora_a)


def add_lora(
    model: nn.Module, targets: Iterable[str] = ATTENTION, rank: int = 8, alpha: float | None = None
) -> list[str]:
    """Freeze a model, and put an adapter on every linear layer whose name is, or after a dot ends in, a target.

    The model is changed in place: only the adapters are learned then. Returns the adapted layers' names.
    Raises `ConfigurationError` if no layer is, or if one is adapted already.
    """
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    chosen = [name for name in linear if f".{name}".endswith(tuple(f".{target}" for target in wanted))]
    if not chosen:
        there = ", ".join(sorted({name.rpartition(".")[-1] for name in linear})) or "none"
        raise ConfigurationError(f"no linear layer of this model is named {', '.join(wanted)}; there are {there}")
    if again := [name for name in chosen if isinstance(linear[name], LoRALinear)]:
        raise ConfigurationError(f"{again[0]} has an adapter already; merge_lora(model) makes it a plain layer")
    adapted = {name: LoRALinear(linear[name], rank, alpha) for name in chosen}
    model.requires_grad_(False)
    for name, layer in adapted.items():
        model.set_submodule(name, layer)
    return chosen


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers of a model, by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear))


def merge_lora(model: nn.Module) -> None:
    """Make plain layers of the adapted ones, in place: same function, the parameters of before, all of them learned."""
    for name, layer in list(adapters(model)):
        model.set_submodule(name, layer.plain())
    model.requires_grad_(True)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, by name: what `save_adapters` writes."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in adapters(model)
        for part in ("lora_a", "lora_b")
    }


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the adapters alone to a safetensors file, atomically. The scale α / r is the reader's to set.

    Raises `ConfigurationError` if the model has none.
    """
    weights = adapter_weights(model)
    if not weights:
        raise ConfigurationError("this model has no adapters to save; add_lora(model) adds them")
    write_tensors(Path(path), weights, {"kind": KIND})


@torch.no_grad()
def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Read what `save_adapters` wrote into a model with adapters of the same names and shapes.

    Raises `CheckpointError` if the file holds something else; the model is then as it was. A model whose adapters
    are merged is unmerged first, so that the old correction does not stay in its weights.
    """
    weights, metadata = read_tensors(Path(path))
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path} holds {metadata.get('kind', 'something else')}, not {KIND}")
    own = adapter_weights(model)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if found != wanted:
        name = sorted(dict(found.items() ^ wanted.items()))[0]
        raise CheckpointError(
            f"the adapters in {path} are not of this model: {name} has shape {found.get(name)} there "
            f"and {wanted.get(name)} here"
        )
    for _, layer in adapters(model):
        layer.unmerge()
    for name, tensor in own.items():
        tensor.copy_(weights[name])
