"""What fits, what is fastest, why the device idles: one module a mode of benchmark.py.

A mode's module has `run(config, bench) -> Findings`; it measures what `segfit.assembly` makes of the config and the
engine's own step, and re-implements neither.
"""
