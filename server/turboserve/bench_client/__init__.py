"""A client that loads OpenAI-compatible servers and measures what its answers show. Knows nothing of our server's code.

`mix` says what is asked and when, `asking` reads one streamed answer, `load` runs a round of them, `probe` finds out
what a server takes, `kv_watch` reads KV memory, `figures` makes percentiles, `report` and `plot` show them, `session`
puts all of it together.
"""
