"""One file, one technique; the folder is its kind. Nothing is imported until it is asked for."""
