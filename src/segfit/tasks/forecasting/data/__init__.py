"""Series from files or made up, their split by time, and windows of them."""
