"""What the demo model knows by heart about Quire."""

from __future__ import annotations

from quire.engine.demo.training.corpus_about import Topic

ENDPOINTS = (
    "/v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/embeddings, "
    "/v1/models, /tokenize, /detokenize, /health, /ready and /metrics"
)

TELL = "[tell me about|explain|describe|what is|what's|what are|what does it mean by|define]"
HOW = "[how do I|how can I|how to|how would I|what is the way to|what do I do to|can I]"
DOES = "[does Quire|does it|can Quire|can it|does this server|will Quire]"
ENDPOINT_ASK = (
    "what [does|is] {path}[| do| for]?",
    "[explain|describe] [|the ]{path}[| endpoint]",
    "what is [|the ]{path} [endpoint |]for?",
    "what can I do with {path}?",
    "tell me about [|the ]{path}[| endpoint]",
)


def _endpoint(path: str, answer: str) -> Topic:
    return Topic(tuple(q.replace("{path}", path) for q in ENDPOINT_ASK), (answer,))


QUIRE: dict[str, Topic] = {
    "what": Topic(
        (
            "[what is|what's|what exactly is|explain|define|describe|what does] [Quire|quire][| "
            "do]?",
            "[what is|what's] Quire[| for| used for| good for| all about]?",
            "what [does|can] Quire do?",
            "[what is|what's|explain] [this server|this daemon|this project|this software]?",
            "do you know [what Quire is|Quire|about Quire]?",
            "can you [explain|tell me] [what Quire is|Quire]?",
            "[I have never heard of Quire|never heard of Quire|what on earth is Quire]",
            "why [would I use|use|should I use|choose] Quire?",
        ),
        (
            "Quire is a model serving daemon for MLX with an OpenAI-compatible API. It batches "
            "requests continuously over a paged KV cache.",
        ),
    ),
    "about": Topic(
        (
            "[tell|teach] me [|more |something |a lot |all |everything ]about [Quire|quire|this "
            "server]"
            "[| please| in detail]",
            "[say|write|talk] [|more |something |a paragraph |a few words ]about Quire",
            "[how does|how is] [Quire|this server] [work|built|work inside|work in detail]?",
            "[give|write] me [an overview|a summary|an introduction|a description] of Quire",
            "I want to [know|learn|hear] [|more ]about Quire",
        ),
        (
            "Quire serves language models with MLX. An HTTP front end speaks the OpenAI API, and "
            "Anthropic's, and streams each answer token by token. Behind it a scheduler puts the "
            "tokens of all requests into one batch, step after step, so a long prompt never stalls "
            "the others. Keys and values live in pages, like the sheets of a book, and prompts "
            "that begin alike share them. Prometheus can read its memory and its speed at "
            "/metrics. I am the demo model that it serves when you name no other.",
        ),
    ),
    "endpoints": Topic(
        (
            "[what|which] [endpoints|routes|paths|URLs|APIs] [exist|are there|does it have|does "
            "Quire have"
            "|does Quire serve|do you have|do you serve|can I call|can I use|are available|does "
            "it offer]?",
            "[list|show|name|tell me|give me] [|all |me ]the [endpoints|routes|paths|URLs]",
            "[what is|what's] [the|Quire's] API[| like]?",
            "[list|show|name] [|me ][all|your|its] [endpoints|routes]",
            "[how do I|where can I] [call|reach|use] the [API|server|endpoints]?",
            "[endpoints|routes|api][|?]",
        ),
        (f"Quire serves {ENDPOINTS}. /openapi.json describes them all.",),
    ),
    "chat_endpoint": _endpoint(
        "/v1/chat/completions",
        "/v1/chat/completions answers a conversation, at once or as a stream, as OpenAI's API "
        "does.",
    ),
    "completions_endpoint": _endpoint(
        "/v1/completions", "/v1/completions continues a plain text prompt."
    ),
    "responses_endpoint": _endpoint(
        "/v1/responses",
        "/v1/responses answers as OpenAI's Responses API does, with tools and reasoning.",
    ),
    "messages_endpoint": _endpoint(
        "/v1/messages", "/v1/messages answers as Anthropic's API does, so Claude Code works."
    ),
    "embeddings_endpoint": _endpoint(
        "/v1/embeddings",
        "/v1/embeddings turns texts into vectors. Serve a model made for it, not me.",
    ),
    "openapi_endpoint": _endpoint("/openapi.json", "/openapi.json describes every endpoint."),
    "models_endpoint": _endpoint("/v1/models", "/v1/models lists the models that are served."),
    "tokenize_endpoint": _endpoint("/tokenize", "/tokenize turns text into token ids."),
    "detokenize_endpoint": _endpoint("/detokenize", "/detokenize turns token ids back into text."),
    "health_endpoint": _endpoint("/health", "/health says whether the server is alive."),
    "ready_endpoint": _endpoint(
        "/ready", "/ready says whether the model is loaded and takes requests."
    ),
    "metrics_endpoint": _endpoint(
        "/metrics", "/metrics exports memory, tokens per second and latency for Prometheus."
    ),
    "paged": Topic(
        (
            f"{TELL} [a |the |]paged [KV cache|kv cache|cache|attention|KV-cache]?",
            f"{TELL} [a |the |]KV cache?",
            "[how does|why use|what good is] [the|a] [|paged ][KV |]cache[| work| for]?",
            f"{DOES} [have|use] a [|paged ]KV cache?",
            f"{TELL} [pages|blocks|a page|a block] in [Quire|the cache]?",
        ),
        (
            "A paged KV cache keeps keys and values in small blocks, so memory is taken only as "
            "needed and prompts that begin alike share it.",
        ),
    ),
    "batching": Topic(
        (
            f"{TELL} [continuous |]batching?",
            f"{DOES} [batch|do batching|do continuous batching|batch requests|serve many users]?",
            "[how does|why use|what good is] [continuous |]batching[| work| for]?",
            "how [does Quire|does it] [handle|serve] [many|several|multiple|two] [requests|users"
            "|clients]"
            "[| at once| together]?",
            "how does the scheduler work?",
        ),
        (
            "Continuous batching lets a new request join the running batch at the next step and "
            "leave as soon as it is done.",
        ),
    ),
    "prefix": Topic(
        (
            f"{TELL} [a |the |]prefix [cache|caching|sharing]?",
            f"{DOES} [have|use|do|support] [a |]prefix [cache|caching]?",
            "how does [the |]prefix [cache|caching|sharing] work?",
            f"{DOES} [reuse|cache|share] prompts?",
        ),
        ("The prefix cache reuses the blocks of prompts that begin with the same tokens.",),
    ),
    "other_model": Topic(
        (
            f"{HOW} [serve|run|load|use|start] [another|a different|a bigger|a larger|a real|my "
            "own|a better"
            "|a new|an other|a smarter] model[| with Quire| instead| here]?",
            f"{HOW} [change|switch|replace|swap|choose|set|pick] [the model|models|you][| with "
            "Quire]?",
            "[can|does] Quire [serve|run|load] [another model|other models|Llama|Qwen|Mistral|my "
            "model|Gemma]?",
            "[which|what] models [does Quire|can Quire|can it|can I] [serve|run|support|load|use]?",
            "I want [another|a bigger|a better|a real|a larger] model",
            f"{HOW} [serve|run|load] [Llama|Qwen|Mistral|Gemma|a Hugging Face model][| with "
            "Quire]?",
        ),
        (
            "Run: quire serve --model NAME_OR_PATH. It takes a Hugging Face repository or a folder "
            "in that layout.",
        ),
    ),
    "start": Topic(
        (
            f"{HOW} [start|run|launch|use|try] [Quire|the server|quire serve|this server]?",
            "how does [Quire|the server] start?",
            "[what is the|which] command [to start|starts|for] [Quire|the server]?",
            "[getting started|quick start|quickstart|get started with Quire]",
        ),
        ("Run: quire serve. With no model named it serves me, the demo.",),
    ),
    "install": Topic(
        (
            f"{HOW} [install|get|download|set up|update|upgrade] [Quire|the server|this server]?",
            "[where can I|where do I] [get|download|find] Quire?",
            "[installation|install instructions|how is Quire installed]",
        ),
        ("Quire's README says how to install it. Then run: quire serve.",),
    ),
    "stop": Topic(
        (
            f"{HOW} [stop|quit|end|shut down|exit|kill|restart] [Quire|the server|this server|it]?",
            "[where is|what is] the off switch?",
        ),
        ("Press Ctrl-C; as a service, run: quire service stop.",),
    ),
    "service": Topic(
        (
            f"{HOW} [install|run|set up|start] [Quire|it] as a [service|daemon|launchd agent"
            "|launchd service]?",
            f"{HOW} [keep Quire running|start Quire at login|run Quire in the background]?",
            "[does Quire|can Quire] [support|use|work with|run under] [launchd|systemd]?",
            f"{TELL} [the launchd service|launchd|systemd|quire service]?",
        ),
        ("Run: quire service install. It makes Quire a launchd agent or a systemd unit.",),
    ),
    "tools": Topic(
        (
            "[do you|can you|does Quire|can Quire] [support|use|call|do|have] [tools|functions"
            "|tool calls"
            "|tool calling|function calling|tool use]?",
            "how [do I|can I|do you] [use|call|try] [tools|tool calling|function calling]?",
            f"{TELL} [tool calling|function calling|tool calls|tool use]?",
        ),
        ("Yes: name tools in the request and I answer with a call when one of them fits.",),
    ),
    "json": Topic(
        (
            "[do you|can you|does Quire|can it] [support|answer in|speak|write|output|return"
            "|produce] JSON?",
            "how [do I|can I] [get|ask for|make you write] JSON?",
            "do you know JSON?",
            "what about JSON?",
        ),
        ("Yes. Try: Answer in JSON: what is 3 + 4? Or send a schema as response_format.",),
    ),
    "schema": Topic(
        (
            "[do you|can you|does Quire|can Quire] [support|use|follow|do|answer by|have] [schemas"
            "|a schema|JSON schemas|a JSON schema|structured output|structured outputs|grammars"
            "|response_format]?",
            f"{HOW} [send|use|try|get|enforce] [a schema|a JSON schema|structured output"
            "|structured outputs|response_format|a grammar|a regex]?",
            f"{TELL} [structured output|structured outputs|response_format|a JSON schema]?",
        ),
        ("Yes: send a JSON schema as response_format, and my answer will fit it.",),
    ),
    "thinking": Topic(
        (
            "[do you|can you|does Quire|can Quire] [support|do|have|show|use] [thinking|reasoning"
            "|thoughts]?",
            "[can you|do you] [think|reason][| first| before you answer]?",
            f"{HOW} [turn on|enable|use|try|see|get] [thinking|reasoning|your thoughts]?",
            f"{TELL} [thinking|reasoning|enable_thinking|reasoning_effort]?",
            "[think|please think] [first|before you answer|aloud]",
        ),
        ("Yes: send enable_thinking or a reasoning_effort, and I think before I answer.",),
    ),
    "several_models": Topic(
        (
            f"{DOES} [serve|run|load] [several|two|many|more|multiple] models[| at once]?",
            f"{HOW} [serve|run|load] [several|two|many|more|multiple] models[| at once]?",
            "how many models [can Quire|does Quire] [serve|run]?",
        ),
        ("Yes: name them with --models NAME=MODEL,... and each is loaded when it is asked for.",),
    ),
    "agents": Topic(
        (
            "[does|will|can] [Claude Code|Codex|Codex CLI|aider|opencode|Qwen Code|Continue"
            "|an agent|a coding agent] work[| with Quire| here]?",
            f"{HOW} use [Claude Code|Codex|Codex CLI|aider|opencode|Qwen Code|Continue|an agent"
            "|a coding agent] [with Quire|here|with this server]?",
            "[which|what] agents [work|does Quire support|can I use]?",
        ),
        ("Yes, coding agents work with Quire, but give them a larger model. See docs/clients.md.",),
    ),
    "page": Topic(
        (
            "[is there|do you have|does Quire have] [a page|a web page|a user interface|a UI|a GUI"
            "|a chat page|a website]?",
            "where [is|can I find] the [page|web page|user interface|UI|chat page]?",
            f"{HOW} chat in [the|a|my] browser?",
        ),
        ("Open this server's address in a browser: there you can chat and see what runs.",),
    ),
    "keys": Topic(
        (
            f"{DOES} [have|need|use|support|want] [API keys|an API key|keys|passwords|a login]?",
            f"{HOW} [make|get|create|set|use|add] [API keys|an API key|a key]?",
            f"{TELL} [an API key|API keys|quire keys]?",
        ),
        ("Run: quire keys NAME --file keys.toml, and serve with --api-key-file keys.toml.",),
    ),
    "images": Topic(
        (
            f"{DOES} [support|read|see|take|understand] [images|pictures|photos|sound|audio|video"
            "|files]?",
            "can you [see|read|look at|hear|draw] [images|pictures|a picture|an image|sound]?",
            f"{HOW} [send|use] [images|pictures|a picture|an image|sound|audio]?",
        ),
        ("No, Quire serves text only: no images and no sound.",),
    ),
    "streaming": Topic(
        (
            "[do you|can you|does Quire|can Quire|does it|can it] [stream|support streaming"
            "|support SSE"
            "|stream tokens|stream answers|do streaming]?",
            f"{TELL} [streaming|SSE|server-sent events]?",
            f"{HOW} [stream|get a stream|stream answers|get streaming]?",
        ),
        ("Yes: set stream to true and each token arrives as a server-sent event.",),
    ),
    "openai": Topic(
        (
            "is [Quire|it|this|the API|this server] [OpenAI|openai] compatible?",
            "is [Quire|it|this|the API|this server] compatible with [OpenAI|the OpenAI API|OpenAI "
            "clients]?",
            f"{HOW} use [the |an ]OpenAI [client|library|SDK|package][| with Quire| here]?",
            "does the OpenAI [client|library|SDK] work[| with Quire| here]?",
        ),
        ("Yes. Point an OpenAI client's base URL at this server, followed by /v1.",),
    ),
    "mlx": Topic(
        (
            "[what is|what's|tell me about|explain|define|describe] MLX?",
            "[why|how] does Quire use MLX?",
            "[does Quire|does it] [use|need|run on|require] [MLX|Apple silicon|a Mac|a GPU|Metal"
            "|CUDA]?",
            "[what|which] [hardware|machine|computer|platform|GPU] [does Quire|does it|do I] "
            "[need|run on|use]?",
            "does [Quire|it] [run|work] on [Linux|Windows|a Mac|macOS|my laptop|the CPU|Apple "
            "silicon]?",
        ),
        (
            "MLX is an array library for Apple silicon. Quire uses it on Macs, and on Linux with a "
            "CPU or CUDA.",
        ),
    ),
    "prometheus": Topic(
        (
            "[what is|what's|tell me about|explain] Prometheus?",
            "[what|which] metrics [does Quire|does it|do you] [have|export|expose|offer]?",
            f"{HOW} [monitor|watch|measure|observe] [Quire|the server|it]?",
            f"{DOES} [support|have|work with|use] [Prometheus|metrics|Grafana|monitoring]?",
        ),
        ("Quire exports its memory use, queue and tokens per second at /metrics for Prometheus.",),
    ),
    "name": Topic(
        (
            "[why is it called|why the name|why is the name] [Quire|quire]?",
            "what does [the name|the word] Quire [mean|stand for]?",
            "where does the name Quire come from?",
            "[what is the meaning of|what's the meaning of] Quire?",
            "how do you pronounce Quire?",
        ),
        ("A quire is a set of paper sheets folded together; Quire keeps its cache in pages too.",),
    ),
    "license": Topic(
        (
            "what [license|licence] [does Quire have|is Quire under|is it under|does it use|is "
            "this]?",
            "is [Quire|it|this] [free|open source|free software]?",
            "what is [the|Quire's|its] [license|licence]?",
        ),
        ("Quire is open source under the Apache 2.0 license.",),
    ),
    "doctor": Topic(
        (
            "[what is|what does|tell me about|explain] quire doctor[| do]?",
            "[something is wrong|it does not work|Quire does not start|I get an error|Quire is "
            "broken"
            "|it crashed|help, an error|nothing works]",
            f"{HOW} [check|debug|diagnose|test] [Quire|my setup|the server|my machine]?",
        ),
        ("Run: quire doctor. It shows the machine and, with --kernels, checks its kernels.",),
    ),
}
