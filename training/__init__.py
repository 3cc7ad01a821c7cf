"""How the embedded model was made: corpus, tasks, training, export.

Its needs (torch, safetensors, tokenizers, a GPU for `train`) are not needs of the server, which never imports it.
"""
