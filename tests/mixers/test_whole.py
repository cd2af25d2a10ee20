"""Mixers that are not causal: each keeps the part of the law that it states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ostinato
from ostinato.errors import ConfigurationError, LawError, StateError
from ostinato.mixers import registry
from ostinato.mixers.multi_scan_gla import MultiScanGLA
from ostinato.mixers.whole import WholeMixer
from ostinato.mixers.whole_attention import WholeAttention
from ostinato.models.vector_classifier import VectorClassifier
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.sequences import places, same_sequence, sequence_max, sequence_softmax, sequence_sum, whole_attention
from ostinato.testing import law
from ostinato.testing.report import GRADIENT_TOLERANCES
from ostinato.testing.runs import difference, run
from ostinato.testing.whole import check_whole_mixer


@pytest.mark.parametrize("name", registry.whole_mixers())
def test_every_whole_mixer_keeps_what_it_states(name: str) -> None:
    cls = registry.mixer_class(name)
    mixer = registry.mixer(name, 16)
    assert isinstance(mixer, WholeMixer) and not mixer.causal and cls.traits.paper and cls.__doc__
    report = check_whole_mixer(mixer, length=13, dtypes=(torch.float64, torch.float32), name=name)
    assert report.ok and len(report.rows) > 10


@pytest.mark.parametrize("name", registry.whole_mixers())
def test_in_half_precision_too(name: str) -> None:
    # One head: the norm of a short vector can be ill-conditioned, as the next test shows.
    mixer = registry.mixer(name, 16, heads=1)
    assert check_whole_mixer(mixer, length=13, dtypes=(torch.bfloat16,), name=name, compile=False).ok


def test_where_half_precision_is_beyond_the_tolerance_the_gradient_itself_is_ill_conditioned() -> None:
    # Both directions together read next to nothing in one head, and the norm divides by it: in float64, rounding q, k
    # and v to bfloat16 once, and nothing else, moves the gradients as far as the whole computation in bfloat16 does.
    torch.manual_seed(7)
    mixer = registry.mixer("multi_scan_gla", 16)
    bench = law.Bench(mixer, torch.float64, "cpu", 2, 20, 7)
    wanted = [run(bench.mixer, problem, [20]) for problem in bench.problems()]

    def rounded(module: Any, arguments: Any, projected: Any) -> tuple[Any, ...]:
        *parts, window = projected
        return (*(part + (part.bfloat16().double() - part).detach() for part in parts), window)

    bench.mixer.gla.project.register_forward_hook(rounded)  # type: ignore[union-attr, operator]
    moved = 0.0
    for problem, truth in zip(bench.problems(), wanted, strict=True):
        found = run(bench.mixer, problem, [20]).values
        moved = max(
            moved, *(difference(found[kind], truth.values[kind])[0] for kind in truth.values if "gradient" in kind)
        )
    report = check_whole_mixer(mixer, dtypes=(torch.bfloat16,), seed=7, compile=False, strict=False)
    worst = max(row.error for row in report.rows)
    assert moved > GRADIENT_TOLERANCES[torch.bfloat16] and worst < 1.5 * moved


def test_they_are_found_by_name_but_not_listed_among_the_causal() -> None:
    assert "hydra" in registry.whole_mixers() and "hydra" not in registry.mixers()
    with pytest.raises(ConfigurationError, match="built-in"):
        ostinato.register("hydra", registry.mixer_class("gla"))
    model = VectorClassifier(3, 2, 16, "hydra, gla", norm_place="pre")
    logits, state = model(torch.randn(2, 5, 3))
    assert logits.shape == (2, 5, 2) and state[0] is None
    with pytest.raises(ConfigurationError, match="Hydra would see it"):
        ostinato.LanguageModel(d_model=16, plan="hydra")
    with pytest.raises(StateError, match="reads whole sequences"):
        model(torch.randn(2, 5, 3), (torch.zeros(2, 1), None))


def test_a_leak_between_packed_sequences_is_found() -> None:
    class Leaking(registry.mixer_class("hydra")):  # type: ignore[misc]
        def mix_whole(self, x: Any, reset: Any) -> Any:
            return super().mix_whole(x, None)

    with pytest.raises(LawError, match="packing"):
        check_whole_mixer(Leaking(16), length=8)
    with pytest.raises(ConfigurationError, match="is causal"):
        check_whole_mixer(ostinato.mixer("gla", 16))  # type: ignore[arg-type]


RESET = torch.tensor([[False, False, True, False, True, True], [True, False, False, False, False, False]])


def test_sums_over_sequences() -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    total, top = sequence_sum(x, RESET), sequence_max(x, RESET)
    soft = sequence_softmax(x, RESET)
    for row, parts in ((0, [(0, 2), (2, 4), (4, 5), (5, 6)]), (1, [(0, 6)])):
        for start, end in parts:
            piece = x[row, start:end]
            assert torch.allclose(total[row, start:end], piece.sum(0).expand_as(piece))
            assert torch.equal(top[row, start:end], piece.amax(0).expand_as(piece))
            assert torch.allclose(soft[row, start:end], piece.softmax(0))
    assert torch.allclose(sequence_softmax(x), x.softmax(1))
    assert not sequence_softmax(torch.full((1, 3, 2), -torch.inf)).any()
    assert places(RESET, 2, 6, x.device).tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]


def test_whole_attention_is_its_masked_matrix() -> None:
    q, k = (torch.randn(2, 6, 2, 3, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 6, 2, 4, dtype=torch.float64)
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    for reset in (None, RESET):
        mask = 1.0 if reset is None else same_sequence(reset).unsqueeze(1).double()
        wanted = torch.einsum("bhij,bjhv->bihv", scores * mask, v)
        assert torch.allclose(whole_attention(q, k, v, reset=reset), wanted, atol=1e-12)


@pytest.mark.parametrize("options", [{"rope": False}, {"grid": (3, 4)}])
def test_whole_attention_is_torchs(options: dict[str, Any]) -> None:
    mixer = WholeAttention(16, heads=2, **options)
    assert check_whole_mixer(mixer, length=12, resets="grid" not in options).ok
    if not options.get("rope", True):
        peer = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
        with torch.no_grad():
            peer.in_proj_weight.copy_(torch.cat([to.weight for to in (mixer.to_query, mixer.to_key, mixer.to_value)]))
            peer.out_proj.weight.copy_(mixer.to_output.weight)
        x = torch.randn(2, 5, 16)
        assert torch.allclose(mixer(x)[0], peer(x, x, x)[0], atol=1e-5)
    else:
        with pytest.raises(ConfigurationError, match="cannot be packed"):
            mixer(torch.randn(1, 12, 16), reset=torch.zeros(1, 12, dtype=torch.bool))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("scans", "grid"), [(1, None), (2, None), (1, (3, 4)), (2, (3, 4)), (4, (3, 4))])
def test_scans_of_a_grid_are_sums_of_orders(scans: int, grid: tuple[int, int] | None, own: bool) -> None:
    mixer = MultiScanGLA(8, heads=2, scans=scans, grid=grid, own=own).double()
    assert check_whole_mixer(mixer, length=12, resets=grid is None, compile=scans == 4).ok
    assert len(mixer.others) == (scans - 1 if own else 0)
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    total = torch.zeros(())
    gla = mixer.gla
    by_columns = torch.arange(12).view(3, 4).T.flatten()
    orders = [torch.arange(12), torch.arange(12).flip(0)][:scans]
    if scans == 4:
        orders = [torch.arange(12), by_columns, torch.arange(12).flip(0), by_columns.flip(0)]
    for index, order in enumerate(orders):
        q, k, v, _ = gla.project(x[:, order], None, None)
        decay = gla.log_decay(x[:, order])
        if own and index:
            q, k, decay = mixer.others[index - 1](x[:, order])
        y, _ = linear_attention(q * gla.key_dim**-0.5, k, v, decay)
        total = total + y[:, order.argsort()]
    assert torch.allclose(mixer(x)[0], gla.read_out(total, x), atol=1e-12)
    with pytest.raises(ConfigurationError, match="scans are 1, 2, or 4"):
        MultiScanGLA(8, scans=4)
