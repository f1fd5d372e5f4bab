"""ProMoT (Wang et al., 2022), section 4: a prompt learns the format of a task first, then the model learns the task behind it."""

from __future__ import annotations

from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Freezing, Now, Prompt, Services, State, Tensors, TrainedLike
from luthier.methods.prompt._virtual import check_length, drawn_from, stand_before
from luthier.registry import method

PROMPT = "promot_PD"
"""The name of the prompt's tensor, by which it is told from all others that train."""


@method(
    title="Prompt Tuning with Model Tuning",
    paper="arXiv:2211.00635",
    row=238,
    reduces_to="share 1: prompt tuning",
    departs="both phases are shares of one run, with one optimizer, and the second begins the learning rate schedule again; the default "
    "length is 20, where the paper has 100; AdamW, where it has Adafactor",
    step0="on purpose not the base",
    merges="never",
    learning_rate=1e-3,
    replication="promot",
)
def promot(*, length: int = 20, share: float = 0.5, prompt_learning_rate: float = 0.1) -> tuple[Prompt, Freezing]:
    """Train a prompt alone first, then freeze it and train all else, to keep the model general.

    It stands beside what trains the model: `tune: [promot, full]`, or lora, or another. The task that was learned is used with the
    prompt, as a run is opened. Other tasks are used without it: the run's `delta.safetensors`, applied to the base, is that model.

    Args:
        length: P, tokens of the prompt, which start as embeddings of common tokens.
        share: how much of the run trains the prompt; the paper has 5,000 steps, and 1,000 to 5,000 for the model.
        prompt_learning_rate: the learning rate of the prompt, whatever that of the model is; it follows the run's schedule. A third of the
            paper's 0.3, which is in Adafactor, whose steps are relative to the numbers.

    Raises:
        LuthierError: an option is out of range.
    """
    check_length(length, "promot")
    if not 0.0 < share <= 1.0:
        raise LuthierError(
            f"the share is {share}",
            where="promot: share",
            fix="use more than 0 and at most 1, or leave promot out to tune the model alone",
        )
    if prompt_learning_rate <= 0.0:
        raise LuthierError(
            f"the prompt's learning rate is {prompt_learning_rate}", where="promot: prompt_learning_rate", fix="use more than 0"
        )
    ends = (share,) if share < 1.0 else ()

    def start(table_VD: Tensor, services: Services) -> Tensors:
        return {PROMPT: drawn_from(table_VD, length, services)}

    def apply(tensors: Tensors, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        return stand_before(tensors[PROMPT], token_ids_BT, embeds_BTD)

    def frozen(trained: TrainedLike, state: State, now: Now) -> bool:
        return now.phase(ends) == 1

    return (
        Prompt(start, apply, length, own_rates={PROMPT: prompt_learning_rate}),
        Freezing(frozen, ends=ends, restart=True, alone=frozenset({0})),
    )
