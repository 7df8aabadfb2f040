"""How well prefixes work beside other ways to train a task, on E2E and WebNLG."""
