"""Series forecasting: windows of values in, the values that follow out."""
