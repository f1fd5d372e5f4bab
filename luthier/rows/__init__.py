"""Rows: reading them, turning them into token ids with targets, and putting them into batches."""
