"""From files (or formulas) to uint8 batches."""
