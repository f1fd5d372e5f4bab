"""luthier fine-tunes language models and shows what each fine-tune changed."""

__version__ = "0.1.0"
