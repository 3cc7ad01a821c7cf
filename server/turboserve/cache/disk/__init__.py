"""The disk store: conversations that survive a restart, written in the background with NumPy only."""

from turboserve.cache.disk.files import StoreLockedError
from turboserve.cache.disk.layout import StoreFolderError
from turboserve.cache.disk.shared import SharedDiskStore
from turboserve.cache.disk.store import DiskCounts, DiskStore

__all__ = ["DiskCounts", "DiskStore", "SharedDiskStore", "StoreFolderError", "StoreLockedError"]
