"""The report's page and figures, from a run's facts alone."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import runpy
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from luthier.report.curves import _smooth, thinned, training_figure
from luthier.report.facts import samples_of, sets_of
from luthier.report.figures import interval_figure
from luthier.report.heat import change_figure, changes_by_role
from luthier.report.html import report_page, write_report
from luthier.report.story import cards, headline, warnings_of

SAMPLE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("report_sample.py"))))

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "</style></title></svg><iframe>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
)


class Page(HTMLParser):
    """What a browser would see: tags with their attributes' names, and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(run: Mapping[str, Any]) -> Page:
    return Page(report_page(run))


def with_text(text: str) -> dict[str, Any]:
    """A run that has one text wherever a text can come from rows, recipes or models."""
    run = SAMPLE.sample_run(name=text, run=text, command=text, recipe_text=text, warnings=[text], plan=[text], tune=text)
    run |= {"started": text, "recipe_hash": text, "weights_sha256": text, "luthier": text, "versions": {text: text}}
    run["machine"] = {"processor": text, "device": text, "precision": text}
    run["model"] = dict.fromkeys(("name", "origin", "architecture", "fingerprint"), text)
    run["learning_rate_from"], run["ranks"] = text, {text: 8}
    seen = {"id": text, "where": text, "tokens": 3, "labels": 1, "pieces": [[text, False], [text, True]], "left_out": 2}
    run["rows"] |= {
        "seen": [seen],
        "files": [text],
        "dropped": [[text, text]],
        "skipped": [[text, text, text]],
        "overlap": {text: 3},
    }
    items = [
        {**item, **dict.fromkeys(("id", "prompt", "expected", "before", "after"), text)}
        for item in run["metrics"]["general"]["items"]
    ]
    rates = {"precision": 0.5, "recall": None, "f1": 0.0}
    classes = {"by_class": {text: {"n": 3, "before": rates, "after": rates}}, "confusion": {text: {text: 3}}}
    run["metrics"] = {text: {**run["metrics"]["general"], **classes, "metric": text, "items": items}}
    run["evaluations"] = [{"step": 21, "metrics": {text: 0.5}}]
    run["delta"]["by_place"] = [{**place, "module_type": text} for place in run["delta"]["by_place"]]
    return run


def test_the_headline_says_what_happened() -> None:
    assert headline(SAMPLE.sample_run()).replace("\u00a0", " ") == (
        "Learned held_out: 58 of 60 items right, 0 before; 97 % of what it answered rightly before is kept; "
        "got worse on prose: perplexity 21.9, 21.4 before; 49.8 % of 134.5 M parameters trained; 2 min 31 s."
    )
    assert headline(SAMPLE.sample_run(status="failed", metrics={}, retained=None, seconds=None)).startswith(
        "This run failed after 84 steps; what it learned is not measured; what it kept is not measured; "
    )
    assert headline({"status": "finished"}) == "What it learned is not measured; what it kept is not measured."


def test_the_headline_hides_no_set() -> None:
    run = SAMPLE.sample_run()
    run["metrics"]["prose"] |= {"after": None, "verdict": "not measured"}
    run["metrics"]["held_out"] |= {"verdict": "not measured", "note": "3 items cannot show a change"}
    text = headline(run)
    assert text.startswith("No verdict on held_out: 58 of 60 items right, 0 before; ") and "prose is not measured" in text
    assert "3 items cannot show a change" in page_of(run).text


def test_the_cards_count() -> None:
    learned, kept, changed, cost = cards(SAMPLE.sample_run())
    assert (learned.value, learned.verdict) == ("58 of 60", "better")
    assert (kept.value.replace("\u00a0", " "), kept.verdict, kept.notes[1]) == ("97 %", "worse", "2 items lost")
    assert changed.value.replace("\u00a0", " ") == "49.8 %"
    assert cost.value.replace("\u00a0", " ") == "2 min 31 s"


def test_what_was_not_measured_never_reads_as_a_number() -> None:
    """Fault 39: a missing measurement reads "not measured", never OK."""
    text = page_of({"name": "bare", "status": "finished"}).text
    facts = text.partition("Before and after")[2].partition("Made by luthier")[0]
    assert not re.search(r"\d", facts), facts
    assert [card.value for card in cards({})] == ["not measured"] * 4
    entry = {**SAMPLE.sample_run()["metrics"]["held_out"], "after": None, "verdict": "better"}
    assert sets_of({"metrics": {"held_out": entry}})[0].verdict == "not measured"
    assert sets_of({"metrics": {"held_out": {**entry, "after": math.nan}}})[0].verdict == "not measured"


def test_an_overlap_and_an_infinite_loss_are_warned_of() -> None:
    """Fault 40: a gain on items that also stand in the training rows is not claimed silently."""
    run = SAMPLE.sample_run(history=[{"step": 1, "loss": math.inf}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}])
    run["rows"]["overlap"] = {"held_out": 3, "prose": 0}
    assert warnings_of(run) == [
        "3 items of held_out also stand in the training rows: gains there prove nothing.",
        "The loss was not finite in 1 step.",
    ]


def test_every_lost_answer_is_shown_and_those_to_be_kept_come_first() -> None:
    run = SAMPLE.sample_run()
    run["metrics"]["held_out"]["items"] = SAMPLE.sample_items(60, 5, 5, 50, "held-out")
    run["metrics"]["general"]["items"] = SAMPLE.sample_items(400, 300, 300, 0, "general")
    lost = samples_of(sets_of(run), "lost")
    assert [sample.set_name for sample in lost] == ["general"] * 300 + ["held_out"] * 5
    text = page_of(run).text
    assert all(f"general-{index:03d}" in text for index in range(300))
    assert text.index("Lost: 305") < text.index("general-000") < text.index("held_out-000".replace("_", "-"))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_data_never_becomes_markup(text: str) -> None:
    hostile, harmless = page_of(with_text(text)), page_of(with_text("harmless"))
    assert hostile.tags == harmless.tags
    assert text in hostile.text
    assert hostile.text.replace(text, "harmless") == harmless.text


def test_classes_are_told_one_by_one() -> None:
    """Precision, recall and F1 after and before, and what was taken for what; a value that is no mean is not told as items."""
    run = SAMPLE.sample_run()
    rates = {"precision": 0.75, "recall": 0.6, "f1": 2 / 3}
    missed = {"precision": None, "recall": 0.0, "f1": 0.0}
    run["metrics"]["held_out"] |= {
        "metric": "macro_f1",
        "is_mean": False,
        "by_class": {"whale": {"n": 5, "before": missed, "after": rates}, "fox": {"n": 2, "before": rates, "after": missed}},
        "confusion": {"whale": {"whale": 3, "fox": 2}, "fox": {"whale": 1, "fox": 41}},
    }
    text = " ".join(page_of(run).text.replace("\u00a0", " ").split())
    assert "held_out, class by class: 2" in text
    assert "whale 5 75 % not measured 60 % 0 % 66.7 % 0 %" in text and "fox 2 not measured 75 % 0 % 60 % 0 % 66.7 %" in text
    assert "Right whale fox whale 3 2 fox 1 41" in text
    assert "items right" not in headline(run).split(";")[0] and "macro f1" in headline(run)


def test_the_facts_tell_what_took_effect_and_the_rows_what_is_learned() -> None:
    run = SAMPLE.sample_run()
    page = report_page(run)
    text = Page(page).text.replace("\u00a0", " ")
    assert "Learning rate 1e-05, from half's default" in text and "Rank of lora 8" in text
    assert "Batch 7.5 rows, 451 tokens a step on average; micro-batches of at most 1,024 tokens" in text
    assert "Time of measuring 1 min 12 s" in text and cards(run)[3].notes[0].replace("\u00a0", " ") == "and 1 min 12 s of measuring"
    assert "What is <b>?<mark>A &lt;hole&gt;.</mark>" in page.replace("&lt;b&gt;", "<b>") and "1 more piece" in text
    bare = Page(report_page({"name": "bare"})).text
    assert "Learning rate not recorded" in bare and "Batch not recorded" in bare and "Rank" not in bare


def test_a_page_fetches_and_runs_nothing() -> None:
    page = report_page(SAMPLE.sample_run())
    seen = Page(page)
    names = {name for _, names in seen.tags for name in names}
    assert not {tag for tag, _ in seen.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "a",
    }
    assert not names & {"src", "href", "srcset", "style", "action"} and not any(name.startswith("on") for name in names)
    css = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert css is not None and "url(" not in css[1] and "@import" not in css[1]
    digest = base64.b64encode(hashlib.sha256(css[1].encode()).digest()).decode()
    assert (
        "content",
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    ) in seen.values


def test_half_characters_and_controls_do_not_stop_the_page(tmp_path: Path) -> None:
    path = write_report(with_text("a\ud800\x1b[31m\u202eb\x00"), tmp_path / "new" / "report.html")
    page = path.read_text(encoding="utf-8")
    assert "a\ufffd\ufffd[31m\ufffdb\ufffd" in page and not re.search("[\x00\x1b\u202e]", page)
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]


def test_an_interval_is_drawn_where_it_lies() -> None:
    svg = ElementTree.fromstring(interval_figure(sets_of(SAMPLE.sample_run())[0]))
    dots = [float(dot.get("cx", "")) for dot in svg.iter("circle")]
    assert dots == pytest.approx([8, 8 + 224 * 58 / 60], abs=0.01)
    whiskers = [line for line in svg.iter("line") if line.get("class", "").startswith("whisker after")]
    assert [float(whiskers[0].get(end, "")) for end in ("x1", "x2")] == pytest.approx([8 + 224 * 0.886, 8 + 224 * 0.991], abs=0.01)


def test_the_change_adds_as_squares_and_shades_by_share() -> None:
    def place(block: int | None, role: str, norm: float, base: float) -> dict[str, Any]:
        return {
            "block": block,
            "module_type": role,
            "norm": norm,
            "base_norm": base,
            "parameters": 10,
            "changed": 10 if norm else 0,
        }

    places = [
        place(0, "mlp_up", 3.0, 6.0),
        place(1, "mlp_up", 4.0, 8.0),
        place(0, "mlp_down", 0.0, 5.0),
        place(None, "head", 1.0, 8.0),
    ]
    assert dict(changes_by_role({"by_place": places}))["mlp_up"] == (5.0, 10.0, 20, 20)
    svg = ElementTree.fromstring(change_figure({"by_place": places}))
    cells = [float(cell.get("fill-opacity", "")) for cell in svg.iter("rect") if cell.get("class") == "cell"]
    assert cells == pytest.approx([1.0, 1.0, 0.12 + 0.88 * 0.25])
    assert sum(cell.get("class") == "still" for cell in svg.iter("rect")) == 1
    assert change_figure({}) == ""


def test_a_curve_breaks_where_a_loss_is_missing() -> None:
    losses = [3.0, 2.0, None, math.nan, 1.0, 0.5]
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    svg = ElementTree.fromstring(training_figure({"history": history}, []))
    assert [len(line.get("points", "").split()) for line in svg.iter("polyline")] == [2, 2]


def test_curves_say_what_several_objectives_add_and_what_weights_leave() -> None:
    """The part that is the plain likelihood is drawn once; one objective alone has no parts."""
    history = [
        {
            "step": i,
            "loss": 2.0,
            "nll": 1.5,
            "parts": {"cross_entropy": 1.5, "kl": 0.5},
            "weighted_share": 0.5,
            "effective_labels": 4.0,
            "supervised_tokens": 16,
        }
        for i in range(4)
    ]
    titles = _titles(history)
    assert titles == [
        "loss",
        "negative log-likelihood",
        "kl, its part of the loss",
        "share of labels kept",
        "effective share of labels",
    ]
    assert (
        _titles([{**line, "parts": {"dft": 2.0}, "weighted_share": 1.0, "effective_labels": None} for line in history])
        == titles[:2]
    )
    assert _titles([{"step": i, "loss": 2.0, "nll": 2.0} for i in range(4)]) == ["loss"]


def _titles(history: list[dict[str, Any]]) -> list[str]:
    svg = ElementTree.fromstring(training_figure({"history": history}, []))
    return [one.text or "" for one in svg.iter("text") if one.get("class") == "panel-title"]


def test_every_named_value_of_a_curve_reads_differently() -> None:
    run = SAMPLE.sample_run(evaluations=[])
    run["metrics"] = {"prose": run["metrics"]["prose"] | {"before": 21.40, "after": 21.52}}
    svg = ElementTree.fromstring(training_figure(run, sets_of(run)))
    named = [(mark.get("y"), mark.text) for mark in svg.iter("text") if mark.get("text-anchor") == "end"]
    assert [text for _, text in named if text and text.startswith("21.")] == ["21.4", "21.45", "21.5"]


def test_smoothing_keeps_a_straight_line_and_thinning_its_mean() -> None:
    line = [(float(step), 3.0 - 0.01 * step) for step in range(200)]
    assert [value for _, value in _smooth(line, 5)] == pytest.approx([value for _, value in line])
    fewer, group = thinned([(float(step), float(step)) for step in range(1000)])
    assert (group, len(fewer), fewer[0]) == (4, 250, (3.0, 1.5))
