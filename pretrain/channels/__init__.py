"""One file per channel mixer; the file name is the channel mixer's name."""
