"""One file per token mixer; the file name is the mixer's name."""
