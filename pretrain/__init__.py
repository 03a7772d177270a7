"""What is trained: mixers, models, engines, checkpoints and the loop over them."""
