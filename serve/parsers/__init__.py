"""What a model's output means: content, reasoning and tool calls, told apart while it streams.

Text comes in with the model's marker tokens in it (:mod:`markers`), events go out (:mod:`events`).
:mod:`families` knows which model writes what; a family's call syntax is one module, a recursive
descent (:mod:`reader`, :mod:`syntax`); :mod:`output` joins it with the reasoning's tags.
"""
