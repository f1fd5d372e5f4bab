"""The server of chats: what it answers is what `luthier chat` answers, in OpenAI's form, and nothing else is served."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.generation.generate import generate
from luthier.runs import completions
from luthier.runs import serve as serving
from luthier.runs.chat import Chat
from luthier.runs.completions import WAITING, Completions, RefusedError, Request, _Told
from luthier.runs.serve import KEY, MOST_BYTES, Server, serve
from tests.unit.test_saving import ROWS, trained

QUESTION = "What is 3 and 3?"
HOW = {"max_tokens": 16, "temperature": 0}


@contextmanager
def listening(answers: Completions, host: str = "127.0.0.1") -> Iterator[Server]:
    with serve(answers, host=host, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module", params=["lora", "prompt_tuning"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(trained(tmp_path_factory.mktemp("runs"), request.param).folder)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Server]:
    with listening(Completions(Chat("tiny:llama"))) as server:
        yield server


def send(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """What a request gives: the status, and JSON, or the events of a stream."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    try:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, raw, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        text = response.read().decode()
        if response.headers.get_content_type() == "text/event-stream":
            return response.status, [one.removeprefix("data: ") for one in text.split("\n\n") if one]
        assert response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text)
    finally:
        connection.close()


def asked(server: Server, **keys: Any) -> dict[str, Any]:
    return {"model": server.completions.name, "messages": [{"role": "user", "content": QUESTION}], **HOW, **keys}


def complete(server: Server, **keys: Any) -> tuple[int, Any]:
    return send(server, "POST", "/v1/chat/completions", asked(server, **keys))


def test_an_answer_is_that_of_the_chat_with_what_stands_beside_the_weights(run: str) -> None:
    chat = Chat(run, max_new_tokens=16)
    expected, base = chat.ask(QUESTION), chat.ask_base(QUESTION)
    assert expected != base
    with listening(Completions(chat)) as server:
        status, told = complete(server)
        assert status == 200 and told["object"] == "chat.completion" and told["model"] == Path(run).name
        (choice,) = told["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
        usage = told["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        status, events = complete(server, stream=True, stream_options={"include_usage": True})
        assert status == 200 and events[-1] == "[DONE]"
        pieces = [json.loads(one) for one in events[:-1]]
        assert {one["object"] for one in pieces} == {"chat.completion.chunk"} and len({one["id"] for one in pieces}) == 1
        assert pieces[-1]["choices"] == [] and pieces[-1]["usage"] == usage
        deltas = [one["choices"][0]["delta"] for one in pieces[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert "".join(one.get("content", "") for one in deltas) == expected and len(deltas) > 4
        assert pieces[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_turns_before_and_draws_are_those_of_the_chat(tiny: Server) -> None:
    chat = Chat("tiny:llama", max_new_tokens=16, temperature=1.0, top_p=0.9, seed=5, system="Be brief.")
    first = chat.say_turn("One")
    second = chat.say_turn("Two")
    system = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": "One"}]
    turns = [*system, {"role": "assistant", "content": first}, {"role": "user", "content": "Two"}]
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    assert complete(tiny, messages=turns, **drawn)[1]["choices"][0]["message"]["content"] == second
    assert complete(tiny, messages=system, **drawn)[1]["choices"][0]["message"]["content"] == first
    others = {complete(tiny, temperature=1.0)[1]["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(others) > 1, "without a seed each answer has draws of its own"


def test_a_system_turn_of_the_server_stands_where_a_conversation_has_none(tiny: Server) -> None:
    expected = Chat("tiny:llama", max_new_tokens=16, system="Be brief.").ask(QUESTION)
    own = [{"role": "system", "content": "Shout."}, {"role": "user", "content": QUESTION}]
    with listening(Completions(Chat("tiny:llama", system="Be brief."))) as server:
        assert complete(server)[1]["choices"][0]["message"]["content"] == expected
        assert complete(server, messages=own)[1]["choices"] == complete(tiny, messages=own)[1]["choices"]
    assert complete(tiny)[1]["choices"][0]["message"]["content"] != expected


def test_an_answer_ends_where_it_is_asked_to(tiny: Server) -> None:
    whole = complete(tiny)[1]
    text = whole["choices"][0]["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == 16
    stop = text[5:7]
    (choice,) = complete(tiny, stop=[stop, "never there"])[1]["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    events = complete(tiny, stop=stop, stream=True)[1]
    deltas = [json.loads(one)["choices"][0]["delta"].get("content", "") for one in events[:-1]]
    assert "".join(deltas) == text[: text.index(stop)]
    assert complete(tiny, max_tokens=3)[1]["usage"]["completion_tokens"] == 3
    assert complete(tiny, max_tokens=3, max_completion_tokens=2)[1]["usage"]["completion_tokens"] == 2


def test_without_a_length_an_answer_may_fill_the_context(tiny: Server) -> None:
    long = "x" * 470
    told = complete(tiny, max_tokens=None, messages=[{"role": "user", "content": long}])[1]
    prompt = told["usage"]["prompt_tokens"]
    assert told["usage"]["total_tokens"] <= 512 < prompt + tiny.completions.max_new_tokens
    status, refused = complete(tiny, max_tokens=512 - prompt + 1, messages=[{"role": "user", "content": long}])
    assert status == 400 and refused["error"]["code"] == "context_length_exceeded"


def told_in_pieces(stop: tuple[str, ...], *texts: str) -> tuple[list[str], _Told]:
    heard: list[str] = []
    told = _Told(stop, lambda text: heard.append(text) is None)
    for tokens, text in enumerate(texts[:-1], start=1):
        if not told.so_far(text, tokens):
            break
    told.last(texts[-1])
    return heard, told


def test_what_is_told_holds_no_half_character_and_no_beginning_of_an_end() -> None:
    heard, told = told_in_pieces(("END",), "a", "aE", "aEN", "aEN\ufffd", "aENé", "aENéE", "aENéEN")
    assert heard == ["a", "ENé", "EN"] and told.text == "aENéEN" and not told.ended
    heard, told = told_in_pieces(("END", "N"), "a", "aE", "aENDb")
    assert heard == ["a"] and told.text == "a" and told.ended, "the first of the ends counts"
    heard, told = told_in_pieces((), "a", "a\ufffd", "aé")
    assert heard == ["a", "é"]


def test_an_answer_that_nobody_hears_is_not_written_on() -> None:
    chat = Chat("tiny:llama")
    heard: list[str] = []
    how = Completions(chat).check({"model": "tiny:llama", "messages": [{"role": "user", "content": "a"}], "max_tokens": 16})
    answered = Completions(chat).answer(how, lambda text: heard.append(text) is not None)
    assert len(heard) == 1 and answered.tokens < 16 and answered.text == heard[0]


def test_one_of_several_answers_is_ended_and_the_others_go_on() -> None:
    chat = Chat("tiny:llama")
    prompts = [(5, 9, 11), (5, 9, 11, 12, 13), (40,)]
    counts: dict[int, int] = {}

    def hear(place: int, ids: Any) -> bool:
        counts[place] = len(ids)
        return place != 1 or len(ids) < 3

    whole = generate(chat.tune, chat.tokenizer, prompts, max_new_tokens=8)
    found = generate(chat.tune, chat.tokenizer, prompts, max_new_tokens=8, hear=hear)
    assert counts == {0: 8, 1: 3, 2: 8}
    assert [found[0], found[2]] == [whole[0], whole[2]] and whole[1].startswith(found[1]) and found[1] != whole[1]


@pytest.mark.parametrize(
    ("keys", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]}, 400, "messages"),
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"seed": "1"}, 400, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"top_k": 5}, 400, "top_k"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(keys: dict[str, Any], status: int, param: str, tiny: Server) -> None:
    found, told = complete(tiny, **keys)
    assert found == status and told["error"]["param"] == param and told["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_taken(tiny: Server) -> None:
    expected = complete(tiny)[1]["choices"]
    same = {"n": 1, "tools": [], "logprobs": False, "user": "me", "frequency_penalty": 0.0, "seed": None, "stop": None}
    assert complete(tiny, **same, response_format={"type": "text"})[1]["choices"] == expected


def test_a_request_need_not_name_the_only_model(tiny: Server) -> None:
    """Without `model` the answer was that there is no model `None`."""
    wanted = complete(tiny)
    assert wanted[0] == 200
    found = complete(tiny, model=None)
    assert found[0] == 200 and found[1]["choices"] == wanted[1]["choices"]


def test_models_are_listed_and_files_are_not(tiny: Server) -> None:
    status, told = send(tiny, "GET", "/v1/models")
    assert status == 200 and told["object"] == "list" and [one["id"] for one in told["data"]] == ["tiny:llama"]
    assert send(tiny, "GET", "/v1/models/tiny:llama") == (200, told["data"][0])
    assert send(tiny, "GET", "/health") == (200, {"status": "ok"})
    for method, path in (("GET", "/"), ("GET", "/v1/models/../../etc/passwd"), ("GET", "/etc/passwd"), ("POST", "/v1/completions")):
        status, told = send(tiny, method, path, {} if method == "POST" else None)
        assert status == 404 and told["error"]["code"] == "not_found"
    assert send(tiny, "PUT", "/v1/models", {})[0] == 501


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"\xff", {}, 400),
        (b'{"model": NaN}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"{}", {"Content_Type": "text/plain"}, 415),
        (b"{}", {"Content_Length": "no"}, 411),
        (b"", {"Content_Length": str(MOST_BYTES + 1)}, 413),
        (b"{}", {"Transfer_Encoding": "chunked"}, 411),
        (b"{}", {"Host": "evil.example:80"}, 403),
        (b"{}", {"Host": "localhost.evil.example"}, 403),
        (b"{}", {"Origin": "http://localhost:3000"}, 403),
    ],
)
def test_bodies_and_senders_that_are_not_taken(body: bytes, headers: dict[str, str], status: int, tiny: Server) -> None:
    found, told = send(tiny, "POST", "/v1/chat/completions", body, **headers)
    assert found == status and told["error"]["message"]
    assert complete(tiny)[0] == 200, "and the next request is answered"


def test_other_names_of_this_machine_are_answered(tiny: Server) -> None:
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"):
        assert send(tiny, "GET", "/v1/models", Host=host)[0] == 200


def test_a_key_is_asked_for_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-mine")
    with listening(Completions(Chat("tiny:llama"))) as server:
        assert [
            send(server, "GET", "/v1/models", **({"Authorization": one} if one else {}))[0] for one in ("", "Bearer sk-other")
        ] == [
            401,
            401,
        ]
        assert send(server, "GET", "/v1/models", Authorization="Bearer sk-mine")[0] == 200


def test_too_many_that_wait_are_told_so(tiny: Server) -> None:
    room = tiny.completions._room
    for _ in range(WAITING):
        assert room.acquire(blocking=False)
    try:
        for stream in (False, True):
            status, told = complete(tiny, stream=stream)
            assert status == 503 and told["error"]["code"] == "overloaded" and told["error"]["type"] == "server_error"
    finally:
        for _ in range(WAITING):
            room.release()
    assert complete(tiny)[0] == 200


def test_what_breaks_off_in_a_stream_is_told_in_it(tiny: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(request: Request, hear: Any) -> Any:
        hear("so far")
        raise RefusedError("the model gives numbers that are not finite", status=500)

    monkeypatch.setattr(tiny.completions, "answer", breaks)
    events = complete(tiny, stream=True)[1]
    assert json.loads(events[-1])["error"]["type"] == "server_error" and "[DONE]" not in events


def test_a_model_that_fails_is_told_and_the_server_goes_on(tiny: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(completions, "answer", fails)
        for stream in (False, True):
            status, told = complete(tiny, stream=stream)
            assert status == 500 and told["error"]["message"] == "the model gives no answer: MemoryError: no room"
    assert complete(tiny)[0] == 200


def test_what_cannot_be_served_is_refused(tmp_path: Path, tiny: Server) -> None:
    rows = [{"text": row["prompt"], "label": "even"} for row in ROWS] + [{"text": "odd", "label": "odd"}]
    run = trained(tmp_path, "lora", objective={"classify": {"labels": ["even", "odd"]}}, rows={"train": rows})
    with pytest.raises(LuthierError, match="`classify` is a head"):
        Completions(Chat(str(run.folder)))
    with pytest.raises(LuthierError, match="cannot be listened on"):
        serve(tiny.completions, port=tiny.server_address[1])
    with pytest.raises(LuthierError, match="no port"):
        serve(tiny.completions, port=70_000)


def test_the_command_prints_a_line_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Server, poll_interval: float = 0.5) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving.Server, "serve_forever", interrupted)
    told = CliRunner().invoke(app, ["serve", "tiny:llama", "--port", "0", "--json"])
    facts = json.loads(told.stdout)
    assert told.exit_code == 0 and facts["url"].startswith("http://127.0.0.1:") and "warning" not in facts
    assert facts["curl"].startswith(f"curl {facts['url']}/chat/completions")
    shown = CliRunner().invoke(app, ["serve", "tiny:llama", "--port", "0", "--host", "0.0.0.0", "--quiet"])
    assert shown.exit_code == 0 and "whoever reaches 0.0.0.0" in shown.stdout and "curl http://0.0.0.0:" in shown.stdout
