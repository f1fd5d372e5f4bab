"""Half Fine-Tuning (arXiv:2404.18466): a stream of four skills, and what is left of the old ones."""

from __future__ import annotations

from luthier.lab.costs import backward_share, seconds
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.tasks import TAUGHT, mean, teach, validation

STREAM = ("second_language", "sort", "updated_facts", "traces")


def stages(setting: Setting) -> list[Recipe]:
    """Four new skills, one after the other."""
    return [
        teach("second_language", setting, count=600, epochs=6),
        teach("sort", setting, count=800, epochs=6),
        teach("updated_facts", setting, count=900, epochs=4),
        teach("traces", setting, count=250, epochs=4),
    ]


def measure(finished: Finished) -> dict[str, float]:
    """The skill of the first stage and the old ones behind it; all of them behind the last stage; the cost."""
    first, last = finished.runs[0], finished.runs[-1]
    return {
        "learnt": mean(first, STREAM[:1]),
        "kept": mean(first, TAUGHT),
        "learnt, stream": mean(last, STREAM, count=100),
        "kept, stream": mean(last, TAUGHT),
        "seconds per 1000 tokens": seconds(finished.runs),
        "backward per forward": backward_share(finished),
    }


REPLICATION = Replication(
    name="half",
    title="Half Fine-Tuning keeps more of what was known",
    papers=["2404.18466"],
    rows=[8],
    says="Training a random half of every block's matrices learns as much as training all, forgets less, and takes about 30 % less time.",
    stages=stages,
    variants=[
        Variant("full", {"tune": {"full": {}}}, "every matrix trains"),
        Variant("half", {"tune": {"half": {}}}, "half of every block's matrices train; another half each stage"),
        Variant("full, half the rate", {"tune": {"full": {}}}, "control: as far, but everywhere", like="full", rate_factor=0.5),
    ],
    main=Expectation("kept", "half", "full", "more", 0.02, "half keeps more after one skill"),
    also=[
        Expectation("learnt", "half", "full", "not_less", 0.05, "half learns a new skill as well"),
        Expectation("kept, stream", "half", "full", "more", 0.02, "half keeps more after four skills"),
        Expectation("learnt, stream", "half", "full", "not_less", 0.05, "half holds the four new skills as well"),
        Expectation("backward per forward", "half", "full", "less", 0.2, "half's backward pass is cheaper"),
        Expectation("seconds per 1000 tokens", "half", "full", "less", 0.0, "half's steps are quicker"),
    ],
    question="Is it enough to train some of the numbers?",
    measure=measure,
    choose=validation(STREAM[0]),
    floor={"learnt": 0.3},
    minutes=14,
    notes="The paper fine-tunes Llama 2 7B on instructions and on eight tasks of TRACE. Embeddings train in both variants, as there.",
)
