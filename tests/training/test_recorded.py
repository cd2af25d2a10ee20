from __future__ import annotations

import pytest
import torch
from torch import nn

from ostinato.models.token_classifier import TokenClassifier
from ostinato.tasks.arithmetic import Parity
from ostinato.training.ensemble import fit_together
from ostinato.training.recorded import Recorded

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_processor_every_call_is_a_plain_one() -> None:
    count = torch.zeros(())

    def update() -> None:
        count.add_(1)

    step = Recorded(update, torch.device("cpu"))
    for _ in range(6):
        step()
    assert count == 6 and step.refused is None


@needs_gpu
def test_a_recorded_step_does_what_a_plain_one_does() -> None:
    device = torch.device("cuda")

    def trained(plain: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model, x = nn.Linear(4, 1).to(device), torch.zeros(8, 4, device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2, device=device), capturable=True)

        def update() -> None:
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()

        recorded = Recorded(update, device)
        for seed in range(12):
            x.copy_(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))
            (update if plain else recorded)()
        assert plain or (recorded._graph is not None and recorded.refused is None)
        return model.weight.detach()

    torch.testing.assert_close(trained(False), trained(True))


@needs_gpu
def test_a_step_that_looks_at_a_value_is_not_recorded() -> None:
    device = torch.device("cuda")
    count = torch.zeros((), device=device)

    def look() -> None:
        count.add_(1)
        float(count)

    step = Recorded(look, device)
    for _ in range(6):
        step()
    assert step.refused is not None and count == 6


@needs_gpu
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("plan", ["delta_product(heads=2, conv=None)", "mamba(d_state=2)", "lstm"])
def test_members_train_on_a_gpu_as_on_a_processor(plan: str, seeds: tuple[int, ...]) -> None:
    task = Parity(min_length=2, max_length=8, tested_lengths=(8,), test_size=8)
    found = [
        fit_together(lambda seed: TokenClassifier(3, 8, plan), task, seeds, steps=20, batch_size=4, device=device)
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*(torch.tensor(each.losses) for each in found), atol=2e-3, rtol=2e-3)
