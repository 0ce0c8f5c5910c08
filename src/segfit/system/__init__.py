"""What this machine is, and what it is asked for; imports nothing else of SegFit but its errors."""
