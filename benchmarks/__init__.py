"""What measures speed. Each module prints one JSON object as its last line."""

import server  # noqa: F401 - before torch: OpenMP's settings are the server's
