"""The schema of every config, and what can be wrong with one."""
