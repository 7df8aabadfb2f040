"""What measures speed. Each module prints one JSON object as its last line."""
