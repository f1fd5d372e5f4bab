"""What stands at a module passes on all that it does not change itself."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from luthier.kinds import RepresentationEdit
from luthier.registry import Part
from luthier.tune.forward import head_now
from luthier.tune.sites import Edit, Site
from tests.toys.helpers import model_of

ONE = torch.tensor([1.0])


def plus(of: Literal["input", "output"], roles: tuple[str, ...] = ()) -> RepresentationEdit:
    """Adds a number to what a module reads or gives."""
    return RepresentationEdit(
        lambda place, width_in, width_out, services: {"shift": ONE.clone()},
        lambda tensors, x, y: y + tensors["shift"],
        roles,
        of=of,
    )


class Three(nn.Module):
    """Gives back all it was told."""

    def forward(self, x: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same."""
        return x, second, third


class Shifted(nn.Embedding):
    """Looks up later rows than those it is asked for."""

    def forward(self, ids: Tensor, by: int = 0) -> Tensor:
        """[..., D]."""
        return super().forward(ids + by)


@pytest.mark.parametrize("of", ["input", "output"])
def test_an_edit_changes_the_first_of_what_is_told_and_given(of: Literal["input", "output"]) -> None:
    module = Three()
    site = Site(module, lambda: False, edits=[Edit("probe", None, frozen={"shift": ONE}, value=plus(of))])
    site.attach()
    one, two, three = (torch.full((2,), value) for value in (1.0, 2.0, 3.0))
    assert [given.tolist() for given in module(one, two, three)] == [[2.0, 2.0], [2.0, 2.0], [3.0, 3.0]]
    site.detach()
    assert [given.tolist() for given in module(one, two, three)] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_an_embedding_is_told_all_it_was_asked() -> None:
    module = Shifted(4, 2)
    wanted = module.weight[[1, 2, 3]]
    Site(module, lambda: False).attach()
    assert torch.equal(module(torch.tensor([0, 1, 2]), 1), wanted)


@pytest.mark.parametrize("of", ["input", "output"])
def test_the_head_of_a_moment_is_edited_as_the_head_is(engine: Any, of: Literal["input", "output"]) -> None:
    part = Part(name="probe", kind="any", options={}, values=(plus(of, ("head",)),))
    tune = engine([part], model=model_of(layers=1, tied=False)).tune
    hidden_ND = torch.linspace(-1.0, 1.0, 2 * tune.parts.width, dtype=torch.float64).view(2, -1)
    head, now_NV = head_now(tune), tune.model.lm_head(hidden_ND)
    assert now_NV.requires_grad and torch.equal(head(hidden_ND), now_NV) and not head(hidden_ND).requires_grad
    tune.set({name: one.master + 1.0 for name, one in tune.trained.items()})
    assert torch.equal(head(hidden_ND), now_NV) and not torch.equal(head_now(tune)(hidden_ND), now_NV)
    with tune.off():
        assert torch.equal(head_now(tune)(hidden_ND), tune.model.lm_head(hidden_ND))
