"""A toy callback: a running average of all trained numbers, which becomes the result."""

from __future__ import annotations

from luthier.kinds import Callback, Services, State
from luthier.registry import method


@method(title="Running average")
def average(*, decay: float = 0.9) -> Callback:
    """Average what trains over the steps and write the average when the stage ends.

    Args:
        decay: how much of the average stays at each step.
    """

    def start(services: Services) -> State:
        return {one.name: one.master.detach().clone() for one in services.trained()}

    def after_step(state: State, services: Services) -> None:
        for one in services.trained():
            now = one.master.detach()
            # Numbers that have come and gone have no past to average with.
            past = state.get(one.name)
            stays = past is not None and past.shape == now.shape
            state[one.name] = past.lerp(now, 1 - decay) if stays else now.clone()

    def after_stage(state: State, services: Services) -> None:
        for one in services.trained():
            services.write(one, state[one.name])

    return Callback(after_step, after_stage, start)
