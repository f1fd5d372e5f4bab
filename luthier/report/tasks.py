"""What a run's facts tell of sets that are tasks of the LM Evaluation Harness: settings, versions, and all values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Value = tuple[str, float | None, float | None]
"""A metric, as the harness calls it, before and after."""


class TaskFacts(NamedTuple):
    """One task, or the group that tasks belong to."""

    name: str
    version: str
    shots: str
    """Examples before each question; empty for a group."""
    items: int | None
    data: str
    """The data set and its part, as the hub names them."""
    values: tuple[Value, ...]


def tasks_of(entry: Mapping[str, Any]) -> tuple[TaskFacts, ...]:
    """The tasks of a set, the group first; none where it is no task."""
    told = entry.get("benchmark") or {}
    before, after = told.get("before") or {}, told.get("after") or {}
    found = []
    for name, values in after.items():
        task = (told.get("tasks") or {}).get(name) or {}
        data = ", ".join(str(task[key]) for key in ("dataset_path", "dataset_name") if task.get(key))
        both = tuple((metric, (before.get(name) or {}).get(metric), value) for metric, value in values.items())
        version, shots = task.get("version"), task.get("num_fewshot")
        found.append(
            TaskFacts(
                name, "" if version is None else str(version), "" if shots is None else str(shots), task.get("items"), data, both
            )
        )
    return tuple(found)


def settings_of(entry: Mapping[str, Any]) -> str:
    """How the tasks of a set were asked, in a sentence; empty where it is none."""
    told = entry.get("benchmark") or {}
    if not told:
        return ""
    said = [
        f"LM Evaluation Harness {told.get('harness')}",
        f"compared by {told.get('metric')}, {told.get('chosen')}",
        "prompts written with the chat template" + (", examples as turns of their own" if told.get("fewshot_as_multiturn") else "")
        if told.get("apply_chat_template")
        else "prompts without a chat template",
    ]
    said += [f"at most {told['limit']} items of each task"] if told.get("limit") else []
    said += [f"tasks of {told['include_path']} beside the harness's own"] if told.get("include_path") else []
    decoding: list[str] = []
    for task in (told.get("tasks") or {}).values():
        options = task.get("generation_kwargs")
        decoding += [", ".join(f"{key}: {value}" for key, value in options.items())] if options else []
    said += [f"generation: {one}" for one in dict.fromkeys(decoding)]
    return "; ".join(said)
