"""The kinds of tools that the demo model learns to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quire.engine.demo.training.corpus_draw import Draw

Value = str | int


@dataclass(frozen=True)
class Shape:
    """A kind of tool: how it may be named and described, what it takes and how users ask."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]  # per argument, the names it may have
    values: tuple[Callable[[Draw], Value], ...]
    questions: tuple[str, ...]  # {0}, {1} are the arguments; "{}" alone may hold several
    result: Callable[[Draw], object]
    several: bool = False  # the only argument may be two values, which makes two calls


def _weather(draw: Draw) -> object:
    sky = draw.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snowing", "stormy"))
    degrees = draw.number(-9, 39)
    return draw.choice(
        (
            f"{sky}, {degrees} degrees",
            f"{degrees} degrees and {sky}",
            sky,
            {"temperature": degrees, "conditions": sky},
            {"temp_c": degrees, "sky": sky, "wind": draw.number(0, 60)},
            {"forecast": sky},
        )
    )


def _clock(draw: Draw) -> object:
    now = f"{draw.number(0, 23):02d}:{draw.number(0, 59):02d}"
    return draw.choice((now, {"time": now}, f"It is {now}"))


def _small(draw: Draw) -> int:
    return draw.number(0, 999 if draw.chance(0.2) else 99)


def _text(draw: Draw) -> str:
    return draw.phrase(5)


def _subject(draw: Draw) -> str:
    return draw.phrase(3)


def _symbol(draw: Draw) -> str:
    if draw.chance(0.2):
        return draw.name()
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return draw.unseen(lambda: "".join(draw.choice(letters) for _ in range(draw.number(2, 5))))


def _expression(draw: Draw) -> str:
    def make() -> str:
        space = draw.choice(("", " "))
        text = str(_small(draw))
        for _ in range(draw.choice((1, 1, 2, 3))):
            text += f"{space}{draw.choice('+-*/')}{space}{_small(draw)}"
        return text

    return draw.unseen(make)


def _currency(draw: Draw) -> str:
    names = ("USD", "EUR", "GBP", "JPY", "CHF", "TRY", "INR", "dollars", "euros", "pounds", "yen")
    return draw.choice(names)


_LANGUAGES = ("French", "German", "Spanish", "Italian", "Chinese", "Japanese", "Korean", "Turkish")
_PLACE = ("city", "location", "place", "town", "where")

SHAPES: tuple[Shape, ...] = (
    Shape(
        (
            "get_weather",
            "weather",
            "current_weather",
            "get_current_weather",
            "lookup_weather",
            "fetch_weather",
            "weather_in",
        ),
        (
            "Current weather for a city",
            "Get the weather in a city.",
            "Look up the weather",
            "Get the current weather in a given location",
            "Weather of a place",
            "",
        ),
        (_PLACE,),
        (Draw.place,),
        (
            "[what is|what's|how is|how's|tell me|check|get|get me] the weather [in|for|at] {0}[| "
            "now| today| like][|?]",
            "[give me|show me|I want|I need|I would like|what is] the [weather|forecast"
            "|temperature|weather forecast] [in|for|of] {0}[| now| today| tomorrow]",
            "[can|could|would] you [check|tell me|get|look up] the [weather|temperature|forecast] "
            "[in|for] {0}?",
            "{0} weather[| today| please| forecast]",
            "weather {0}",
            "what will the weather be[| like] in {0}[| tomorrow| today| this week]?",
            "I am [going|travelling|flying|moving] to {0}[| tomorrow| today], [what is|what's|how "
            "is|what will be] the weather[| like]?",
            "use [the|a|your] [tool|function|weather tool] to [get|check|find] the weather in {0}",
            "what [is|will be] the temperature in {0}[| now| today| tomorrow]?",
            "[will it|is it going to] [rain|snow|be sunny|be cold] in {0}[| today| tomorrow]?",
            "[what is|what's] the weather like in {0}[| now| today]?",
            "weather [in|for] {0}",
            "is it [raining|sunny|cold|warm|hot] in {0}[| now| today]?",
            "[do I need|should I take] an umbrella in {0}?",
            "how [warm|cold|hot] is it in {0}[| now| today]?",
        ),
        _weather,
        several=True,
    ),
    Shape(
        ("get_time", "current_time", "time_in", "clock", "get_current_time", "local_time"),
        (
            "Current time in a city",
            "Get the local time.",
            "The time at a place",
            "Get the time",
            "",
        ),
        (_PLACE,),
        (Draw.place,),
        (
            "{0} time[| now| please]",
            "what time is it in {0}[| now]?",
            "[what is|what's|tell me|get|check] the [|current |local ]time in {0}[| now][|?]",
            "time in {0}",
            "[do you know|can you tell me] [what time it is|the time] in {0}?",
        ),
        _clock,
        several=True,
    ),
    Shape(
        ("add", "sum", "add_numbers", "plus", "calculate_sum", "adder"),
        ("Add two numbers", "Sum of two integers.", "Adds a and b", "Returns the sum", ""),
        (("a", "x", "first", "left", "n1"), ("b", "y", "second", "right", "n2")),
        (_small, _small),
        (
            "[what is|what's|calculate|compute|how much is] {0} [+|plus] {1}?",
            "add {0} [and|to|plus] {1}",
            "[please |]use [the|a|your] [tool|function|calculator] to add {0} and {1}",
            "[can|could] you add {0} [and|to] {1}?",
            "[what is|find|give me] the sum of {0} and {1}",
            "{0} + {1}",
        ),
        lambda draw: draw.number(0, 999),
    ),
    Shape(
        ("multiply", "times", "product", "multiply_numbers"),
        ("Multiply two numbers", "Product of two integers.", "Returns the product", ""),
        (("a", "x", "first", "left", "n1"), ("b", "y", "second", "right", "n2")),
        (_small, _small),
        (
            "[what is|what's|calculate|compute|how much is] {0} [*|times|multiplied by] {1}?",
            "multiply {0} [and|by|with] {1}",
            "{0} * {1}",
        ),
        lambda draw: {"result": draw.number(0, 9999)},
    ),
    Shape(
        ("search", "web_search", "search_web", "find", "lookup", "google"),
        ("Search the web", "Look something up online.", "Find pages about a topic", ""),
        (("query", "q", "text", "topic", "term"),),
        (_subject,),
        (
            "[search|look] [the web |online |]for {0}",
            "[look up|google|find|search for] {0}[| for me| please| online]",
            "[can you|please|could you] [search for|look up|find] {0}[|?]",
        ),
        lambda draw: draw.choice(
            ({"results": draw.number(0, 900)}, f"{draw.number(1, 99)} pages found", draw.sentence())
        ),
    ),
    Shape(
        ("send_message", "send_email", "message", "send_text", "email", "notify"),
        ("Send a message to someone", "Send an email.", "Send text to a person", ""),
        (("to", "recipient", "name", "person"), ("text", "message", "body", "content")),
        (Draw.name, _text),
        (
            '[send|write] [|a message to |an email to ]{0}[:| saying| with the text] "{1}"',
            "[tell|message|email|text] {0}: {1}",
            "send {0} the message {1}",
        ),
        lambda draw: draw.choice(("sent", {"status": "sent"}, "ok", {"id": draw.number(1, 9999)})),
    ),
    Shape(
        ("save_note", "create_note", "note", "add_note", "remember", "write_note"),
        ("Save a note", "Store a note for later.", "Write down some text", ""),
        (("text", "note", "content", "body"),),
        (_text,),
        (
            '[save|make|create|add|write] a note[:| saying| that says] "{0}"',
            "[note down|take a note|save a note|write down|add a note|make a note]: {0}",
        ),
        lambda draw: draw.choice(("saved", {"saved": "yes"}, {"id": draw.number(1, 9999)}, "done")),
    ),
    Shape(
        ("set_timer", "timer", "start_timer", "countdown"),
        ("Start a timer", "Set a timer for some minutes.", "Counts down minutes", ""),
        (("minutes", "duration", "time", "length"),),
        (lambda draw: draw.unseen(lambda: draw.number(1, 180)),),
        (
            "[set|start|make] a timer [for|of] {0} minutes",
            "[set|start] a {0} minute timer",
            "[remind|call] me in {0} minutes",
            "timer {0} minutes",
        ),
        lambda draw: draw.choice(("started", "timer set", {"status": "running"})),
    ),
    Shape(
        ("turn_on_light", "light_on", "lights", "set_light", "switch_on_light"),
        ("Turn on the light in a room", "Switch a light on.", "Controls the lights", ""),
        (("room", "place", "location", "where"),),
        (lambda draw: draw.value(("kitchen", "bedroom", "bathroom", "hall", "office", "garage")),),
        (
            "[turn|switch] [on|] the light[s|] [on |]in the {0}[| please]",
            "[turn|switch] the {0} light[s|] on",
            "lights on in the {0}",
        ),
        lambda draw: draw.choice(("on", "done", {"state": "on"}, "ok")),
    ),
    Shape(
        ("get_stock_price", "stock_price", "get_stock", "get_quote", "stock_quote"),
        ("Get the current stock price", "Price of a stock by its symbol.", "Stock quotes", ""),
        (("symbol", "ticker", "stock", "company", "name"),),
        (_symbol,),
        (
            "[what is|what's|get|check|tell me|find] the [|current ]stock price [of|for] {0}[|?]",
            "[what is|what's] the [|current ]price of {0} [stock|shares][| now| today]?",
            "how much is [|one share of ]{0} [trading at|worth|now|today]?",
            "{0} stock price[| now| please]",
            "[get|show me|check] the {0} [stock|share] price",
            "[what is|what's] {0} [trading at|at now|worth]?",
        ),
        lambda draw: draw.choice(
            (f"{_small(draw)}.{draw.number(10, 99)}", {"price": _small(draw)}, _small(draw))
        ),
        several=True,
    ),
    Shape(
        ("calculator", "calculate", "evaluate", "compute", "calc"),
        ("Evaluate an arithmetic expression", "Calculator.", "Computes an expression", ""),
        (("expression", "expr", "formula", "input"),),
        (_expression,),
        (
            "[what is|what's|calculate|compute|evaluate|how much is] {0}[|?]",
            "{0}",
            "[use|call] the calculator [for|to compute|to calculate|on] {0}",
            "[can|could] you [calculate|compute] {0}?",
        ),
        lambda draw: draw.choice((draw.number(0, 9999), {"result": draw.number(0, 9999)})),
    ),
    Shape(
        ("get_news", "news", "latest_news", "fetch_news", "headlines"),
        ("Latest news on a topic", "Get news headlines.", "News about something", ""),
        (("topic", "query", "subject", "about"),),
        (_subject,),
        (
            "[what is|what's|get|show me|find|tell me|any|read] [|me ]the [|latest ]news [about"
            "|on] {0}[|?]",
            "[any|some|latest|give me] news [about|on] {0}[|?]",
            "news [about|on] {0}",
        ),
        lambda draw: draw.choice((draw.sentence(), {"headline": draw.sentence()})),
    ),
    Shape(
        ("convert_currency", "convert", "exchange", "currency", "exchange_rate"),
        ("Convert an amount of money", "Currency conversion.", "Converts between currencies", ""),
        (
            ("amount", "value", "sum"),
            ("from", "from_currency", "source"),
            ("to", "to_currency", "target"),
        ),
        (_small, _currency, _currency),
        (
            "[convert|change|exchange] {0} {1} [to|into|in] {2}",
            "[what is|how much is|what's] {0} {1} in {2}?",
            "{0} {1} [to|in] {2}",
        ),
        lambda draw: draw.choice((_small(draw), {"amount": _small(draw)})),
    ),
    Shape(
        ("translate", "translate_text", "translator", "get_translation"),
        ("Translate text", "Translates text into another language.", ""),
        (("text", "input", "phrase"), ("language", "target", "to", "target_language")),
        (_text, lambda draw: draw.value(_LANGUAGES)),
        (
            '[translate|please translate|can you translate] "{0}" [to|into] {1}',
            "translate {0} [to|into] {1}",
            '[what is|how do you say] "{0}" in {1}?',
        ),
        lambda draw: draw.choice((draw.word(), {"translation": draw.phrase(2)})),
    ),
    Shape(
        ("play_music", "play", "play_song", "music", "start_music"),
        ("Play a song", "Play music by name.", "Start playing a song", ""),
        (("song", "title", "name", "track"),),
        (_subject,),
        ('play [|the song |me ]"{0}"[| please]', "[play|put on|start] [|the song ]{0}"),
        lambda draw: draw.choice(("playing", {"playing": "yes"}, "now playing")),
    ),
)
