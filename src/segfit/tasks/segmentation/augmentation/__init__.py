"""One list of operations, in the workers or on the device."""
