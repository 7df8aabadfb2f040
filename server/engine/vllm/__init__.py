"""vLLM behind the `Engine` protocol, and the connector through which it reads prefixes.

Imported only when chosen: vLLM is an extra.
"""
