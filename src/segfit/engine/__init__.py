"""The training loop and what keeps it alive; knows no task, no model and no config."""
