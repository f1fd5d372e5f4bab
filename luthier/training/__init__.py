"""The loop, the step, and what happens between steps."""
