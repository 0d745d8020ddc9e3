"""LLaMA on your own laptop, to read and to run."""
