"""Where a server keeps what it has, and the first administrator's key in it."""

from __future__ import annotations

from pathlib import Path

import platformdirs

DEFAULT_DATA_DIR = Path(platformdirs.user_data_dir("prefixserve"))


def store_dir(data_dir: Path) -> Path:
    """Where the embedded store of a data directory is."""
    return data_dir.expanduser() / "store"


def admin_key_file(data_dir: Path) -> Path:
    """Where the key is that a server makes when it starts without one."""
    return data_dir.expanduser() / "admin.key"
