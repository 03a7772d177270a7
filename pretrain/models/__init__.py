"""Whole models built from mixers and channel mixers."""
