"""What fine-tuning tools get wrong about masks, padding and truncation."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.batches import NOT_A_TARGET, collate
from luthier.rows.encode import Encoded, encode, encode_all
from luthier.rows.read import read

END = "<|im_end|>"


def plain_tokenizer(*, adds_bos: bool = False, **special: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    if adds_bos:
        begin = "<|im_start|>"
        pair = [(begin, tokenizer.convert_tokens_to_ids(begin))]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=begin + " $A", special_tokens=pair)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


def learned(row: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode([token for token, target in zip(row.token_ids, row.supervised, strict=True) if target]))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_text_begins_as_the_tokenizer_begins(adds_bos: bool) -> None:
    """Fault 10: documents and plain rows begin with a BOS exactly if the tokenizer adds one, and end with one EOS."""
    tokenizer = plain_tokenizer(adds_bos=adds_bos)
    begin = [tokenizer.bos_token_id] if adds_bos else []
    document = encode(read([{"text": "the answer"}])[0], tokenizer)
    inner = tokenizer("the answer", add_special_tokens=False)["input_ids"]
    assert list(document.token_ids) == [*begin, *inner, tokenizer.eos_token_id]
    assert document.supervised == (False,) + (True,) * (len(document) - 1)
    written_out = encode(read([{"text": f"<|im_start|>the answer{END}"}])[0], tokenizer)
    assert list(written_out.token_ids) == [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id]
    pair = encode(read([{"prompt": "the answer", "completion": " yes"}])[0], tokenizer)
    assert list(pair.token_ids[: len(begin)]) == begin
    assert learned(pair, tokenizer) == " yes" + END


def test_truncation_never_loses_the_answer_silently() -> None:
    """Fault 13: long rows are refused, or cut where the recipe says; a row without a target is dropped and counted."""
    tokenizer = plain_tokenizer(adds_bos=True)
    rows = read([{"id": "long", "prompt": "abcdefghij" * 3, "completion": "xyz"}, {"id": "ok", "text": "short"}])
    whole = encode(rows[0], tokenizer)
    limit = len(whole) - 5
    with pytest.raises(LuthierError, match=f"{len(whole)} tokens, and at most {limit}") as refused:
        encode_all(rows, tokenizer, max_length=limit)
    assert "row long" in refused.value.where

    right = encode_all(rows, tokenizer, max_length=limit, too_long="right")
    assert [row.id for row in right.rows] == ["ok"]
    (dropped,) = right.dropped
    assert "row long" in dropped.where and "5 tokens were cut off" in dropped.reason

    left = encode_all(rows, tokenizer, max_length=limit, too_long="left")
    assert left.truncated == 1 and not left.dropped
    cut = left.rows[0]
    assert len(cut) == limit and cut.truncated == 5
    assert cut.token_ids == (tokenizer.bos_token_id, *whole.token_ids[6:])
    assert learned(cut, tokenizer) == "xyz" + END

    with pytest.raises(LuthierError, match="no token is left to learn"):
        encode_all(rows[:1], tokenizer, max_length=limit, too_long="right")


def test_the_first_token_left_by_a_cut_is_no_target() -> None:
    """Fault 13: nothing stands before it to predict it from."""
    tokenizer = plain_tokenizer()
    row = encode(read([{"text": "the answer is yes"}])[0], tokenizer, max_length=3, too_long="left")
    assert row.supervised == (False, True, True)


PADS = {"pad is eos": END, "no pad": None, "pad is id 0": "<|endoftext|>"}


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_unlabels_the_end(pad: str, side: Literal["right", "left"]) -> None:
    """Fault 8: masks come from places: the last EOS keeps its label, padding is never a label and never attended."""
    tokenizer = plain_tokenizer(pad_token=PADS[pad])
    rows = read([{"prompt": "a", "completion": "yes"}, {"prompt": "the answer is", "completion": " no"}])
    batch = collate(encode_all(rows, tokenizer).rows, side=side)
    for index, row in enumerate(encode_all(rows, tokenizer).rows):
        real = batch.attend_BT[index]
        assert int(real.sum()) == len(row)
        assert batch.label_BT[index][real][-1] == tokenizer.eos_token_id
        assert (batch.label_BT[index][~real] == NOT_A_TARGET).all()
        assert batch.label_BT[index][real].tolist() == [
            token if target else NOT_A_TARGET for token, target in zip(row.token_ids, row.supervised, strict=True)
        ]


def test_a_token_with_id_zero_can_be_a_target() -> None:
    """Fault 8: id 0 is a token like any other."""
    row = Encoded("a", (5, 0, 0), (False, True, True), "here", {}, 0, "text")
    assert collate([row], pad_to_multiple=4).label_BT.tolist() == [[-100, 0, 0, -100]]


def test_labels_are_not_shifted() -> None:
    """Fault 7: a label stands where its token stands; the one causal shift is done elsewhere."""
    row = Encoded("a", (5, 6, 7), (False, False, True), "here", {}, 0, "text")
    batch = collate([row])
    assert batch.label_BT.tolist() == [[-100, -100, 7]]
    assert batch.supervised == 1


def _loss(model: LlamaForCausalLM, rows: list[Encoded], side: Literal["right", "left"]) -> torch.Tensor:
    batch = collate(rows, side=side, pad_to_multiple=8)
    logits_BTV = model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long(), position_ids=batch.position_BT).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), batch.label_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def test_left_and_right_padding_give_the_same_loss() -> None:
    """Fault 14: positions follow the mask, so the side of the padding changes nothing."""
    tokenizer = plain_tokenizer()
    rows = read([{"prompt": "a", "completion": "yes"}, {"prompt": "the answer is", "completion": " no\n\nyes"}])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).double().eval()
    encoded_rows = list(encode_all(rows, tokenizer).rows)
    with torch.no_grad():
        right, left = (_loss(model, encoded_rows, side) for side in ("right", "left"))
        alone = sum(_loss(model, [row], "right") for row in encoded_rows)
    torch.testing.assert_close(right, left, rtol=1e-12, atol=0)
    torch.testing.assert_close(right, alone, rtol=1e-12, atol=0)
    assert collate(encoded_rows, side="left").position_BT[:, -1].tolist() == [len(row) - 1 for row in encoded_rows]


@pytest.mark.parametrize("text", ["ünïcödé — 🎉", "\ttabs\t", "  two spaces", "\n\nline breaks", "e\u0301 \u200d🏳️", "\x00"])
def test_plain_targets_decode_to_the_text_byte_for_byte(text: str) -> None:
    """Fault 12: what is learned without a template is the answer and its end, byte for byte."""
    tokenizer = plain_tokenizer()
    answer = text + "."
    for record in ({"prompt": "a\n", "completion": answer}, {"instruction": "do", "input": "it", "output": answer}):
        assert learned(encode(read([record])[0], tokenizer), tokenizer) == answer + END
