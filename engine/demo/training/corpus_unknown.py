"""Questions beyond the demo model, and what it says to them."""

from __future__ import annotations

from quire.engine.demo.training.corpus_draw import Draw
from quire.engine.demo.training.corpus_exchange import Exchange, say
from quire.engine.demo.training.corpus_words import ADJECTIVES, CITIES, NAMES, NOUNS, VERBS

UNKNOWN = (
    "That is beyond me: I am a small demo and know only a few things. Try: What is Quire? or: "
    "What is 47 + 38?"
)

# {n} a noun, {a} an adjective, {v} a verb, {w} any word, {c} a city, {p} a person, {s} a sentence
UNKNOWN_QUESTIONS = (
    "what is [the|a|an|] {n}?",
    "what is the [capital|population|currency|language|president|history|size|area|flag] of {c}?",
    "who [is|was|are] [the |]{p}[| {w}]?",
    "who [wrote|invented|discovered|painted|won|made|built|founded|directed] [the |]{w}[| {n}]?",
    "when [did|was|is|will] the {a} {n} [happen|born|end|start|built|open]?",
    "where [is|are|was|can I find|do I buy] [the |a |]{n}[| in {c}]?",
    "why [is|are|do|does] [the|a|my] {n} [{a}|so {a}|always {a}|{v}]?",
    "how [do I|can I|to|would you|should I] [make|build|fix|cook|paint|clean|grow|sell|buy|find"
    "|wash|repair|draw]"
    " [a|the|my] [|{a} ]{n}?",
    "how [far|long|big|old|tall|heavy|deep|fast|much|many|expensive|high] is [the|a] {n}[| in "
    "{c}]?",
    "[tell me|teach me|explain] [|something |more ]about [the |a |]{n}[| and the {w}]",
    "[tell me about|explain|describe|discuss] {w} {n}",
    "[write|compose|draft] [an essay|an email|a letter|a report|a review|a speech|a blog post|a "
    "tweet]"
    " [about|on|for|to] [the |a |my |]{n}",
    "[summarize|summarise|translate|analyze|review|correct|improve|rewrite|paraphrase|proofread]"
    " [this|the following][| text| sentence| article]: {s}",
    "[what do you think|what is your opinion|any thoughts|give me advice] [of|about|on] [the "
    "|]{n}?",
    "[should I|shall I|can I|would you] [buy|sell|eat|visit|read|watch|learn|use] [a|the|my|this] "
    "{n}?",
    "[is|are|was] [the|a|my] {n} [|more |very ]{a}[| than a {n2}]?",
    "[recommend|suggest|give me|find me|show me] [a|some|the best] {n}[| in {c}| for my {n2}]",
    "[can you|could you|please|would you] [help me with|draw|find|buy|send|open|order|call|book"
    "|play|fix]"
    " [a|the|my] {n}[| please]?",
    "[what happens|what would happen] if [a|the] {n} {v}?",
    "[what does|what is the meaning of|define] {w}[| mean]?",
    "[which|what] {n} is [the best|better|the most {a}|{a}]?",
    "[what is|calculate|find|compute] the [square root|cube|logarithm|factorial|derivative"
    "|integral] of {i}",
    "[what is|what's|calculate|compute] {i} [divided by|to the power of|modulo|/|%|^] {j}?",
    "{s}",
    "{w} {w2} {n}",
    "{x}",
    "spell [the word |]{w}",
    "is {i} [a prime|a prime number|even|odd|prime|divisible by {j}]?",
    "[compare|what is the difference between] [Quire|{w}] [and|with] [vLLM|Ollama|llama.cpp|{n}]",
    "[let's|can we|shall we] [play|talk about|discuss|make|build] [a game|{n}|the {n}]",
    "[the|our|this|that] {n} is [{a}|not {a}|broken|gone|very {a}]",
    "I [am|feel|was] [so |very |really |a bit |]{a}[| today| about my {n}]",
    "I [bought|saw|lost|found|made|broke|ate|sold] a {a} {n} [today|yesterday|last week|in {c}]",
    "[do you know|have you seen|have you heard of|have you been to|do you like] [the |]{n}[| in "
    "{c}]?",
    "[who is|what is] the [president|king|queen|mayor|capital|leader|owner] of {c}?",
    "how do you say {n} in [French|German|Spanish|Chinese|Japanese]?",
    "what is the [best|worst|fastest|cheapest|biggest|smallest] {n}[| in {c}| in the world]?",
    "[what is|what's] the meaning of [life|love|{n}|happiness|time]?",
    "[give me|what is|find|tell me] [a recipe|the recipe|instructions|the price|news|a fact] [for"
    "|of|about] {n}",
    "what [should|can|will] [I|we] [cook|eat|do|wear|read|watch|play] [today|tonight|tomorrow]?",
)

_TAKEN = {"page", "cache", "queue", "batch", "token", "model", "server", "story", "poem", "song"}
_SUBJECTS = [noun for noun in NOUNS if noun not in _TAKEN]


def unknown(draw: Draw) -> Exchange:
    def noun() -> str:
        return draw.choice(_SUBJECTS) if draw.chance(0.7) else draw.invented()

    def question() -> str:
        slots = {
            "n": noun(),
            "n2": noun(),
            "w": noun(),
            "x": draw.invented() if draw.chance(0.8) else draw.choice(_SUBJECTS),
            "w2": draw.choice(ADJECTIVES),
            "a": draw.choice(ADJECTIVES),
            "v": draw.choice(VERBS),
            "c": draw.choice(CITIES),
            "p": draw.choice(NAMES),
            "s": draw.sentence(),
            "i": draw.number(1, 9999),
            "j": draw.number(2, 99),
        }
        return draw.ask(draw.choice(UNKNOWN_QUESTIONS), slots)

    if draw.chance(0.05):
        lines = [draw.sentence() for _ in range(draw.number(3, 40))]
        return say("unknown", ". ".join([question(), *lines]), UNKNOWN)
    return say("unknown", draw.unseen(question), UNKNOWN)
