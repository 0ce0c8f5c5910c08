"""Pictures from files, and what is trained, scored and restored of them."""
