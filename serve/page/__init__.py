"""The page at /: a chat with the served model beside the figures of what runs."""
