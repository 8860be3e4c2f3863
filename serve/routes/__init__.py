"""The endpoints, one module for each family; what they share lies in ``quire.serve``."""
