"""What can be learnt in the synthetic benchmark: a file for each family of skills."""
