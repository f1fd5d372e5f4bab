"""Results: the folders of runs, what they keep, and opening it again."""
