"""From text anywhere to batches in a proved order."""
