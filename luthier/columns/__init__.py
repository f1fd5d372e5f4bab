"""Where hidden states become numbers about tokens: targets, losses, and the one chunked pass over the head."""
