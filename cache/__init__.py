"""Which KV block belongs to whom, and the pages those blocks name."""
