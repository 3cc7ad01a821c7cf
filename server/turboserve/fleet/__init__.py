"""Several models behind one port: a router without MLX, and one process for each loaded model.

`plan` says what is configured, `process` starts and ends one model's process, `fleet` decides which are loaded, and
the rest is HTTP: finding the model that a request means and passing its answer through.
"""
