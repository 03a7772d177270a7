"""The forms of Leviathan's correlation: what one head of one document does with its queries, keys and values."""
