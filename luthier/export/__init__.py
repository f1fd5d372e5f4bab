"""Writing what was tuned for other tools: merged Hugging Face folders, GGUF files and PEFT adapters; reading PEFT adapters back."""

from luthier.export.gguf import export_gguf
from luthier.export.model import export_model, merged
from luthier.export.peft import export_peft, load_peft

__all__ = ["export_gguf", "export_model", "export_peft", "load_peft", "merged"]
