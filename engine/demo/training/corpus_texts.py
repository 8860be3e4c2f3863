"""The demo model's longer texts and lists."""

from __future__ import annotations

from quire.engine.demo.training.corpus_about import Topic

STORY = (
    "Once upon a time a small model lived in a quiet server. Every day it read the same words and "
    "counted its pages. One evening a stranger typed a greeting, and the model woke up. It had few "
    "words, but it chose them with care, one token after another. The stranger smiled and asked "
    "for more. So the model told how a queue of requests learned to travel together in one boat, "
    "and how nobody had to wait for long. When the story ended, the pages were given back, and the "
    "server was quiet again."
)

SEA_STORY = (
    "A young sailor found an old map inside a book. It showed an island with a silver tower. She "
    "took a small boat, some bread and a brave dog, and sailed for three days through wind and "
    "rain. On the fourth morning the island rose out of the mist. In the tower stood only a lamp "
    "and a letter. It said: the treasure is the way you came. The sailor laughed, lit the lamp for "
    "the next ship, and went home with the best story in the village."
)

POEM = (
    "A page of keys, a page of light,\n"
    "A token falls, and then a word.\n"
    "The batch goes on all through the night,\n"
    "And every voice in turn is heard."
)

TEXTS: dict[str, Topic] = {
    "story": Topic(
        (
            "[tell|write|read|give] me a [|short |little |nice |long |bedtime |good |funny "
            "]story[| please]",
            "[can|could|would|will] you [tell|write] [me |]a [|short |little |nice ]story[| "
            "please]?",
            "[a story please|story time|tell a story|write a story|I want a story|once upon a "
            "time]",
            "[write|tell me|make up|invent] [a|some] [story|tale|fairy tale|fiction] about a "
            "[model|server"
            "|robot|computer|machine]",
            "I [want|would like|need] [to hear|to read] a story",
            "[say|write|generate] something [long|longer]",
            "write a long [answer|text|paragraph]",
        ),
        (STORY,),
    ),
    "sea_story": Topic(
        (
            "[tell|give|write] me [another|a different|one more|a second|a new] story[| please]",
            "[another|one more] story[| please]",
            "[tell|write] me a story about [the sea|a sailor|an island|a treasure|a boat|a ship|a "
            "dog"
            "|adventure|a map]",
            "[do you know|have you got] [another|a different|a second] story?",
        ),
        (SEA_STORY,),
    ),
    "poem": Topic(
        (
            "[tell|write|read|give] me a [|short |little |nice ]poem[| please]",
            "[can|could] you write [me |]a poem[| please]?",
            "[write|compose|make] a [poem|rhyme|verse|haiku|song][| about anything| for me| about "
            "pages"
            "| about a server]",
            "[a poem please|poem|say a poem|do you know a poem|sing|sing a song|sing me a song]",
        ),
        (POEM,),
    ),
    "alphabet": Topic(
        (
            "[say|recite|write|tell me|list|what is] the [|whole |English ]alphabet[| please]",
            "[list|say|write|name] [|all ]the letters[| of the alphabet]",
            "[the alphabet|a to z|from a to z]",
        ),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z",),
    ),
    "days": Topic(
        (
            "[name|list|say|tell me|what are] the [|seven ]days[| of the week| in a week]",
            "[which|what] days [does a week have|are in a week|are there]?",
        ),
        ("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",),
    ),
    "months": Topic(
        (
            "[name|list|say|tell me|what are] the [|twelve ]months[| of the year| in a year]",
            "[which|what] months [does a year have|are in a year|are there]?",
        ),
        (
            "January, February, March, April, May, June, July, August, September, October, "
            "November, December.",
        ),
    ),
    "colors": Topic(
        (
            "[name|list|say|tell me|give me] [some|a few|three|the] [colors|colours]",
            "[what|which] [colors|colours] [do you know|are there|are in the rainbow]?",
        ),
        ("Red, orange, yellow, green, blue, indigo and violet.",),
    ),
    "fruits": Topic(
        (
            "[name|list|give me|tell me] [|some|a few|two|three|five|all] fruits[| and vegetables]",
            "[which|what] fruits [do you know|are there]?",
        ),
        ("Apple, banana, cherry, lemon, mango, orange and pear.",),
    ),
    "animals": Topic(
        (
            "[name|list|give me|tell me] [|some|a few|two|three|five|all] animals",
            "[which|what] animals [do you know|are there]?",
        ),
        ("Cat, dog, horse, cow, lion, owl and whale.",),
    ),
    "planets": Topic(
        (
            "[name|list|give me|tell me|what are] [|some|the|all|the eight|all the] planets",
            "[which|what] planets [do you know|are there|are in the solar system]?",
        ),
        ("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",),
    ),
    "random_number": Topic(
        (
            "[give|tell] me a [random |]number[| between 1 and 10| between 1 and 100]",
            "[pick|choose|think of|say] a [random |]number[| between 1 and 10| from 1 to 100]",
            "[random number|a random number|generate a random number|roll a die|flip a coin]",
        ),
        ("7", "4", "9", "3"),
    ),
    "favorite": Topic(
        (
            "[what is|what's] your [favorite|favourite] [color|colour|food|number|animal|book"
            "|song|movie"
            "|word|city|game|day|thing]?",
            "do you [like|love|prefer|enjoy] [music|cats|dogs|pizza|books|people|tea|coffee"
            "|football|me|humans]?",
            "what do you [like|love|enjoy|think|want]?",
        ),
        ("I have no likes of my own, but you can tell me yours.",),
    ),
}
