"""What tenants may use, and what they used. `docs/limits.md` says what clients see of it."""
