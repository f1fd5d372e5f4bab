"""Where hidden states become numbers about tokens: labels, losses, and the one chunked pass over the head."""
