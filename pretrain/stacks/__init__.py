"""One file per stack: what stands between the embedding and the head."""
