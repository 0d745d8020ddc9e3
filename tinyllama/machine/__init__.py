"""What tinyllama needs of the computer: files, memory, signals, downloads. It is told bytes, not models."""
