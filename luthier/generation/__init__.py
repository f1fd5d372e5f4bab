"""Writing text: the one engine that answers prompts."""
