"""Which variant of an operation runs where, and why: support, checks and measurements."""
