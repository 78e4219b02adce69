"""DSPy's and LiteLLM's own ways beside ours, in one interleaved run, on the same work: `python -m benchmarks.peers`."""
