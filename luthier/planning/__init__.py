"""The plan: from a recipe to a run that is ready to start, checked, in order, with its cost."""
