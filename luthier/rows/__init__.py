"""Rows: reading them, writing them as a model reads them, putting them into batches, and looking at all that."""
