"""What a prefix is, how it is checked, where it is kept and how it is cached."""

from prefix_store.base_model import BaseModelSpec
from prefix_store.cache import CacheObserver, PrefixCache
from prefix_store.prefix import Prefix, version_of
from prefix_store.store import PrefixStore, TaskRecord
from prefix_store.task_id import check_task_id
from prefix_store.upload import read_upload
from prefix_store.validate import check_fits

# The store itself is imported from its own module: reading a prefix needs no Redis client.
__all__ = [
    "BaseModelSpec",
    "CacheObserver",
    "Prefix",
    "PrefixCache",
    "PrefixStore",
    "TaskRecord",
    "check_fits",
    "check_task_id",
    "read_upload",
    "version_of",
]
