"""Another model as the reference, such as the one that wrote the answers."""

from __future__ import annotations

from torch import Tensor

from luthier.columns.losses import nll
from luthier.kinds import Column, OtherPass, Reference, View
from luthier.registry import method


@method(title="Another model as the reference", reduces_to="the model before training, named: what a run compares with anyway")
def model_reference(*, model: str = "reference") -> Reference:
    """Compare with another model or run: `models: {reference: MODEL or RUN}` names it.

    It stands beside a loss with a reference: `objective: [dpo, model_reference]`. It has the same tokenizer, and costs one forward pass
    of its own instead of the base's.

    Args:
        model: which of the recipe's `models`.
    """
    column = Column(
        f"nll of {model}", lambda chunk: nll(chunk.others[model], chunk.label_C), (OtherPass(model, model=model),), gradient=False
    )

    def read(view: View) -> Tensor:
        return view.log_likelihoods(column.name)

    return Reference(read, columns=(column,))
