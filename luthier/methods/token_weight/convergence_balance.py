"""CoBa (Gong et al., 2024), section 3, after the authors' code: tasks weighed by how fast their validation losses fall."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Callback, Services, State, StepTable, TokenWeight
from luthier.methods.token_weight._tasks import Unit, check_tasks, shares_of, spread, task_names, tasks_of
from luthier.registry import method

NAME = "convergence_balance"


@method(
    title="Convergence balance (CoBa)",
    paper="arXiv:2410.06741",
    row=251,
    reduces_to="until the losses were measured `window` times: task_balance",
    departs="the divergence factor is capped at 1, as in the paper and not in the code; losses are measured on the same rows every time, "
    "first before training, where the code takes one batch after another; weights begin to differ when `window` losses are there, where "
    "the code begins after 100 and fits to as many as there are up to 200; a task's mean is over the whole step",
)
def convergence_balance(
    *,
    validation_source: str,
    validation_rows: int = 64,
    every: int = 10,
    window: int = 5,
    temperature: float = 5.0,
    by: Unit = "tokens",
    column: str = "task",
) -> tuple[TokenWeight, Callback]:
    """Let tasks count more whose validation losses fall slower than the others', and less whose losses no longer fall.

    The mean loss of every task is measured between steps, divided by its first value, and a line is fitted to the last few values.
    Tasks have equal weights until there are enough of them. The loss is the sum of w_k L_k, as in `task_balance`.

    Args:
        validation_source: where the validation rows come from, named as under `rows` in a recipe; they must show every task.
        validation_rows: how many of its first rows are measured, without gradients.
        every: steps between two measurements; the authors' code measures one batch after every step.
        window: N, how many values a line is fitted to; 200 in the authors' code, where a value is of one batch.
        temperature: tau, how sharply the worst task's standstill is noticed; 5 as in the paper.
        by: what L_k is a mean over while training: `tokens`, the task's labels, or `rows`, see `task_balance`.
        column: the rows' free column that names their tasks, in texts or numbers.

    Raises:
        LuthierError: a number is out of range, a row has no task, or training meets a task that the validation rows do not have.
    """
    for name, value, least in (("validation_rows", validation_rows, 1), ("every", every, 1), ("window", window, 2)):
        if value < least:
            raise LuthierError(f"`{name}` is {value}", where=f"{NAME}: {name}", fix=f"use {least} or more")
    if temperature < 0.0:
        raise LuthierError(f"the temperature is {temperature}", where=f"{NAME}: temperature", fix="use 0 or more")

    def start(services: Services) -> State:
        losses = mean_losses(services, validation_rows, validation_source, column)
        first_K = torch.tensor(list(losses.values()), dtype=torch.float64)
        weight_K = torch.full_like(first_K, 1.0 / len(losses))
        return {"tasks": json.dumps(list(losses)), "losses": first_K[None], "weights": weight_K, "looked": 0}

    def after_step(state: State, services: Services) -> None:
        # Compared with what was done, not with the clock: a step without rows is not heard of here.
        times = services.now.after().step // every
        if times == state["looked"]:
            return
        state["looked"] = times
        losses = mean_losses(services, validation_rows, validation_source, column)
        loss_EK = torch.cat([state["losses"].cpu(), torch.tensor([list(losses.values())], dtype=torch.float64)])
        state["losses"] = loss_EK
        if len(loss_EK) >= window:
            ratio_EK = loss_EK / loss_EK[0].clamp(min=torch.finfo(loss_EK.dtype).tiny)
            largest_S = slopes(ratio_EK.amax(1, keepdim=True), window)[:, 0]
            state["weights"] = floored(task_weights(slopes(ratio_EK, window), largest_S, window, temperature))

    def look(table: StepTable) -> Tensor:
        assert table.state is not None
        known = dict(zip(json.loads(table.state["tasks"]), table.state["weights"].tolist(), strict=True))
        for task, weight in known.items():
            table.note(f"{NAME} {task}", weight)
        key_K, task_M = tasks_of(table, column, NAME)
        fix = "let the validation rows show every task, or raise validation_rows"
        return spread(table, task_M, shares_of(key_K, known, f"{NAME}: validation_source", fix), by)

    return TokenWeight(look=look, check=check_tasks(column, NAME)), Callback(after_step, start=start)


def mean_losses(services: Services, rows: int, source: str, column: str) -> dict[str, float]:
    """Every task's mean loss over its labels in the validation rows, in nats, by name and in the names' order.

    Raises:
        LuthierError: a row has no task, or no row has a target.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in services.batches(rows, source):
        view = services.forward(batch, ["nll"])
        # Not summed on an accelerator, where the order of additions may change from one call to the next.
        rows_N, nll_N = view.row_N.tolist(), view["nll"].tolist()
        names = task_names(batch, column, NAME)
        for row, nll in zip(rows_N, nll_N, strict=True):
            sums[names[row]] = sums.get(names[row], 0.0) + nll
            counts[names[row]] = counts.get(names[row], 0) + 1
    if not sums:
        raise LuthierError("the validation rows have no labels", where=f"{NAME}: validation_source", fix="use rows with answers")
    return {name: sums[name] / counts[name] for name in sorted(sums)}


def slopes(value_EK: Tensor, window: int) -> Tensor:
    """Slopes of the lines through every `window` values that follow each other, by least squares: [E, K] to [E - window + 1, K]."""
    x_W = torch.arange(window, dtype=value_EK.dtype) - (window - 1) / 2
    return value_EK.unfold(0, window, 1) @ x_W / x_W.square().sum()


def task_weights(slope_SK: Tensor, largest_S: Tensor, window: int, temperature: float) -> Tensor:
    """The tasks' weights [K], which add up to 1, after slopes were taken S times.

    Args:
        slope_SK: slopes of the tasks' losses, negative where they fall.
        largest_S: slopes of the largest of all tasks' losses.
        window: N, how many of its last slopes a task is compared with.
        temperature: tau.
    """
    steps, tasks = slope_SK.shape
    now_K, last_NK = slope_SK[-1], slope_SK[-window:]
    relative_K = (tasks * _share(now_K, slope_SK[-1])).softmax(0)
    absolute_K = (-len(last_NK) * _share(now_K, last_NK)).softmax(0)
    divergence = (steps * (-temperature * steps * _share(largest_S, largest_S)).softmax(0)[-1]).clamp(max=1.0)
    return (tasks * (divergence * relative_K + (1.0 - divergence) * absolute_K)).softmax(0)


def _share(value: Tensor, among: Tensor) -> Tensor:
    """Values divided by the sum of magnitudes along the first axis of others; 0 where all of these are."""
    return value / among.abs().sum(0).clamp(min=torch.finfo(value.dtype).tiny)


def floored(weight_K: Tensor) -> Tensor:
    """Weights of which none is below 1 / (10 K): where one would be, a tenth of all is shared out evenly."""
    least = 1.0 / (10 * len(weight_K))
    return weight_K * 0.9 + least if bool((weight_K < least).any()) else weight_K
