"""What the routers of a mixture of experts say while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from luthier.errors import LuthierError
from luthier.models.experts import Router, chosen_by, routers_of
from luthier.tune.attached import Attached


@contextmanager
def listening(tune: Attached) -> Iterator[Sequence[tuple[Tensor, Tensor]]]:
    """Keep the logits of each router, and where it sent the tokens, both [N, E], in the order of the blocks.

    Raises:
        LuthierError: the model has no routers, or one of them was not asked.
    """
    routers = routers_of(tune.model, tune.parts)
    said: dict[str, tuple[Tensor, Tensor]] = {}
    heard: list[tuple[Tensor, Tensor]] = []

    def hook(router: Router) -> Callable[[Any, Any, Any], None]:
        top_k = chosen_by(tune.model, router.module) or 1

        def listen(module: Any, arguments: Any, output: Any) -> None:
            said[router.module] = router.logits(output), router.chosen(output, top_k)

        return listen

    handles = [tune.model.get_submodule(router.module).register_forward_hook(hook(router)) for router in routers]
    try:
        yield heard
    finally:
        # What is checkpointed runs again in backward: nobody listens then.
        for handle in handles:
            handle.remove()
    silent = next((router.module for router in routers if router.module not in said), None)
    if silent is not None or not routers:
        raise LuthierError(
            "no router was asked where tokens go",
            where=silent or tune.parts.architecture,
            fix="use a family whose router_logits transformers records",
        )
    heard.extend(said[router.module] for router in routers)
