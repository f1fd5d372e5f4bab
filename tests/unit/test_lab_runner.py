"""The lab's engine: recipes of variants, learning rates, the cache, stages, kills."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from luthier.errors import LuthierError
from luthier.lab import cache, jobs, replications, verdict
from luthier.lab.jobs import Do, Job, chain_keys, merged, variant_recipes
from luthier.lab.replication import Replication, Setting, Variant
from luthier.lab.results import result_of
from luthier.lab.runner import Choice, Lab, Ran, Tried, best, here, run_replication
from luthier.lab.verdict import Design
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model
from luthier.results.folder import read_run
from luthier.results.opened import open_run

TOY = runpy.run_path(str(Path(__file__).with_name("lab_toys.py")))["TOY"]
SETTING = Setting("tiny:llama", 0)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Replication]:
    """Write a replication's file, changed as asked, and look it up."""
    folder = tmp_path / "replications"
    folder.mkdir()
    monkeypatch.setenv("LUTHIER_REPLICATIONS", str(folder))
    # Other processes read the sources when they begin.
    cache.core_sources.cache_clear()
    cache.measure_sources.cache_clear()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))

    def write(*changes: tuple[str, str], name: str = "toy") -> Replication:
        text = TOY.replace('name="toy"', f'name="{name}"')
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / f"{name}.py").write_text(text)
        sys.modules.pop(f"luthier_replications.{name}", None)
        return replications.find(name)

    return write


class Counting:
    """Does jobs in this process, and counts what was trained and what was measured."""

    def __init__(self) -> None:
        self.trained, self.asked = 0, 0

    def __call__(self, do: Do, todo: Sequence[Job]) -> Iterable[LuthierError | None]:
        self.trained += len(todo) if do is jobs.train_stage else 0
        self.asked += len(todo) if do is jobs.measure_chain else 0
        return here(do, todo)


def run(replication: Replication, seeds: int | None = 1, model: str | None = None) -> tuple[Ran, tuple[int, int]]:
    """Run a replication; with what had to be trained and asked."""
    counting = Counting()
    ran = run_replication(replication, Lab(cache.lab_folder(), counting), seeds=seeds, model=model)
    assert ran.jobs == counting.trained + counting.asked
    return ran, (counting.trained, counting.asked)


def numbers_of(ran: Ran) -> dict[str, object]:
    """A result without what the clock tells."""
    return {key: value for key, value in result_of(ran).items() if key != "seconds"}


def test_a_change_is_merged_and_techniques_are_replaced() -> None:
    recipe = {"tune": {"lora": {"rank": 4}}, "train": {"steps": 3, "warmup": 0}, "rows": {"train": [1], "map": {"a": {"x": 1}}}}
    change = {"tune": {"half": {"share": 0.5}}, "train": {"steps": 5}, "rows": {"map": {"b": {}}}}
    assert merged(recipe, change) == {
        "tune": {"half": {"share": 0.5}},
        "train": {"steps": 5, "warmup": 0},
        "rows": {"train": [1], "map": {"b": {}}},
    }
    assert recipe["train"] == {"steps": 3, "warmup": 0}


def test_recipes_of_an_variant() -> None:
    bases = [{"train": {"steps": 3}}, {"train": {"steps": 4, "learning_rate": 0.5}}]
    plain = variant_recipes(Variant("plain"), 0.1, Setting("m", 7), bases)
    assert [one["train"].get("learning_rate") for one in plain] == [0.1, 0.5], "a stage that names its rate keeps it"
    assert [one["seed"] for one in plain] == [7, 1_000_007], "a technique that draws at its start draws anew in a new stage"
    assert all(one["repeat_baseline"] is False for one in plain)

    def later(recipe: dict[str, dict[str, float]], stage: int, setting: Setting) -> dict[str, dict[str, float]]:
        recipe["train"]["steps"] += stage + setting.seed
        recipe["train"]["learning_rate"] *= 2
        return recipe

    found = variant_recipes(Variant("later", later), 0.1, Setting("m", 7), bases)
    assert [one["train"] for one in found] == [{"steps": 10, "learning_rate": 0.2}, {"steps": 12, "learning_rate": 1.0}]
    assert bases[1]["train"] == {"steps": 4, "learning_rate": 0.5}, "a variant cannot change what the others get"
    (second,) = variant_recipes(
        Variant("second", lambda recipe, stage, setting: recipe if stage else None), 0.1, Setting("m", 7), bases
    )
    assert (second["train"]["steps"], second["seed"]) == (4, 1_000_007), "a stage that a variant leaves out moves no other"


def test_the_best_rate() -> None:
    assert best([Tried(3.0, 1.0), Tried(1.0, 2.0), Tried(2.0, 2.5)]) == Choice(
        2.0, (Tried(1.0, 2.0), Tried(2.0, 2.5), Tried(3.0, 1.0))
    )
    assert best([Tried(2.0, 1.0), Tried(3.0, 1.0), Tried(1.0, 0.0)]).rate == 2.0, "of equals the smallest"
    assert best([Tried(1.0, None), Tried(2.0, -9.0), Tried(3.0, None)]).rate == 2.0
    assert "smallest that was tried" in best([Tried(1.0, 2.0), Tried(2.0, 1.0)]).note
    assert "largest that was tried" in best([Tried(1.0, 2.0), Tried(2.0, 3.0)]).note
    assert best([Tried(1.0, 2.0)]).note == "", "a grid of one has no edge"
    assert "every rate" in best([Tried(1.0, None), Tried(2.0, None)]).note


def test_a_second_call_runs_nothing(toy: Callable[..., Replication]) -> None:
    replication = toy()
    first, work = run(replication, seeds=2)
    # Two variants at one rate, then two variants at two seeds.
    assert work == (6, 6) and first.stages == 6
    again, work = run(replication, seeds=2)
    assert work == (0, 0) and result_of(again) == result_of(first)
    more, work = run(replication, seeds=3)
    assert work == (2, 2), "another seed runs the new repetitions alone"
    assert more.numbers["half"][:2] == first.numbers["half"]


def test_a_second_look_follows_an_undecided_first_one_alone(
    toy: Callable[..., Replication], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "TWO_LOOKS", Design((3, 4), 0.028))
    measured = '"loss": done'
    wide = ('"not_more", 0.5', '"not_more", 5.0')
    # Seeds differ by a hundred in the half variant, so that nothing can be told of them.
    apart = '"loss": 100.0 * (done.setting.seed % 2) * (done.variant.name == "half") + done'
    for change, seeds, found in (((measured, measured), 3, "holds"), ((measured, apart), 4, "cannot tell")):
        ran, work = run(toy(change, wide), seeds=None)
        assert ran.seeds == seeds and len(ran.numbers["half"]) == seeds
        result = result_of(ran)
        assert result["verdict"] == found and result["rule"] == {"looks": [3, 4], "level": 0.028, "lab": True}
    assert work[0] == 2, "of the second replication the first look's runs were there"
    asked = result_of(run(toy((measured, apart), wide), seeds=2)[0])
    assert asked["seeds"] == [0, 1] and not asked["rule"]["lab"]


def test_a_seed_of_the_training_alone(toy: Callable[..., Replication]) -> None:
    again = ('Variant("half", {"tune": "half"})', 'Variant("half", seed_offset=50)')
    replication = toy(again)
    once, other = (variant_recipes(variant, 0.1, SETTING, replication.stages(SETTING)) for variant in replication.variants)
    assert once[0]["rows"] == other[0]["rows"] and (once[0]["seed"], other[0]["seed"]) == (0, 50)


def test_replications_share_a_baseline(toy: Callable[..., Replication]) -> None:
    first, _ = run(toy())
    other = toy(
        ('Variant("half", {"tune": "half"})', 'Variant("lora", {"tune": "lora"})'),
        ('"half", "full"', '"lora", "full"'),
        name="other",
    )
    second, work = run(other)
    assert work == (2, 4), "the full variant's runs are there; every number is taken by the replication's own measure"
    assert second.numbers["full"] == first.numbers["full"]


def test_another_measure_trains_nothing(toy: Callable[..., Replication]) -> None:
    run(toy())
    ran, work = run(toy(('"loss": done', '"loss": 2 * done')))
    assert work == (0, 4)
    assert ran.numbers["full"][0]["loss"] == pytest.approx(2 * run(toy())[0].numbers["full"][0]["loss"])


def test_controls_take_over_a_rate(toy: Callable[..., Replication]) -> None:
    replication = toy(('Variant("half", {"tune": "half"})', 'Variant("half", like="full", rate_factor=0.5)'))
    ran, work = run(replication)
    assert work == (3, 3), "a control chooses nothing"
    assert ran.choices["half"].rate == pytest.approx(ran.choices["full"].rate / 2) and not ran.choices["half"].tried


def test_a_rate_at_which_training_breaks_off_is_worst(toy: Callable[..., Replication]) -> None:
    ran, _ = run(toy(("rates=(1e-3,)", "rates=(1e-3, 1e30)")))
    assert ran.choices["full"].rate == 1e-3
    assert ran.choices["full"].tried[1] == Tried(1e30, None)
    assert "smallest" in ran.choices["full"].note
    assert ran.numbers["full"][0]["loss"] is not None


def test_an_variant_that_breaks_off_has_no_number_and_no_verdict(toy: Callable[..., Replication]) -> None:
    ran, _ = run(
        toy(('{"tune": "half"}', '{"tune": "half", "train": {"learning_rate": 1e30}}'), ("rates=(1e-3,)", "rates=(1e-3, 1e-2)")),
        seeds=2,
    )
    assert ran.choices["half"].rate is None and "own learning rates" in ran.choices["half"].note
    assert ran.numbers["half"] == ({}, {})
    result = result_of(ran)
    assert result["verdict"] == "cannot tell" and result["expectations"][0]["differences"] == (None, None)
    assert result["variants"][1]["numbers"] == {"loss": [None, None]}


def test_other_mistakes_stop_the_lab_and_say_where(toy: Callable[..., Replication]) -> None:
    with pytest.raises(LuthierError) as caught:
        run(toy(('{"tune": "half"}', '{"tune": "hlaf"}')))
    assert "hlaf" in caught.value.what and "replication toy, variant half, seed 10000" in caught.value.where
    assert "did you mean" in caught.value.fix


def test_an_expectation_of_what_nothing_measures(toy: Callable[..., Replication]) -> None:
    ran, _ = run(toy(('Expectation("loss"', 'Expectation("lost"')))
    with pytest.raises(LuthierError, match="nothing measures `lost`"):
        result_of(ran)


def test_rows_that_are_drawn_anew_each_time_are_refused(toy: Callable[..., Replication]) -> None:
    with pytest.raises(LuthierError, match="others each time"):
        run(toy(("STEPS = 3", "import random\nSTEPS = 3"), ("it is {i}", "it is {random.random()}")))


def test_what_changes_a_stage_key() -> None:
    base = {"rows": {"train": [{"prompt": "a", "completion": "b"}]}, "train": {"steps": 3}, "seed": 0}

    def key(start: str = "base", device: str = "cpu", **change: object) -> str:
        return chain_keys([merged(base, change)], start, device)[0]

    others = [
        key(seed=1),
        key(rows={"train": [{"prompt": "a", "completion": "c"}]}),
        key(train={"steps": 4}),
        key(tune={"half": {"share": 0.25}}),
        key(start="another"),
        key(device="cuda"),
    ]
    assert len({key(), *others}) == 7
    assert key() == key(name="other", out="elsewhere"), "what a run is called and where it lies changes no number"
    first, second = chain_keys([base, base], "base", "cpu")
    assert first != second, "a later stage starts from elsewhere"
    assert chain_keys([base, base], "base", "cpu", apart=True) == (first, first)


def test_rows_in_a_file_count_by_their_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    recipe = {"rows": {"train": str(file)}}
    file.write_text("{}")
    before = chain_keys([recipe], "base", "cpu")
    file.write_text("{} ")
    assert chain_keys([recipe], "base", "cpu") != before


def test_only_the_techniques_that_a_recipe_names_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "selective"
    folder.mkdir()
    text = "from luthier.methods.selective.half import half\nfrom luthier.registry import method\n\n\n"
    text += '@method(title="Mine")\ndef mine():\n    return half()\n'
    (folder / "mine.py").write_text(text)
    monkeypatch.setenv("LUTHIER_METHODS", str(tmp_path))

    def sources(*names: str) -> str:
        cache.technique_sources.cache_clear()
        return cache.technique_sources(frozenset(names))

    full, mine = sources("full"), sources("mine")
    assert full != mine
    (folder / "mine.py").write_text(text + "# changed\n")
    assert sources("full") == full and sources("mine") != mine
    assert sources("mine") == sources("mine", "half"), "what a technique imports counts too"


def test_what_a_replication_imports_and_reads_is_part_of_it(tmp_path: Path) -> None:
    def source(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        return cache.replication_source(tmp_path / "one.py")

    first = source(
        one_py="from luthier.lab.replications.two import rows\nopen('rows.jsonl')",
        two_py="",
        three_py="",
        rows_jsonl="",
        other_jsonl="",
    )
    assert source(three_py="# changed", other_jsonl="changed") == first
    assert len({first, source(two_py="# changed"), source(rows_jsonl="changed"), source(one_py="# changed")}) == 4


def test_what_has_no_content_is_refused() -> None:
    with pytest.raises(LuthierError, match="cannot tell one function from another"):
        chain_keys([{"rows": {"train": [{"text": "a"}]}, "tune": lambda: None}], "base", "cpu")


def test_stages_follow_one_another(toy: Callable[..., Replication]) -> None:
    two = ('return [{"rows": {"train": rows(setting.seed)}, "train": train}]', "return [one(setting.seed, train), one(5, train)]")
    make = ("def measure", 'def one(seed, train):\n    return {"rows": {"train": rows(seed)}, "train": train}\n\n\ndef measure')
    chain = ("return {", 'return {"start": float(int(done.runs[1].facts["model"]["fingerprint"][:12], 16)), ')
    replication = toy(chain, make, two)
    ran, work = run(replication)
    # Rates are judged after the first stage; then two variants with two stages each.
    assert work[0] == 2 + 4
    stages = {facts.parent.name: cache.read(facts) for facts in (cache.lab_folder() / "stages").glob("*/stage.json")}
    runs = {key: read_run(cache.lab_folder() / "stages" / key / facts["run"]) for key, facts in stages.items() if facts}
    second = [one for one in runs.values() if Path(one.facts["model"]["name"]).is_absolute()]
    assert len(second) == 2
    for one in second:
        first = runs[Path(one.facts["model"]["name"]).parent.name]
        tuned = fingerprint(open_run(first)[0].model)
        assert one.facts["model"]["fingerprint"] == tuned != first.facts["model"]["fingerprint"]
        assert first.facts["model"]["fingerprint"] == ran.fingerprint == fingerprint(load_model("tiny:llama"))
    assert ran.numbers["full"][0]["start"] != ran.numbers["half"][0]["start"]


def test_stages_apart_all_start_from_the_replications_model(toy: Callable[..., Replication]) -> None:
    two = ('"train": train}]', '"train": train}, {"rows": {"train": rows(5)}, "train": train}]')
    chain = ("return {", 'return {"starts": float(len({one.facts["model"]["fingerprint"] for one in done.runs})), ')
    replication = toy(chain, two, ("minutes=1,", "minutes=1,\n    apart=True,"))
    ran, _ = run(replication)
    assert len(replication.stages(SETTING)) == 2
    assert ran.numbers["full"][0]["starts"] == ran.numbers["half"][0]["starts"] == 1.0


def test_a_later_stage_alone_cannot_choose_a_rate(toy: Callable[..., Replication]) -> None:
    two = ('"train": train}]', '"train": {**train, "learning_rate": 1e-3}}, {"rows": {"train": rows(1)}, "train": train}]')
    several = ("rates=(1e-3,)", "rates=(1e-3, 1e-2)")
    with pytest.raises(LuthierError, match="do not use it"):
        run(toy(two, several))


def test_what_a_kill_left_is_begun_anew(toy: Callable[..., Replication]) -> None:
    replication = toy()
    undisturbed, _ = run(replication)
    for facts in (cache.lab_folder() / "stages").glob("*/stage.json"):
        facts.unlink()
        (facts.parent / "run-1" / "run.json").write_text("{}")
        (facts.parent / ".run.json.123").write_text("half a")
    for answer in (cache.lab_folder() / "measures").iterdir():
        answer.unlink()
    again, work = run(replication)
    assert work == (4, 4) and numbers_of(again) == numbers_of(undisturbed)
    left = {path.name for path in (cache.lab_folder() / "stages").glob("*/*")} | {
        path.name for path in (cache.lab_folder() / "stages").glob("*/.*")
    }
    assert left == {"run-1", "stage.json"}


def test_a_killed_lab_ends_in_the_same_numbers(
    toy: Callable[..., Replication], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replication = toy()
    command = [sys.executable, "-m", "luthier", "replicate", "toy", "--jobs", "1", "--seeds", "2", "--out", str(tmp_path / "out")]
    killed = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stages = cache.lab_folder() / "stages"
    deadline = time.monotonic() + 120
    while not list(stages.glob("*/stage.json")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = len(list(stages.glob("*/stage.json")))
    assert 0 < done < 6
    resumed, work = run(replication, seeds=2)
    assert work[0] == 6 - done, "what was finished is not run again"
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "another"))
    undisturbed, work = run(replication, seeds=2)
    assert work == (6, 6) and numbers_of(resumed) == numbers_of(undisturbed)


def test_replications_that_contradict_themselves(toy: Callable[..., Replication]) -> None:
    mistakes = {
        "names that differ": ('Variant("half", ', 'Variant("full", '),
        "unlike numbers of rates": ('Variant("full")', 'Variant("full", rates=(1.0, 2.0))'),
        "no variant `ful` chooses": ('Variant("half", {"tune": "half"})', 'Variant("half", like="ful")'),
        "there is no variant `haf`": ('"half", "full"', '"haf", "full"'),
        "no direction": ('"not_more", 0.5', '"fewer", 0.5'),
        "below 0": ('"not_more", 0.5', '"not_more", -0.5'),
        "one main expectation": ('Expectation("loss", "half", "full", "not_more", 0.5)', "None"),
        "needs two seeds": ("minutes=1,", "minutes=1, seeds=1,"),
        "must export": ('name="toy"', 'name="other"'),
    }
    for what, change in mistakes.items():
        with pytest.raises(LuthierError, match=what):
            toy(change)
