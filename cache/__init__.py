"""Which KV block belongs to whom, and the pages that hold their keys and values."""
