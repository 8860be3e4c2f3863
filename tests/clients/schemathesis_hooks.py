"""Gives generated bodies the name of the model that is served, and few tokens to generate."""

from typing import Any

import schemathesis

MODEL = "quire-demo"
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Requests without a limit of their own generate until the context is full.
LIMITED = {
    "/v1/chat/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
MOST = 8


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    for name in LIMITS:
        if type(body.get(name)) is int and body[name] > MOST:
            body[name] = MOST
    name = LIMITED.get(case.operation.path)
    if name is not None and all(body.get(key) is None for key in LIMITS):
        body[name] = MOST
