"""This engine beside other ones on the same prompts: `python -m benchmarks.peers`."""
