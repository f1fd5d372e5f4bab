"""Replications for the lab's tests: three steps on a tiny model."""

TOY = """
from luthier.lab.replication import Variant, Replication, Expectation

STEPS = 3


def rows(seed):
    return [{"id": f"{seed}-{i}", "prompt": f"what is {seed} and {i}?", "completion": f"it is {i}"} for i in range(4)]


def stages(setting):
    train = {"steps": STEPS, "batch_rows": 4, "precision": "fp32"}
    return [{"rows": {"train": rows(setting.seed)}, "train": train}]


def measure(done):
    return {"loss": done.runs[-1].facts["final_loss"]}


REPLICATION = Replication(
    name="toy",
    title="A toy",
    papers=["2404.18466"],
    rows=[8],
    says="Half is as good as all.",
    stages=stages,
    variants=[Variant("full"), Variant("half", {"tune": "half"})],
    main=Expectation("loss", "half", "full", "not_more", 0.5),
    measure=measure,
    choose=lambda done: -done.runs[0].facts["final_loss"],
    minutes=1,
    rates=(1e-3,),
    model="tiny:llama",
)
"""
