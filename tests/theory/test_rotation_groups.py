from __future__ import annotations

import pytest
import torch

from ostinato.errors import UnknownNameError
from ostinato.tasks.groups import group_table
from ostinato.theory.rotation_groups import rotation_group


@pytest.mark.parametrize(("name", "order", "things"), [("S4", 24, 4), ("A5", 60, 5)])
def test_rotations_multiply_as_the_permutations_do(name: str, order: int, things: int) -> None:
    matrices, permutations = rotation_group(name)
    assert matrices.shape == (order, 3, 3) and permutations.shape == (order, things)
    assert len({tuple(row) for row in permutations.tolist()}) == order
    assert torch.equal(matrices[0], torch.eye(3).double()) and permutations[0].tolist() == list(range(things))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(order).double())
    products = torch.cdist((matrices.unsqueeze(1) @ matrices).flatten(2).flatten(0, 1), matrices.flatten(1))
    assert float(products.amin(1).max()) < 1e-6
    table = products.argmin(1).view(order, order)
    # (ab)(i) = a(b(i)): the permutations are the same group.
    composed = permutations.unsqueeze(1).expand(-1, order, -1).gather(2, permutations.expand(order, -1, -1))
    assert torch.equal(permutations[table], composed)


@pytest.mark.parametrize("name", ["S4", "A5"])
def test_it_is_the_group_of_the_task(name: str) -> None:
    # As many elements of each order: for groups of these sizes that generate the same permutations it is enough.
    def orders(table: torch.Tensor) -> list[int]:
        found = []
        for element in range(len(table)):
            power, count = element, 1
            while power:
                power, count = int(table[power, element]), count + 1
            found.append(count)
        return sorted(found)

    matrices = rotation_group(name).matrices
    products = (matrices.unsqueeze(1) @ matrices).flatten(2).flatten(0, 1)
    table = torch.cdist(products, matrices.flatten(1)).argmin(1).view(len(matrices), -1)
    assert orders(table) == orders(torch.tensor(group_table(name)))


def test_no_other_solid() -> None:
    with pytest.raises(UnknownNameError, match="S5"):
        rotation_group("S5")
