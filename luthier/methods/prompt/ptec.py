"""PTEC (Buchner et al., 2024), section 3.2: a soft prompt and a head of several labels learn before and behind a frozen model."""

from __future__ import annotations

from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Head, LossTerm, Prompt, Services, Tensors
from luthier.methods.head.multi_label import multi_label
from luthier.methods.prompt._virtual import check_length, drawn_from, stand_before
from luthier.registry import method


@method(
    title="Prompt Tuned Embedding Classification",
    paper="arXiv:2309.12075",
    row=227,
    departs="the prompt starts as embeddings of common tokens, not of the labels' names; weights of positives are given, not counted; the "
    "head starts at zero; AdamW with the run's schedule for both",
    step0="on purpose not the base",
    merges="never",
    learning_rate=1e-3,
)
def ptec(
    *, labels: tuple[str, ...], length: int = 50, prompt_learning_rate: float = 0.01, positive_weights: tuple[float, ...] = ()
) -> tuple[Prompt, Head, LossTerm]:
    """Tell which of several labels texts have, with a trained prompt before them and a head on their last token; the model stays as it is.

    It is all that a run trains: `tune: {ptec: {labels: [...]}}`, without an objective. Rows are those of `multi_label`, and so is the head.

    Args:
        labels: their names, in the order of their numbers.
        length: P, tokens of the prompt; the paper searches 50 to 200.
        prompt_learning_rate: the learning rate of the prompt, where the head's is that of the run, whose schedule it follows; the paper
            searches both.
        positive_weights: as for `multi_label`.

    Raises:
        LuthierError: an option is out of range.
    """
    check_length(length, "ptec")
    if prompt_learning_rate <= 0.0:
        raise LuthierError(
            f"the prompt's learning rate is {prompt_learning_rate}", where="ptec: prompt_learning_rate", fix="use more than 0"
        )
    head, term = multi_label(labels=labels, positive_weights=positive_weights)

    def start(table_VD: Tensor, services: Services) -> Tensors:
        return {"prompt_PD": drawn_from(table_VD, length, services)}

    def apply(tensors: Tensors, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        return stand_before(tensors["prompt_PD"], token_ids_BT, embeds_BTD)

    return Prompt(start, apply, length, own_rates={"prompt_PD": prompt_learning_rate}), head, term
