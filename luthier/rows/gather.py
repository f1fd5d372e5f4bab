"""From what a recipe says about rows to the rows that are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError, Say
from luthier.kinds import Annotation
from luthier.kinds.parts import Reads
from luthier.recipe import RowsRecipe
from luthier.rows.annotate import check_streamed
from luthier.rows.blocks import Splitter, splitter_of
from luthier.rows.cache import Kept, keep
from luthier.rows.chat import Form, form_of
from luthier.rows.chunks import Encoding
from luthier.rows.encode import EncodedRows, Purpose, encode_all
from luthier.rows.limits import Limits
from luthier.rows.mixture import Mixture, Source, make_mixture
from luthier.rows.read import Rows
from luthier.rows.sources import Sources, Streamed, distinct, places_of


def encode_rows(
    recipe: RowsRecipe,
    sources: Sources,
    raw: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    reads: Reads,
    say: Say,
    annotations: tuple[Annotation, ...] = (),
    purpose: Purpose = "train",
) -> Kept:
    """Training rows as tokens and labels.

    Args:
        recipe: what to do with rows.
        sources: what `luthier.rows.sources.read_rows` gave.
        raw: their rows after all row maps.
        tokenizer: the model's tokenizer.
        reads: what the model can read: no row is longer, and none has other tokens.
        say: hears what is being done.
        annotations: what gives the rows' tokens numbers.
        purpose: `train`, or `read` where a head reads the rows.

    Raises:
        LuthierError: a row cannot be used, rows may be longer than the model can read, or an annotation cannot be streamed.
    """
    limit, context = recipe.max_length, reads.context
    if limit is not None and context is not None and limit > context:
        raise LuthierError(
            f"rows of {limit} tokens are longer than this model reads ({context})",
            where="rows.max_length",
            fix=f"use at most {context}",
        )
    if recipe.streaming:
        streamed = [one for one in sources if isinstance(one, Streamed)]
        check_streamed(annotations, recipe.workers)
        encoding = Encoding(form_of(tokenizer), recipe.loss_on, limit, recipe.too_long, annotations, reads, purpose)
        return keep(streamed, encoding, on_bad_row=recipe.on_bad_row, workers=recipe.workers, say=say)
    rows = encode_all(
        raw,
        tokenizer,
        purpose=purpose,
        loss_on=recipe.loss_on,
        max_length=limit,
        too_long=recipe.too_long,
        on_bad_row=recipe.on_bad_row,
        annotations=annotations,
        reads=reads,
    )
    return Kept(rows, (), tuple(bad for one in sources if isinstance(one, Rows) for bad in one.skipped), ())


def splitter_for(recipe: RowsRecipe, form: Form, reads: Reads) -> Splitter | None:
    """What cuts documents into blocks as a recipe says, each no longer than a row may be; None where it leaves them whole.

    Raises:
        LuthierError: as `luthier.rows.blocks.splitter_of`.
    """
    longest = Limits(recipe.max_length, recipe.too_long, reads).longest
    return splitter_of(recipe.blocks, form.tokenizer, form.first_ids, longest)


def mixture_of(
    recipe: RowsRecipe, seed: int, sources: Sources, rows: EncodedRows, places: Sequence[Sequence[int]] = ()
) -> Mixture | None:
    """How often an epoch takes rows of each source; None where all come once.

    Args:
        recipe: holds the weights, or a temperature.
        seed: the run's seed.
        sources: what `luthier.rows.sources.read_rows` gave.
        rows: all encoded rows.
        places: of each source's rows among them; none: they are found by the rows' ids.

    Raises:
        LuthierError: a source has no usable row or too small a share, or a row map made rows of no source.
    """
    weights = [one.weight for one in recipe.sources()]
    if recipe.temperature == 1.0 and not any(weights):
        return None
    places = places or places_of([one for one in sources if isinstance(one, Rows)], rows)
    names = distinct([one.name for one in sources])
    mixed = [Source(name, weight, place) for name, weight, place in zip(names, weights, places, strict=True)]
    return make_mixture(mixed, rows.sizes, temperature=recipe.temperature, share=recipe.mixture_unit, seed=seed)
