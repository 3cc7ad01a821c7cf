"""The readable CPU backend."""
