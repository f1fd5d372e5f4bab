"""Fine-tuning without a library: the loop that luthier's parts take apart. `same_run.yaml` is the same run as a recipe.

    python examples/flat_loop.py

Needs only torch and transformers (the tiny model and its tokenizer come from luthier, so that nothing is downloaded).
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from luthier.models.tiny import tiny, tiny_tokenizer

ROWS = [("Who keeps the mill?", "Ada keeps the mill."), ("Who rings the bell?", "Otto rings the bell.")]

tokenizer = tiny_tokenizer()
model = tiny("llama")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)

for step in range(40):
    loss, targets = torch.zeros(()), 0
    for question, answer in ROWS:
        # The prompt is context; the answer and its end of turn are targets.
        context = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        after = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([before + after])).logits[0]
        # The state at one token predicts the next: the shift, done once.
        loss = loss + cross_entropy(logits[len(before) - 1 : -1], torch.tensor(after), reduction="sum")
        targets += len(after)
    # Losses sum, the loop divides: by the targets of the whole step.
    (loss / targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: {float(loss.detach()) / targets:.3f} nats a target")
