"""What tinyllama needs of the computer: files, memory and cores, Ctrl-C, and downloads of models by name."""
