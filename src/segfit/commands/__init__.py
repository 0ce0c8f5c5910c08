"""What an entry point does once its config is checked."""
