"""Ollama's API over ours: a thin adapter, for clients that speak nothing else."""
