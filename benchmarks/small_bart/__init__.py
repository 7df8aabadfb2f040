"""A small BART trained from scratch, and two tasks that prefixes teach it."""
