"""From a recipe to a run and what it leaves: training, resuming, and what people do with a run."""
