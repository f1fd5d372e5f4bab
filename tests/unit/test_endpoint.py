"""The client for OpenAI-compatible endpoints: what is sent, tried again, kept, counted and stopped, against a stub on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.generation import endpoint as client
from luthier.generation.endpoint import Endpoint, UnansweredError, Usage
from luthier.generation.endpoint_address import address, key_in, key_variable
from tests.stub_endpoint import KEY, Reply, Stub, refused, said


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which are not waited for."""
    found: list[float] = []

    def pause(stop: threading.Event, seconds: float) -> bool:
        found.append(seconds)
        return stop.is_set()

    monkeypatch.setattr(client, "pause_for", pause)
    return found


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_sent_and_in_which_order_it_comes_back(stub: Stub) -> None:
    stub.answer = lambda body: body["messages"][-1]["content"].upper()
    one = Endpoint(stub.url, "small", extra_body={"top_p": 0.5, "seed": None})
    found = one.ask(asked("a", "b", "c"), temperature=0.25, max_tokens=7)
    assert [answer.text for answer in found] == ["A", "B", "C"]
    assert found[0]._asdict() == {
        "text": "A", "finish_reason": "stop", "model": "stub-2026", "prompt_tokens": 10, "completion_tokens": 5, "cached": False,
    }  # fmt: skip
    sent = {"model": "small", "temperature": 0.25, "max_tokens": 7, "top_p": 0.5}
    assert sorted(stub.bodies, key=json.dumps) == [{**sent, "messages": messages} for messages in asked("a", "b", "c")]
    assert set(stub.paths) == {"/v1/chat/completions"} and set(stub.authorizations) == {f"Bearer {KEY}"}
    plain = Endpoint(stub.url, "small", cache=False)
    plain.ask(asked("a\ud800"), seeds=[4])
    plain.ask(asked("a"), temperature=None, max_tokens=None)
    assert stub.bodies[-2] == {
        "model": "small", "messages": asked("a\ud800")[0], "temperature": 0.0, "max_tokens": 1024, "seed": 4,
    }  # fmt: skip
    assert stub.bodies[-1] == {"model": "small", "messages": asked("a")[0], "seed": 0}


def test_nothing_is_asked_twice(stub: Stub, tmp_path: Path) -> None:
    """Equal requests are one; what is kept is found by all that decides the answer, and by nothing else."""
    one = Endpoint(stub.url, "small")
    assert [answer.text for answer in one.ask(asked("a", "a", "b"))] == ["yes"] * 3
    assert one.used == Usage(requests=2, cached=1, prompt_tokens=20, completion_tokens=10) and one.used.tokens == 30
    again = Endpoint(stub.url, "small", num_concurrent=1)
    assert [(answer.text, answer.cached) for answer in again.ask(asked("b", "a"))] == [("yes", True)] * 2
    assert again.used == Usage(cached=2) and len(stub.bodies) == 2
    others: list[Callable[[], Any]] = [
        lambda: Endpoint(stub.url, "large").ask(asked("a")),
        lambda: Endpoint(stub.url + "/chat/completions?v=2", "small").ask(asked("a")),
        lambda: Endpoint(stub.url, "small", extra_body={"top_p": 0.5}).ask(asked("a")),
        lambda: one.ask(asked("a"), seeds=1),
        lambda: one.ask(asked("a"), temperature=0.1),
        lambda: one.ask(asked("a"), max_tokens=9),
        lambda: Endpoint(stub.url, "small", cache=False).ask(asked("a")),
        lambda: Endpoint(stub.url, "small", cache=str(tmp_path / "elsewhere")).ask(asked("a")),
    ]
    for number, other in enumerate(others, start=3):
        other()
        assert len(stub.bodies) == number
    assert len(files_below(tmp_path / "cache" / "endpoint")) == 8 and len(files_below(tmp_path / "elsewhere")) == 1


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"answer": {"text": 3}}', '{"answer": {"txt": "a"}}', '{"answer": {"text": "a", "prompt_tokens": "3"}}']
)
def test_a_damaged_answer_is_asked_for_again(stub: Stub, tmp_path: Path, damage: str) -> None:
    one = Endpoint(stub.url, "small")
    one.ask(asked("a"))
    (file,) = files_below(tmp_path / "cache")
    assert json.loads(file.read_text())["answer"]["text"] == "yes"
    file.write_text(damage)
    assert one.ask(asked("a"))[0].text == "yes" and len(stub.bodies) == 2


def test_several_are_under_way_and_no_more_than_allowed(stub: Stub) -> None:
    """Each answer waits until three are asked for, so two at a time would never end."""
    together = threading.Barrier(3, timeout=20)

    def answer(body: dict[str, Any]) -> str:
        together.wait()
        return "yes"

    stub.answer, stub.slow = answer, 0.02
    Endpoint(stub.url, "small", num_concurrent=3).ask(asked(*map(str, range(9))))
    assert stub.most_at_once == 3 and len(stub.bodies) == 9


def test_what_passes_is_tried_again(stub: Stub, pauses: list[float]) -> None:
    """Pauses double, up to a quarter more or less; where the endpoint says how long, it is that."""
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), usegmt=True)
    stub.failures = [
        refused(429), refused(500), refused(503), refused(408),
        refused(429, Retry_After="7.5"), refused(429, Retry_After=date), refused(503, Retry_After="soon"),
    ]  # fmt: skip
    heard: list[str] = []
    one = Endpoint(stub.url, "small", max_retries=7)
    assert one.ask(asked("a"), say=heard.append)[0].text == "yes"
    for number, base in {0: 1, 1: 2, 2: 4, 3: 8, 6: 60}.items():
        assert 0.75 * base <= pauses[number] <= 1.25 * base, number
    assert pauses[4] == 7.5 and 60 < pauses[5] <= 100
    assert one.used == Usage(requests=1, retries=7, prompt_tokens=10, completion_tokens=5)
    assert any("answers 429: no; again in 8 s (5 of 7)" in one for one in heard)


def test_tries_end(stub: Stub, pauses: list[float]) -> None:
    stub.failures = [refused(500, "overloaded")] * 9
    with pytest.raises(UnansweredError, match="answers 500: overloaded, after 3 tries") as caught:
        Endpoint(stub.url, "small", max_retries=2).ask(asked("a"))
    assert len(stub.bodies) == 3 and len(pauses) == 2 and caught.value.where == f"small at {stub.url}"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (refused(400, "max_tokens is not supported", code="unsupported_parameter"), ["400: max_tokens is not supported", "extra_body"]),
        (refused(404, "no such model"), ["404: no such model", "/v1"]),
        (refused(429, "quota", code="insufficient_quota"), ["429: quota", "account"]),
        (refused(429, Retry_After="86400"), ["429", "wait"]),
        (Reply(302, "", {"Location": "http://elsewhere.invalid/"}), ["answers 302: it has moved", "address"]),
        (Reply(400, {"detail": "a\x1b[31m\nb"}), ["400: a [31m b"]),
        (Reply(422, [1, 2]), ["422: [1, 2]"]),
        (Reply(500, "<html>" + "x" * 900), [f"500: <html>{'x' * 294}\u2026"]),
        (Reply(200, "<html>a page</html>"), ["no chat completion: <html>a page</html>", "chat completions"]),
        (Reply(200, {"choices": []}), ["no chat completion"]),
        (Reply(200, {"choices": [{"message": {"content": 3}}]}), ["no chat completion"]),
        (Reply(200, {"choices": [{"message": "hello"}]}), ["no chat completion"]),
        (Reply(200, "[" * 100000), ["no chat completion"]),
    ],
    ids=lambda one: str(one.status) if isinstance(one, Reply) else "",
)  # fmt: skip
def test_what_does_not_pass_is_told_at_once(
    stub: Stub, pauses: list[float], tmp_path: Path, reply: Reply, words: list[str]
) -> None:
    stub.answer = lambda body: reply
    with pytest.raises(UnansweredError) as caught:
        Endpoint(stub.url, "small", max_retries=5 if reply.status != 500 else 0).ask(asked("a"))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not pauses and len(stub.bodies) == 1 and files_below(tmp_path) == []


def test_a_slow_endpoint_is_given_up(stub: Stub, pauses: list[float]) -> None:
    stub.slow = 0.5
    with pytest.raises(UnansweredError, match=r"nothing came within 0\.05 s, after 2 tries") as caught:
        Endpoint(stub.url, "small", timeout=0.05, max_retries=1).ask(asked("a"))
    assert "timeout" in caught.value.fix


def test_where_nobody_listens(pauses: list[float], stub: Stub) -> None:
    with pytest.raises(UnansweredError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "small", max_retries=1).ask(asked("a"))
    assert len(pauses) == 1


def test_answers_without_words_or_counts(stub: Stub) -> None:
    stub.answer = lambda body: said(None, prompt=None)
    one = Endpoint(stub.url, "small")
    assert one.ask(asked("a"))[0].text == "" and one.used == Usage(requests=1, uncounted=1)
    held = Endpoint(stub.url, "small", max_tokens_total=1000, num_concurrent=1)
    with pytest.raises(UnansweredError, match="no budget can be held") as caught:
        held.ask(asked("b", "c", "d"))
    assert list(caught.value.answers) == [0] and len(stub.bodies) == 2


@pytest.mark.parametrize(
    ("budget", "sent", "name"),
    [
        # 15 tokens each: 15, 30, and 45 is not below 45.
        ({"max_tokens_total": 45}, 3, "max_tokens_total"),
        ({"max_tokens_total": 46}, 4, "max_tokens_total"),
        # (10 * 2 + 5 * 4) / 10^6 = 0.00004 each.
        ({"max_price": 0.00008, "price": {"prompt": 2.0, "completion": 4.0}}, 2, "max_price"),
        ({"max_price": 0.000081, "price": {"prompt": 2.0, "completion": 4.0}, "max_tokens_total": 10**6}, 3, "max_price"),
        ({"max_tokens_total": 75}, 5, ""),
        ({"max_price": 0.0002, "price": {"prompt": 2.0, "completion": 4.0}}, 5, ""),
    ],
)
def test_a_budget_stops_and_what_was_paid_for_stays(stub: Stub, budget: dict[str, Any], sent: int, name: str) -> None:
    one = Endpoint(stub.url, "small", num_concurrent=1, **budget)
    texts = asked(*"abcde")
    if not name:
        assert len(one.ask(texts)) == sent
        return
    with pytest.raises(UnansweredError, match="the budget is used up") as caught:
        one.ask(texts)
    assert len(stub.bodies) == sent and sorted(caught.value.answers) == list(range(sent))
    assert all(answer.text == "yes" for answer in caught.value.answers.values())
    assert f"raise `{name}`" in caught.value.fix and f"{sent * 15} tokens in {sent} requests" in caught.value.what
    assert f"{sent} of 5 are answered" in caught.value.what and "not asked again" in caught.value.fix
    Endpoint(stub.url, "small").ask(texts)
    assert len(stub.bodies) == 5, "what was paid for is not paid for again"


def test_what_is_under_way_when_one_fails_is_kept(stub: Stub, pauses: list[float]) -> None:
    """The second is asked for before the first is refused, and answered after it; nothing else is asked."""
    asked_for = threading.Event()

    def answer(body: dict[str, Any]) -> str | Reply:
        if body["messages"][-1]["content"] == "a":
            assert asked_for.wait(20)
            return refused(400)
        asked_for.set()
        time.sleep(0.3)
        return "yes"

    stub.answer = answer
    with pytest.raises(UnansweredError) as caught:
        Endpoint(stub.url, "small", num_concurrent=2).ask(asked(*"abcdefgh"))
    assert list(caught.value.answers) == [1] and sorted(stub.asked) == ["a", "b"]


def test_prices_are_those_of_a_million_tokens() -> None:
    used = Usage(requests=3, prompt_tokens=1_000_000, completion_tokens=500_000)
    assert used.price(client.Price(0.15, 0.6)) == pytest.approx(0.15 + 0.3) and used.price(None) is None
    assert used.since(Usage(requests=1, prompt_tokens=400_000)) == Usage(
        requests=2, prompt_tokens=600_000, completion_tokens=500_000
    )


def test_the_key_stands_nowhere(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    """Not in files, not in what is said, not in errors, even where the server repeats it."""
    monkeypatch.setenv("OTHER_KEY", "sk-wrong-987654321")
    stub.key = KEY
    heard: list[str] = []
    stub.failures = [refused(500, f"{KEY} is busy")]
    one = Endpoint(stub.url, "small")
    one.ask(asked("a"), say=heard.append)
    wrong = Endpoint(stub.url, "small", api_key_env="OTHER_KEY")
    with pytest.raises(UnansweredError) as caught:
        wrong.ask(asked("b"))
    assert "401: Incorrect API key provided: (the key)" in caught.value.what and "OTHER_KEY" in caught.value.fix
    texts = [
        *heard,
        str(caught.value),
        repr(vars(one)),
        repr(vars(wrong)),
        one.described(),
        *(file.read_text() for file in files_below(tmp_path)),
    ]
    assert heard and not [text for text in texts if KEY in text or "sk-wrong" in text]
    assert one.described() == f"small at {stub.url}, with the key in OPENAI_API_KEY"
    none = Endpoint(stub.url, "small", api_key_env="none")
    with pytest.raises(UnansweredError, match="no key was sent"):
        none.ask(asked("b"))
    assert stub.authorizations[-1] is None


@pytest.mark.parametrize(
    ("url", "named", "found"),
    [
        ("https://api.openai.com/v1", None, "OPENAI_API_KEY"),
        ("https://eu.api.openai.com/v1", None, "OPENAI_API_KEY"),
        ("http://localhost:8000/v1", None, "OPENAI_API_KEY"),
        ("http://[::1]:8000/v1", None, "OPENAI_API_KEY"),
        ("https://openai.com.example.org/v1", None, None),
        ("https://notopenai.com/v1", None, None),
        ("http://api.openai.com/v1", None, None),
        ("http://127.0.0.1.example.org/v1", None, None),
        ("https://example.org/v1", "MY_KEY", "MY_KEY"),
        ("http://127.0.0.2/v1", "MY_KEY", "MY_KEY"),
        ("http://example.org/v1", "none", None),
    ],
)
def test_whose_key_goes_where(monkeypatch: pytest.MonkeyPatch, url: str, named: str | None, found: str | None) -> None:
    """OpenAI's key is for OpenAI and this machine; a recipe that names another place must ask for a key by name."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert key_variable(url, url, named) == found
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key_variable(url, url, named) == (found if named else None)


@pytest.mark.parametrize(
    ("url", "sent", "shown"),
    [
        ("https://a.example/v1", "https://a.example/v1/chat/completions", "https://a.example/v1"),
        (" https://a.example/v1/ ", "https://a.example/v1/chat/completions", "https://a.example/v1/"),
        ("https://a.example", "https://a.example/chat/completions", "https://a.example"),
        (
            "http://a.example:81/x/chat/completions",
            "http://a.example:81/x/chat/completions",
            "http://a.example:81/x/chat/completions",
        ),
        ("https://a.example/v1?api-version=3#x", "https://a.example/v1/chat/completions?api-version=3", "https://a.example/v1"),
    ],
)
def test_where_requests_go(url: str, sent: str, shown: str) -> None:
    assert address(url) == (sent, shown)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "api.openai.com"}, ["no address on the web", "https://"]),
        ({"url": "ftp://a.example/"}, ["no address on the web"]),
        ({"url": "http://[::1/v1"}, ["no address on the web"]),
        ({"url": "http://a.example:99999/"}, ["no address on the web"]),
        ({"url": "https://me:sk-secret@a.example/v1"}, ["a name or a password", "api_key_env"]),
        ({"url": "https://a.example/v1?API_Key=sk-secret"}, ["`API_Key`, which looks like a secret"]),
        ({"url": "http://a.example/v1", "api_key_env": "MY_KEY"}, ["read on its way", "https"]),
        ({"api_key_env": "sk-secret-123"}, ["no name of an environment variable"]),
        ({"api_key_env": "NOT_SET"}, ["is not set", "NOT_SET"]),
        ({"api_key_env": "SPOILED"}, ["spaces or signs", "SPOILED"]),
        ({"model": " "}, ["no model"]),
        ({"timeout": 0.0}, ["timeout"]),
        ({"timeout": float("inf")}, ["timeout"]),
        ({"max_retries": -1}, ["max_retries"]),
        ({"num_concurrent": 0}, ["num_concurrent"]),
        ({"max_tokens_total": 0}, ["max_tokens_total"]),
        ({"max_price": 1.0}, ["no price is given", "price: {prompt"]),
        ({"price": {"prompt": 1.0}}, ["the price has prompt", "completion"]),
        ({"price": {"prompt": 1.0, "completion": 1.0, "cached": 1.0}}, ["cached"]),
        ({"price": {"prompt": 1.0, "completion": -1.0}}, ["no number from 0"]),
        ({"extra_body": {"stream": True}}, ["`extra_body` sets `stream`"]),
        ({"extra_body": {"stop": {1, 2}}}, ["no request can"]),
        ({"extra_body": {"top_p": float("nan")}}, ["no request can"]),
    ],
)
def test_settings_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: list[str]) -> None:
    monkeypatch.setenv("SPOILED", "sk-secret\nHost: x")
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with pytest.raises(LuthierError) as caught:
        Endpoint(**{"url": "https://a.example/v1", "model": "small", **options})
    assert all(word in str(caught.value) for word in words) and "sk-secret" not in str(caught.value)


def test_a_key_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    assert key_in("MY_KEY") == KEY
