"""TL-Training (Ye et al., 2024), section 4.2: the tokens of a call that choose the tool count more."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import TokenWeight, View
from luthier.methods.token_weight._tool_calls import END, KEY, TOOL_CALLS
from luthier.registry import method


@method(
    title="TL-Training, key tokens of tool calls",
    paper="arXiv:2412.15495",
    row=16,
    reduces_to="max_weight 1: plain cross-entropy",
    departs="the paper's batch is one turn and its loss that turn's weighted mean; here every turn's weighted mean counts by its number of "
    "labels, and all calls of a turn have their key tokens, not the first alone; tokens are found in the text, not by their spelling in "
    "one tokenizer; the third stage, PPO with a reward by rules, is left out",
)
def tl_weights(*, max_weight: float = 9.0) -> TokenWeight:
    """Let the tokens that choose a tool weigh as much as all others of the turn together, but at most so many times one of them.

    Key tokens are the first of a tool's name, and those at which the names of other tools that the row offers part from it. They are
    found in `tool_calls` as the chat template writes them, or in calls written as text, `name(...)`, with a name of the row's `tools`.
    Tokens that end a parameter are left out of the comparison and weigh 1, and so does all of a turn without a call. Within a turn the
    weights have the mean 1.

    Args:
        max_weight: the most that a key token weighs beside another; 9 in the authors' code, 1 gives plain cross-entropy.

    Raises:
        LuthierError: `max_weight` is less than 1.
    """
    if not max_weight >= 1.0 or not isfinite(max_weight):
        raise LuthierError(f"`max_weight` is {max_weight}", where="tl_weights: max_weight", fix="use 1 or more")

    def weigh(view: View) -> Tensor:
        mark_N, one_N = view.token_column(TOOL_CALLS.name), torch.ones_like(view["nll"])
        turn_N = turns(view)

        def sum_turns(value_N: Tensor) -> Tensor:
            return value_N.new_zeros(len(value_N)).index_add(0, turn_N, value_N)[turn_N]

        key_N = (mark_N == KEY).to(one_N)
        total_N, keys_N = sum_turns(one_N), sum_turns(key_N)
        others_N = total_N - keys_N - sum_turns((mark_N == END).to(one_N))
        raised_N = (others_N / keys_N.clamp(min=1)).clamp(1.0, max_weight)
        weight_N = torch.where(key_N > 0, raised_N, 1.0)
        return weight_N * total_N / (total_N + keys_N * (raised_N - 1))

    return TokenWeight(weigh, ("nll",), annotation=TOOL_CALLS)


def turns(view: View) -> Tensor:
    """Numbers the turns of a batch at its labels, [N]: a turn is a run of labels that follow each other directly."""
    row_N, position_N = view.row_N, view.position_N
    begins_N = torch.ones_like(row_N)
    begins_N[1:] = ((row_N[1:] != row_N[:-1]) | (position_N[1:] != position_N[:-1] + 1)).to(row_N)
    return begins_N.cumsum(0) - 1
