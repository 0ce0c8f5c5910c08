"""The run folder: its files, its lock, and how untrusted ones are read."""
