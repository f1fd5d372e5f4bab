"""Evaluation sets on a model behind an endpoint: what it answers is scored as a model's own answers are.

The endpoint writes prompts with its own chat template and tells no likelihoods, so its numbers stand for the service as it is served, and
only metrics of generated answers can be measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from luthier.errors import LuthierError, Say, silent
from luthier.evaluate.answered import answered
from luthier.evaluate.items import prompt_text
from luthier.evaluate.sets import EvalSet, SetResult, result_of
from luthier.generation.endpoint import Endpoint
from luthier.rows.messages import Message
from luthier.rows.shapes import Row

_SENT = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Of a message, what endpoints know."""
ENDPOINT = "endpoint:"
"""How an endpoint's address begins where a model could stand."""


def measure_served(client: Endpoint, sets: Sequence[EvalSet], *, say: Say = silent) -> dict[str, SetResult]:
    """Measure an endpoint on sets, by name in their order. Answers are asked for at temperature 0.

    Args:
        client: the endpoint. Prompts are sent to it, and accepted answers are not.
        sets: what to measure.
        say: hears of each set.

    Raises:
        LuthierError: a set's metric needs more than answers, a row has tools, or the endpoint refuses or fails.
    """
    for one in sets:
        _check(one)
    found = {}
    for one in sets:
        say(f"measuring {one.name}: {one.chosen_metric} of {len(one.used)} rows, answered by {client.described()}")
        earlier = client.used
        asked = [messages_of(row) for row in one.used]
        replies = client.ask(asked, temperature=0.0, max_tokens=one.max_new_tokens, say=say)
        items, told = answered(one.chosen, [reply.text for reply in replies], one.used, say)
        used = {
            "endpoint": client.shown,
            "model": client.model,
            "models": sorted({reply.model for reply in replies if reply.model}),
            "cut": sum(reply.finish_reason == "length" for reply in replies),
            **asdict(client.used.since(earlier)),
        }
        digest = hashlib.sha256(json.dumps(one.chosen.asked([asked, one.max_new_tokens])).encode()).hexdigest()
        found[one.name] = replace(result_of(one, items, digest), told={**told, "served": used})
    return found


def messages_of(row: Row) -> list[Mapping[str, Any]]:
    """What a row asks, as messages; an answer that it holds is left out."""
    given: Any = row.fields.get("messages" if row.shape == "messages" else "prompt")
    if isinstance(given, str) or given is None:
        return [{"role": "user", "content": prompt_text(row)}]
    turns: list[Message] = list(given)
    if row.shape == "messages" and turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return [{key: value for key, value in turn.items() if key in _SENT} for turn in turns]


def _check(one: EvalSet) -> None:
    place = f"evaluation set `{one.name}`"
    if one.chosen.task is not None:
        what = "tasks of the evaluation harness are asked of a model in memory, and an endpoint is none"
        raise LuthierError(what, where=place, fix="leave the set out, or measure the model itself: luthier eval MODEL")
    if one.known.needs != "generation":
        raise LuthierError(
            f"`{one.chosen_metric}` needs more than answers ({one.known.meaning}), and an endpoint gives answers alone",
            where=place,
            fix="use a metric of generated answers, or measure the model itself: luthier eval MODEL RECIPE",
        )
    for row in one.used:
        if row.shape == "text":
            what = "the row is a text to go on from, and an endpoint answers questions"
            raise LuthierError(what, where=f"{place}, {row.place}", fix="write it as a `prompt`, or measure the model itself")
        if row.fields.get("tools"):
            what = "the row has tools, and calls that an endpoint answers with are not read"
            raise LuthierError(
                what, where=f"{place}, {row.place}", fix="write the tools into the prompt, or measure the model itself"
            )
