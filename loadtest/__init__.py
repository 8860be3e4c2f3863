"""Traffic for OpenAI-compatible servers: load, measurement and comparison."""
