"""Measurements: load on OpenAI-compatible servers, soaks and kills, the engine's steps and kernels.

Also ``quire doctor``, ``quire tune`` and ``quire report``, which say what a machine does.
"""
