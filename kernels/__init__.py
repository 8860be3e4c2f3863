"""Arrays in, arrays out: attention over pages, KV writes and sampling masks."""
