"""TurboServe: an OpenAI-compatible local inference server over TurboQuant-compressed KV caches."""

__version__ = "0.1.0"
