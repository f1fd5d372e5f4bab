"""A folder for Ollama: its template writes conversations as the chat template does, or none is written and that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.export.model import outputs
from luthier.export.ollama import NO_SYSTEM, OWN, export_ollama, modelfile, turns_of
from luthier.models import load_model
from luthier.models.tiny import CHAT_TEMPLATE
from luthier.rows.chat import form_of
from luthier.rows.template import choose
from luthier.runs.chat import prompt_ids
from luthier.runs.train import train
from tests.go_template import read_modelfile, render
from tests.tolerance import TINY, assert_rounded
from tests.unit.test_export_gguf import model_of, trained_tokenizer, tuned

DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHAT_TEMPLATE
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(first='') %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.first = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{ ns.first if loop.first else '' }}{{ message['content'] }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_THOUGHT = "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
THINKS = CHAT_TEMPLATE.replace("assistant\\n' }}", "assistant\\n' }}" + _THOUGHT)
IGNORES = CHAT_TEMPLATE.replace("{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'").replace(
    "'\\n' }}{% endfor %}", "'\\n' }}{% endif %}{% endfor %}"
)
ODD = (
    "{% for message in messages %}{{ '\\u00a0\\u200b\"\\\\' + message['role'] + '\\x07\\t ' + message['content'] }}"
    '{{ \'""" \\n"\' }}{% endfor %}'
)
COUNTS = CHAT_TEMPLATE.replace("message['role'] +", "message['role'] + (loop.index | string) +")
DATED = "{{ strftime_now('%d %B %Y') }}" + CHAT_TEMPLATE
SYSTEMS = {"chatml": CHAT_TEMPLATE, "default": DEFAULT, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "odd": ODD}
BEGIN = [name for name, template in SYSTEMS.items() if "bos_token" in template]
TALKS = [
    ["What is\n\n{{ 2 }}?"],
    ["Hi", 'Well,\n"you"\\', "Tell me more, é 🎻"],
    ["One", "two", "three", "four", "five"],
]


def tokenizer_of(template: str | None, bos: bool = False) -> Any:
    tokenizer = trained_tokenizer()
    tokens = ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_tokens([AddedToken(one, special=True, normalized=False) for one in tokens])
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = template
    return tokenizer


def spoken(texts: list[str], system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def template_in(tokenizer: Any) -> str:
    """The template out of the Modelfile of a tokenizer."""
    tune = tuned(model_of("llama"))
    return read_modelfile(modelfile(tune, tokenizer, turns_of(form_of(tokenizer))))[0]["TEMPLATE"]


@pytest.mark.parametrize(("name", "bos"), [(name, bos) for name in SYSTEMS for bos in (False, True) if not bos or name in BEGIN])
def test_conversations_are_written_as_by_the_chat_template(name: str, bos: bool) -> None:
    tokenizer = tokenizer_of(SYSTEMS[name], bos)
    template = template_in(tokenizer)
    for system in ("", "Be brief.\nBe {{ kind }}."):
        for texts in TALKS:
            talk = spoken(texts, system)
            written = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            # Ollama puts the first token there where the file says that readers add it.
            assert ("<|im_start|>" if bos else "") + render(template, talk) == written
            assert tuple(tokenizer(render(template, talk))["input_ids"]) == prompt_ids(tokenizer, talk)


def test_the_template_reads_as_people_write_it() -> None:
    assert template_in(tokenizer_of(DEFAULT)) == (
        '{{- if .System }}{{ "<|im_start|>system\\n" }}{{ .System }}{{ "<|im_end|>\\n" }}'
        '{{ else }}{{ "<|im_start|>system\\nYou help.<|im_end|>\\n" }}{{ end }}\n'
        "{{- range .Messages }}\n"
        '{{- if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}\n'
        '{{- else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}\n'
        "{{- end }}\n"
        '{{- end }}{{ "<|im_start|>assistant\\n" }}'
    )


def test_options_of_the_chat_template_are_in_it() -> None:
    tokenizer = tokenizer_of(THINKS)
    choose(tokenizer, None, {"enable_thinking": False})
    template = template_in(tokenizer)
    for texts in TALKS:
        written = render(template, spoken(texts, "Be brief."))
        assert written.endswith("assistant\n<think>\n\n</think>\n\n") and written.count("<think>") == 1
        assert tuple(tokenizer(written)["input_ids"]) == prompt_ids(tokenizer, spoken(texts, "Be brief."))


@pytest.mark.parametrize("template", [None, IGNORES, GEMMA2])
def test_what_is_written_without_system_turns(template: str | None) -> None:
    tokenizer = tokenizer_of(template)
    made = template_in(tokenizer)
    for texts in TALKS:
        assert tuple(tokenizer(render(made, spoken(texts)))["input_ids"]) == prompt_ids(tokenizer, spoken(texts))
    told = spoken(TALKS[1], "Be brief.")
    if template == GEMMA2:
        with pytest.raises(LuthierError):
            prompt_ids(tokenizer, told)
        with pytest.raises(LookupError, match=NO_SYSTEM):
            render(made, told)
    else:
        assert tuple(tokenizer(render(made, told))["input_ids"]) == prompt_ids(tokenizer, told)


@pytest.mark.parametrize(
    ("template", "bos", "why"),
    [
        (COUNTS, False, "by their place"),
        (DATED, False, "what day it is"),
        (CHAT_TEMPLATE, True, "does not begin with <|im_start|>"),
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"), False, "leaves out or repeats"),
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('<b>', '')"), False, "or their text"),
    ],
)
def test_what_it_cannot_write_is_left_to_the_file_and_said(template: str, bos: bool, why: str, tmp_path: Path) -> None:
    if bos:
        template = "x" + template
    tokenizer = tokenizer_of(template, bos)
    told = export_ollama(tuned(model_of("llama")), tokenizer, tmp_path / "out")
    assert told["template"].startswith(OWN) and why in told["template"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "TEMPLATE" not in read_modelfile(text)[0] and why in text


def test_what_neither_template_can_write_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(COUNTS + "{{ extra }}")
    choose(tokenizer, None, {"extra": "now"})
    with pytest.raises(LuthierError, match=r"rows\.chat_template"):
        export_ollama(tuned(model_of("llama")), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    dated = tokenizer_of(DATED)
    choose(dated, None, {"date": "2026-01-31"})
    assert render(template_in(dated), spoken(["Hi"])).startswith("31 January 2026<|im_start|>user")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {"temperature": "0", "repeat_penalty": "1"}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": "0", "repeat_penalty": "1"}),
        ({"do_sample": True}, {"temperature": "1", "top_k": "50", "top_p": "1", "min_p": "0", "repeat_penalty": "1"}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 99},
            {"temperature": "0.6", "top_k": "20", "top_p": "0.95", "min_p": "0", "repeat_penalty": "1.05", "num_predict": "99"},
        ),
    ],
)
def test_tokens_are_drawn_as_the_generation_settings_say(settings: dict[str, Any], wanted: dict[str, str]) -> None:
    tune, tokenizer = tuned(model_of("llama")), tokenizer_of(LLAMA3)
    tune.model.generation_config = GenerationConfig(**settings, eos_token_id=[0, 2])
    _, parameters = read_modelfile(modelfile(tune, tokenizer, turns_of(form_of(tokenizer))))
    assert [value for name, value in parameters if name == "stop"] == ["<|eot_id|>", "<|endoftext|>", "<|im_end|>"]
    assert {name: value for name, value in parameters if name != "stop"} == wanted


def test_a_run_becomes_a_folder_on_the_command_line(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")
    trained_tokenizer().save_pretrained(tmp_path / "base")
    run = train(
        {
            "model": str(tmp_path / "base"),
            "rows": {"train": [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(6)]},
            "tune": "lora",
            "train": {"steps": 2, "batch_rows": 4, "device": "cpu", "precision": "fp32", "learning_rate": 0.01},
            "out": str(tmp_path / "runs"),
        }
    )
    target = tmp_path / "out" / "robot"
    result = CliRunner().invoke(app, ["export", str(run.folder), str(target), "--as", "ollama", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (
        told["as"] == "ollama" and told["template"] == "in the Modelfile" and told["create"].startswith("ollama create robot -f ")
    )
    assert sorted(one.name for one in target.iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    ids = [[5, 9, 200, 31, 77, 8]]
    assert_rounded(outputs(load_model(str(target / "model.gguf")), ids)[0], outputs(run.model, ids)[0], TINY)
    instructions, _ = read_modelfile((target / "Modelfile").read_text())
    assert instructions["FROM"] == "./model.gguf"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    talk = spoken(TALKS[1], "Be brief.")
    assert render(instructions["TEMPLATE"], talk) == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    card = (target / "README.md").read_text()
    assert "library_name: gguf" in card and "```sh\nollama create robot -f robot/Modelfile" in card and "```python" not in card
    small = tmp_path / "out" / "small"
    result = CliRunner().invoke(app, ["export", str(run.folder), str(small), "--as", "ollama", "--quantize", "q8_0", "--json"])
    assert json.loads(result.stdout)["weights"] == "q8_0"
