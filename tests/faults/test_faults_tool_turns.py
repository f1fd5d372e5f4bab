"""Turns of tools in the templates of several families: calls are learned to their own end, results are context."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import LuthierError
from tests.faults.test_faults_templates import GEMMA, byte_level, encoded, learned

CHATML_TOOLS = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL_TOOLS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson + ('' if loop.last else ', ') }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI_TOOLS = (
    "{% for m in messages %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>\\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CALL = '{"name": "add", "arguments": {"a": 1}}'
FAMILIES = {
    "chatml": (CHATML_TOOLS, f"<tool_call>\n{CALL}\n</tool_call><|im_end|>", "It is 2.<|im_end|>"),
    "mistral": (MISTRAL_TOOLS, f"[TOOL_CALLS] [{CALL}]</s>", " It is 2.</s>"),
    "phi": (PHI_TOOLS, f"{CALL}<|end|>", "It is 2.<|end|>"),
}


def record(results: int = 1) -> dict[str, Any]:
    """A question, a call, the tool's results and the answer."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    return {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            *({"role": "tool", "content": f"result {index}"} for index in range(results)),
            {"role": "assistant", "content": "It is 2."},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }


@pytest.mark.parametrize("results", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_learned_and_results_are_context(family: str, results: int) -> None:
    """Fault 9: a call and the answer behind its result end as the model ends them; no word of the tool is a target."""
    template, call, answer = FAMILIES[family]
    tokenizer = byte_level(template)
    row = encoded(record(results), tokenizer)
    assert learned(row, tokenizer) == [call, answer]
    # These templates write calls, and no tools.
    assert row.notes == ("the chat template does not write the row's `tools`",)
    assert f"result {results - 1}" in tokenizer.decode(row.token_ids)
    assert learned(encoded(record(results), tokenizer, loss_on="last"), tokenizer) == [answer]


def test_a_template_that_knows_no_tools_says_so() -> None:
    """Fault 9: where the template refuses a tool's turn, the row is refused with its reason and never learned in part."""
    with pytest.raises(LuthierError, match="Roles must alternate"):
        encoded(record(), byte_level(GEMMA))
