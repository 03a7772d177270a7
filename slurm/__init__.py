"""Slurm batch template and notes for administrators."""
