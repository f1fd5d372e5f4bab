"""The same recipe with several values of its keys, side by side: learning rates chosen alike, several seeds, one page."""
