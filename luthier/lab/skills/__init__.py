"""What can be learnt in the small world: a file for each family of skills."""
