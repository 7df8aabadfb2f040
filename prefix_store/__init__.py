"""What a prefix is, how it is checked, where it is kept and how it is cached."""
