"""Speed and memory beside a plain training loop."""
