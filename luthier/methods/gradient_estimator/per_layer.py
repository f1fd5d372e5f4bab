"""Updates inside backward: each tensor takes its step as soon as its gradient is complete, and the gradient is freed
(Lv et al., 2023, section 3: LOMO fuses gradient and update)."""

from __future__ import annotations

from luthier.kinds import GradientEstimator, Pass, TrainedLike
from luthier.registry import method


@method(
    title="Per-layer updates",
    paper="arXiv:2306.09782",
    departs="works with any optimizer whose state fits, not with SGD alone; accumulation is exact but then saves no memory",
)
def per_layer() -> GradientEstimator:
    """Hold one tensor's gradient at a time instead of all."""

    def gradients(work: Pass) -> None:
        for batch in work.batches[:-1]:
            work.backward(batch)

        def step_now(trained: TrainedLike) -> None:
            work.apply(trained)

        with work.when_ready(step_now):
            work.backward(work.batches[-1])
        # What the last micro-batch did not touch still holds gradients of earlier ones.
        for trained in work.trained:
            if trained.gradient is not None:
                work.apply(trained)

    return GradientEstimator(gradients, gives=frozenset({"gradients"}))
