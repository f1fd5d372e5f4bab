"""The run's other models: loaded, compared with its own, and where that goes, put beside its weights instead of into memory again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier import disk
from luthier.delta import Delta
from luthier.errors import LuthierError, Say, nearest
from luthier.export.peft import parted
from luthier.kinds import Now
from luthier.models.attention import replace_sdpa
from luthier.models.fingerprint import fingerprint
from luthier.models.load import ModelSource, load_tokenizer
from luthier.models.parts import map_parts
from luthier.models.quantized import count
from luthier.planning.amounts import memory
from luthier.planning.load import Loaded
from luthier.results.folder import Run, read_run
from luthier.results.opened import open_run
from luthier.results.start import BESIDE, DELTA, find_start, is_run, load_start, recipe_of, source_of
from luthier.training.packing import obstacle
from luthier.training.services import RunServices
from luthier.tune import Tune


@dataclass
class OtherModels:
    """Loads what techniques ask for, and remembers what it was.

    Args:
        named: what each name stands for: a model, or a run.
        out: the folder that holds the run folders.
        loaded: the run's own model, untouched.
        say: hears what is being done.
    """

    named: Mapping[str, str]
    out: str
    loaded: Loaded
    say: Say
    identities: dict[str, str] = field(default_factory=dict)
    """A fingerprint of each that was loaded, by name."""
    told: list[str] = field(default_factory=list)
    """A sentence on each, for the plan."""

    def load(self, asked: Mapping[str, str]) -> dict[str, Tune]:
        """The models that techniques ask for, by name.

        Args:
            asked: their names, each with the technique that asks for it.

        Raises:
            LuthierError: the recipe does not name one of them, it cannot be loaded, or its tokens are others than the run's.
        """
        return {name: self._load(name, slot) for name, slot in asked.items()}

    def unused(self) -> list[str]:
        """Names that nothing asks for."""
        return [name for name in self.named if name not in self.identities]

    def _load(self, name: str, slot: str) -> Tune:
        if name not in self.named:
            near = nearest(name, self.named) if self.named else ""
            raise LuthierError(
                f"`{slot}` asks for a model `{name}`, and the recipe names none",
                where="models",
                fix=f"{near} Name it: models: {{{name}: MODEL or RUN}}".strip(),
            )
        value = self.named[name]
        self.say(f"loading {name}: {value}")
        try:
            return self._of_run(name, value) if is_run(value, self.out) else self._of_model(name, value)
        except LuthierError as error:
            if error.where != "model":
                raise
            raise LuthierError(error.what, where=f"models.{name}", fix=error.fix) from error

    def _of_model(self, name: str, value: str) -> Tune:
        start = find_start(value, self.out, say=self.say)
        _check_predicts(value, start.source)
        self._check_tokens(name, load_tokenizer(start.source))
        model = load_start(start, self.loaded.dtype).to(self.loaded.device)  # type: ignore[arg-type]
        return self._apart(name, value, Tune(model, map_parts(model)), fingerprint(model))

    def _of_run(self, name: str, value: str) -> Tune:
        loaded = self.loaded
        _check_predicts(value, source_of(value, self.out, self.say))
        run = read_run(value, self.out)
        identity = f"{run.fact('model', 'fingerprint')} {_content(run)}"
        beside = self._beside(run)
        if beside is not None:
            self.identities[name] = identity
            self.told.append(f"{name}: {value}, beside the weights of {loaded.start.name}: {beside.numbers():,} numbers more")
            return beside
        tune, tokenizer = open_run(run, out=self.out, say=self.say)
        self._check_tokens(name, tokenizer)
        tune.model.to(loaded.device, loaded.dtype)
        return self._apart(name, value, tune, identity)

    def _beside(self, run: Run) -> Tune | None:
        """A run as what stands beside the run's own weights; None where it has to be a model of its own."""
        loaded = self.loaded
        recipe_of(run)
        other_base = run.fact("model", "fingerprint") != loaded.fingerprint
        if other_base or loaded.root is not None or (run.folder / BESIDE).is_file():
            return None
        delta = Delta.load(run.folder / DELTA)
        inside, value = parted(delta, loaded.parts)
        if inside.changes or value is None:
            return None
        tune = Tune(loaded.model, loaded.parts)
        tune.add("delta", value, RunServices(tune, "delta", Now()), {})
        reached = {one.place.parameter for one in tune.additions if one.place is not None}
        if not reached >= delta.changes.keys():
            tune.detach()
            return None
        tune.is_off = tune.packs = True
        return tune

    def _apart(self, name: str, value: str, tune: Tune, identity: str) -> Tune:
        """A model of its own."""
        self.identities[name] = identity
        model: nn.Module = tune.model
        replace_sdpa(model)
        tune.packs = not obstacle(tune)
        size = sum(one.nbytes for one in model.parameters())
        self.told.append(f"{name}: {value}, a model of its own: {count(model):,} parameters, {memory(size)} more")
        return tune

    def _check_tokens(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that reads other tokens. Ids behind all tokens are padding of the matrices, and may differ."""
        mine, theirs = self.loaded.tokenizer.get_vocab(), tokenizer.get_vocab()
        if mine == theirs:
            return
        differ = [one for one in {**mine, **theirs} if mine.get(one) != theirs.get(one)]
        token = min(differ, key=lambda one: mine[one] if one in mine else theirs[one])
        raise LuthierError(
            f"`{name}` reads other tokens than {self.loaded.start.name}: `{token}` is {_id(theirs, token)} there, "
            f"and {_id(mine, token)} here",
            where=f"models.{name}",
            fix="use a model with the same tokenizer, or learn from text that it wrote",
        )


def _check_predicts(value: str, source: ModelSource) -> None:
    if source.kind == "encoder":
        raise LuthierError(
            f"`{value}` is an encoder, which predicts no tokens to compare with", where="model", fix="name a causal language model"
        )


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "no token"


def _content(run: Run) -> str:
    """What a run learned, by the content of its files."""
    files = [run.folder / name for name in (DELTA, BESIDE)]
    return " ".join(disk.sha256(one) for one in files if one.is_file())
