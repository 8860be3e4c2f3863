"""HTTP: protocol, prompts, streaming, metrics, supervision and the command line."""
