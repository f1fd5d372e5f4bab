"""Sending a result to the hub: what is sent, to where, and when nothing is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import luthier.results.written
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.report.card import Published, Use, model_card
from luthier.results.folder import Run
from luthier.runs.push import TOKEN, Destination, push
from tests.unit.test_saving import logits, trained

NAME = "me/robot"


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    request = httpx2.Request("POST", "https://hub.invalid/api")
    return kind("no\nmore", response=httpx2.Response(status, request=request), server_message="You may not.\nReally.")


@dataclass
class Hub:
    """Stands for the hub's client: repositories with their files, and what was asked of it, in order."""

    held: dict[str, list[str]] = field(default_factory=dict)
    private: bool = False
    fails: dict[str, Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    token: str | None = None
    created: list[dict[str, Any]] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)

    def client(self, token: str | None = None, library_name: str | None = None) -> Hub:
        self.token = token
        return self

    def _asked(self, what: str) -> None:
        self.asked.append(what)
        if what in self.fails:
            raise self.fails[what]

    def whoami(self) -> dict[str, str]:
        self._asked("whoami")
        return {"name": "me"}

    def repo_info(self, name: str, *, repo_type: str) -> Any:
        self._asked("repo_info")
        if name not in self.held:
            raise refusal(404, RepositoryNotFoundError)
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, name: str, *, repo_type: str) -> list[str]:
        self._asked("list_repo_files")
        return self.held[name]

    def create_repo(self, name: str, *, private: bool | None, repo_type: str) -> None:
        self._asked("create_repo")
        self.created.append({"name": name, "private": private})

    def upload_folder(self, *, folder_path: Path, **options: Any) -> Any:
        self._asked("upload_folder")
        files = {one.name: one.read_bytes() for one in Path(folder_path).iterdir()}
        logit = logits(AutoModelForCausalLM.from_pretrained(folder_path)) if "config.json" in files else None
        self.sent.append({"files": files, "logits": logit, **options})
        return SimpleNamespace(repo_url=f"https://hub.invalid/{options['repo_id']}", oid="abc123")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found.client)
    monkeypatch.setenv(TOKEN, " hf_mine ")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("runs"), "lora")


def test_a_new_repository_gets_the_model_and_its_card(run: Run, hub: Hub, tmp_path: Path) -> None:
    told = push(str(run.folder), Destination(NAME, private=True), published=Published("apache-2.0", ("en", "de")))
    assert hub.token == "hf_mine" and hub.asked == ["whoami", "repo_info", "create_repo", "upload_folder"]
    assert hub.created == [{"name": NAME, "private": True}]
    (sent,) = hub.sent
    assert (
        sent["repo_id"] == NAME and sent["delete_patterns"] is None and sent["commit_message"] == f"{run.folder.name}, by luthier"
    )
    assert sent["logits"].sub(logits(run.model)).abs().max() < 1e-4
    assert {name: len(content) for name, content in sent["files"].items()} == told["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(told["files"])
    assert told["url"] == f"https://hub.invalid/{NAME}" and told["commit"] == "abc123" and "folder" not in told
    card = sent["files"]["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0" and head["language"] == ["en", "de"]
    assert f'from_pretrained("{NAME}")' in card and "published under apache-2.0" in card and "does not know them" not in card
    for name, content in sent["files"].items():
        assert str(run.folder.parent).encode() not in content, name
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_adapter_is_sent_as_one(run: Run, hub: Hub) -> None:
    push(str(run.folder), Destination(NAME), form="peft")
    (sent,) = hub.sent
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "base.json", "tokenizer.json"} <= set(sent["files"])
    assert hub.created == [{"name": NAME, "private": None}], "the account's own default"
    for name, content in sent["files"].items():
        assert str(run.folder.parent).encode() not in content, name


def test_a_dry_run_writes_what_would_be_sent_and_asks_nobody(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN)
    asked = ["push", str(run.folder), NAME, "--dry-run", "--json"]
    told = json.loads(CliRunner().invoke(app, [*asked, "--license", "mit"]).stdout)
    assert hub.asked == [] and "url" not in told and told["folder"] == "robot"
    assert told["files"] == {one.name: one.stat().st_size for one in (tmp_path / "robot").iterdir()}
    assert "license: mit" in (tmp_path / "robot" / "README.md").read_text()
    assert "exists already" in json.loads(CliRunner().invoke(app, asked).stdout)["error"]
    shown = CliRunner().invoke(app, [*asked[:-1], "--keep", str(tmp_path / "there")])
    assert shown.exit_code == 0 and (tmp_path / "there" / "config.json").is_file()
    assert "model.safetensors" in shown.stdout and "nothing was sent" in shown.stdout


def test_what_is_sent_can_be_kept(run: Run, hub: Hub, tmp_path: Path) -> None:
    told = push(str(run.folder), Destination(NAME, folder=tmp_path / "kept"))
    assert told["folder"] == str(tmp_path / "kept") and set(told["files"]) == {one.name for one in (tmp_path / "kept").iterdir()}


def test_a_repository_that_holds_files_is_left_alone(run: Run, hub: Hub) -> None:
    hub.held[NAME] = [".gitattributes", "README.md", "model.safetensors"]
    with pytest.raises(LuthierError, match=r"holds 3 files already.*\n.*\n.*--replace"):
        push(str(run.folder), Destination(NAME))
    assert hub.sent == [] and hub.created == []
    push(str(run.folder), Destination(NAME, replace=True))
    assert hub.created == [] and hub.sent[0]["delete_patterns"] == "*"


def test_an_empty_repository_is_filled(run: Run, hub: Hub) -> None:
    hub.held[NAME] = [".gitattributes", "README.md"]
    push(str(run.folder), Destination(NAME))
    assert hub.created == [] and len(hub.sent) == 1


def test_what_must_not_be_seen_is_not_sent_where_all_can(run: Run, hub: Hub) -> None:
    hub.held[NAME] = []
    with pytest.raises(LuthierError, match="can be seen by all"):
        push(str(run.folder), Destination(NAME, private=True, replace=True))
    hub.private = True
    push(str(run.folder), Destination(NAME, private=True))
    assert len(hub.sent) == 1


def test_nothing_is_sent_where_the_result_reads_back_otherwise(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: Any, **__: Any) -> Any:
        raise LuthierError("the saved model gives other outputs")

    monkeypatch.setattr(luthier.results.written, "export_model", differs)
    with pytest.raises(LuthierError, match="other outputs"):
        push(str(run.folder), Destination(NAME))
    assert hub.created == [] and hub.sent == []


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("whoami", refusal(401), r"refuses \(401\): You may not\.\n.*\n.*token that may write to me"),
        ("create_repo", refusal(403), r"refuses \(403\)"),
        ("upload_folder", refusal(404, RepositoryNotFoundError), r"refuses \(404\)"),
        ("upload_folder", ConnectionError("gone\nreally"), r"could not be reached \(ConnectionError: gone\)"),
        ("repo_info", httpx2.ConnectTimeout("slow"), "could not be reached"),
    ],
)
def test_what_the_hub_refuses_is_told(place: str, error: Exception, words: str, run: Run, hub: Hub) -> None:
    hub.fails[place] = error
    with pytest.raises(LuthierError, match=words) as told:
        push(str(run.folder), Destination(NAME))
    assert "hf_mine" not in str(told.value) and hub.asked[-1] == place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["robot"], "names no repository"),
        (["me/a/b"], "names no repository"),
        (["me/ro bot"], "names no repository"),
        ([NAME, "--as", "gguf"], "no form that is sent"),
        ([NAME, "--dtype", "int4"], "no dtype"),
        ([NAME, "--license", "Apache 2"], "names no license"),
        ([NAME, "--language", "English"], "names no language"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_asked(words: list[str], said: str, run: Run, hub: Hub) -> None:
    told = CliRunner().invoke(app, ["push", str(run.folder), *words, "--json"])
    assert told.exit_code == 2 and re.search(said, json.loads(told.stdout)["error"]), told.stdout
    assert hub.asked == []


def test_without_a_token_or_a_hub_nothing_is_written(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LuthierError, match="switched off"):
        push(str(run.folder), Destination(NAME))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(TOKEN, "")
    with pytest.raises(LuthierError, match=f"token is not set\n.*{TOKEN}"):
        push(str(run.folder), Destination(NAME))
    assert hub.asked == []


def test_data_sets_of_the_hub_are_named_in_the_card() -> None:
    sources = ["hub:me/chats:train", {"rows": "hub:me/forms/small:test", "weight": 2.0}, "mine.jsonl", "hub:me/chats", "hub:plain"]
    for train in (sources, sources[0]):
        card = model_card({"recipe": {"rows": {"train": train}}}, Use("peft", "", ""), base=None, folder="here")
        head = yaml.safe_load(card.split("---\n")[1])
        assert head["datasets"] == (["me/chats", "me/forms", "plain"] if train is sources else ["me/chats"])
        assert "license" not in head and "language" not in head and "does not know them" in card
