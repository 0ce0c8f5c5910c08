"""The command line: composing, messages, exit codes."""
