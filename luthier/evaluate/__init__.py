"""What a model knows before and after: answers, likelihoods, intervals, paired comparisons, overlap."""
