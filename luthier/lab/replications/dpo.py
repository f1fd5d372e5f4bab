"""Direct Preference Optimization (arXiv:2305.18290): what pairs teach that their better halves alone do not."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Finished, Replication, Variant
from luthier.lab.tasks import TAUGHT, mean
from luthier.lab.tastes import chosen_alone, comparing, taste, two_stages


def measure(finished: Finished) -> dict[str, float]:
    """The taste, and the old skills."""
    return {**taste(finished), "kept": mean(finished.runs[-1], TAUGHT)}


def choose(finished: Finished) -> float:
    """Judges a learning rate by the taste."""
    return taste(finished)["liked"]


REPLICATION = Replication(
    name="dpo",
    title="Learning from pairs what their better answers alone do not teach",
    papers=["2305.18290"],
    rows=[],
    says="Preferences are learnt directly from pairs, and further than by cross-entropy on the preferred answers.",
    stages=two_stages,
    variants=[
        Variant("sft", chosen_alone, "cross-entropy on the chosen answers"),
        Variant("dpo", comparing("dpo"), "the pairs, compared"),
        Variant("ipo", comparing("ipo"), "the pairs, up to a margin"),
        Variant("simpo", comparing("simpo"), "the pairs, without a reference"),
    ],
    main=Expectation("liked", "dpo", "sft", "more", 0.1, "what it says is liked better"),
    also=[
        Expectation("best", "dpo", "sft", "more", 0.2, "the best answer is the usual one"),
        Expectation("form", "dpo", "sft", "not_more", 0.5, "and the form of answers stays"),
        Expectation("liked", "ipo", "sft", "more", 0.1, "ipo does it, too"),
        Expectation("liked", "simpo", "sft", "more", 0.1, "and simpo"),
        Expectation("kept", "dpo", "sft", "not_less", 0.03, "as much of what was known is kept"),
    ],
    question="What do preferences teach?",
    measure=measure,
    choose=choose,
    choose_stages=2,
    unit="rank of the answer, 0 to 1",
    rates=(1e-5, 1e-4, 1e-3),
    minutes=12,
    notes="The paper compares summaries and dialogues by a judge. Here eight answers to a question differ in one word, have an order, and "
    "are all as likely before; pairs are two of them, drawn alike. Cross-entropy on the better ones comes to the mean of what wins, two "
    "thirds of the way up; what is measured is the mean rank under the model's own likelihoods, without sampling.",
)
