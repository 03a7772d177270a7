"""The arithmetic: each fast path stands beside a plain twin that tests hold it to."""
