"""Where a run happens: this machine, and what is shown of it."""
