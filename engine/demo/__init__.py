"""The demo model that ships with Quire: its corpus, its training and its weights."""
