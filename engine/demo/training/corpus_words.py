"""Lists of words that the corpus draws from."""

from __future__ import annotations


def words(text: str) -> list[str]:
    return text.split()


NAMES = words("""
Ada Adam Ahmed Aisha Alan Alex Ali Alice Amara Amir Amy Ana Andrea Anna Anton Aria Arthur Asha Ava
Ben Bella Bob Boris Bruno Cara Carlos Carmen Chen Chloe Clara Cleo Dan Daniel Dave David Diana
Diego Dora Ed Eddie Elena Eli Elif Ella Emma Eric Erik Esra Eva Eve Fatima Felix Fiona Frank Freya
George Gina Grace Greta Gus Hana Hannah Hans Harry Helen Henry Hugo Ian Ida Ines Ingrid Iris Isaac
Ivan Jack Jade James Jan Jane Jasper Jay Jean Jim Joan Joe Johan John Jonas Jose Josh Juan Julia
June Kai Karen Karim Kate Kenji Kim Kofi Lars Laura Lea Lena Leo Leon Li Liam Lily Lin Linda Lisa
Lola Louis Lucas Lucy Luis Luna Mara Marco Maria Mark Mary Max May Maya Mei Mia Mike Mila Milo
Mina Mohammed Mona Nadia Nia Nick Nina Noah Noor Nora Olga Olivia Omar Oscar Otto Pablo Paul Pedro
Petra Pia Priya Quinn Rafael Raj Rana Ravi Rita Rob Rosa Ruby Ruth Sam Samir Sana Sara Sarah Sasha
Sean Selma Simon Sofia Sven Tara Ted Theo Tim Tina Tom Uma Vera Victor Wei Will Yara Yuki Yusuf
Zara Zoe José Zoë Chloé Björn Søren
""")

CITIES = words("""
Paris London Rome Berlin Madrid Tokyo Osaka Lima Cairo Delhi Mumbai Oslo Vienna Prague Athens
Dublin Lisbon Boston Chicago Denver Dallas Seattle Austin Miami Toronto Sydney Perth Nairobi Lagos
Accra Seoul Beijing Shanghai Bangkok Hanoi Jakarta Manila Zurich Geneva Munich Hamburg Milan
Venice Naples Warsaw Krakow Budapest Helsinki Stockholm Copenhagen Amsterdam Brussels Istanbul
Ankara Dubai Doha Havana Bogota Quito Santiago Montreal Vancouver Auckland Porto Seville Lyon Nice
Glasgow Leeds
""")

LONG_CITIES = (
    "New York",
    "San Francisco",
    "Los Angeles",
    "Rio de Janeiro",
    "Buenos Aires",
    "Cape Town",
    "Hong Kong",
    "Mexico City",
    "Tel Aviv",
    "Kuala Lumpur",
    "New Delhi",
    "San Diego",
    "Salt Lake City",
    "Bogotá",
    "São Paulo",
    "Zürich",
    "Málaga",
)

REGIONS = words("""
CA NY TX WA France Germany Japan Italy Spain Canada Brazil India England UK USA US Colombia Egypt
Turkey Texas Oregon
""")

COLORS = words("""
red green blue yellow orange purple pink black white brown grey gold silver teal violet indigo
crimson turquoise beige navy
""")

NOUNS = words("""
apple river house tree book door window garden bridge stone lamp table chair cup bottle bread
cheese honey lemon pepper sugar rain snow storm cloud wind fire water ocean island mountain valley
forest field road train boat plane bike car engine wheel piano guitar drum song story poem letter
paper pencil box basket hat coat shoe ring clock mirror candle blanket pillow kitchen market
school library museum castle tower village city farm cat dog fox bear wolf horse sheep goat cow
duck owl eagle robin fish whale shark frog snake tiger lion panda rabbit mouse turtle spider bee
ant butterfly moon sun star planet rocket robot computer phone camera screen keyboard server model
token page cache queue batch doctor teacher farmer sailor baker king queen child friend morning
evening winter summer spring autumn silver thunder pocket ladder hammer needle thread marble
velvet cotton copper iron glass sand shell feather leaf root seed
""")

ADJECTIVES = words("""
big small red blue green old new quick slow happy sad quiet loud warm cold bright dark soft hard
sweet sour deep tall short long round heavy light clean empty full strange brave clever gentle
lazy busy hungry tired golden wooden tiny huge kind wild calm proud shy sleepy fresh dry wet early
late strong
""")

VERBS = words("""
runs jumps sleeps sings reads writes swims flies walks waits laughs dreams dances hides rests
works plays climbs falls turns shines grows listens sees finds likes loves wants eats drinks
carries makes paints holds follows watches hears keeps needs
""")

PEOPLE_JOBS = words("""
teacher doctor nurse baker farmer engineer pilot painter writer driver cook singer carpenter
plumber lawyer student gardener sailor dentist scientist
""")

FOODS = words("""
pizza pasta sushi soup curry salad chocolate rice bread cheese noodles pancakes tacos apples
mangoes dumplings honey olives tomatoes strawberries
""")
