"""The stages of prove.py."""
