"""What can be learned in the synthetic benchmark: a file for each family of skills."""
