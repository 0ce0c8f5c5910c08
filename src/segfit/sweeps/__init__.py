"""Sweeps: a process for each job, and the leader board."""
