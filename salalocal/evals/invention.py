"""Names, values and words made up from a seed: what is planted cannot have been learned; for needle, ruler and mrcr.

Equal seeds give equal inventions on every machine: `seeded` takes a text, whose digest seeds the generator.
"""

import random
from collections.abc import Callable, Collection

ADJECTIVES = (
    *("amber", "ancient", "bitter", "brave", "bright", "calm", "careful", "clever", "cold", "crooked", "curious"),
    *("distant", "dusty", "eager", "early", "fading", "famous", "gentle", "golden", "hidden", "hollow", "honest"),
    *("humble", "icy", "jolly", "late", "lonely", "loud", "lucky", "mellow", "modern", "narrow", "noble", "odd"),
    *("patient", "plain", "proud", "quick", "quiet", "rapid", "rare", "rough", "rusty", "salty", "scarlet", "sharp"),
    *("shy", "silent", "silver", "simple", "slender", "smooth", "solid", "steady", "strange", "sunny", "swift"),
    *("tender", "thirsty", "tidy", "tiny", "vivid", "wandering", "warm", "weary", "wild", "windy", "wise", "young"),
)
NOUNS = (
    *("anchor", "apple", "arrow", "badger", "barrel", "basket", "beacon", "bridge", "candle", "canyon", "castle"),
    *("cedar", "circle", "cloud", "comet", "copper", "cradle", "crystal", "curtain", "desert", "dragon", "engine"),
    *("falcon", "feather", "fiddle", "forest", "fountain", "garden", "glacier", "hammer", "harbor", "hazel", "helmet"),
    *("island", "jacket", "kettle", "ladder", "lantern", "lemon", "lizard", "magnet", "marble", "meadow", "mirror"),
    *("monkey", "mountain", "needle", "orchard", "otter", "paddle", "parrot", "pebble", "pepper", "pillow", "planet"),
    *("pocket", "rabbit", "ribbon", "river", "rocket", "saddle", "shadow", "shovel", "spider", "spoon", "stable"),
    *("summit", "tunnel", "turtle", "valley", "velvet", "violin", "walnut", "whistle", "window", "winter", "wolf"),
)
VERBS = (
    *("carries", "crosses", "finds", "follows", "forgets", "gathers", "greets", "hears", "holds", "keeps", "leaves"),
    *("loses", "meets", "misses", "needs", "opens", "paints", "passes", "remembers", "sees", "sells", "trusts"),
    *("visits", "wants", "warms", "watches"),
)
_ONSETS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def seeded(*parts: object) -> random.Random:
    """A generator whose draws depend on the parts alone, through their text."""
    return random.Random("/".join(map(str, parts)))


def number(rng: random.Random) -> str:
    """A number of seven digits, as RULER's needles have."""
    return str(rng.randint(10**6, 10**7 - 1))


def constant_name(rng: random.Random) -> str:
    """A name as constants have: `QUIET_HARBOR_LANTERN`."""
    return "_".join((rng.choice(ADJECTIVES), *rng.sample(NOUNS, 2))).upper()


def spoken_name(rng: random.Random) -> str:
    """A name in words: `quiet-harbor lantern`."""
    first, second = rng.sample(NOUNS, 2)
    return f"{rng.choice(ADJECTIVES)}-{first} {second}"


def coded_word(rng: random.Random, num_syllables: int = 3) -> str:
    """A word that means nothing: `fonubi`."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(num_syllables))


def distinct(draw: Callable[[], str], count: int, taken: Callable[[str], bool] = lambda text: False) -> list[str]:
    """Draw until there are `count` different texts, none of which is taken."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = draw()
        if not taken(text):
            found[text] = None
    return list(found)


def sentence(rng: random.Random, nouns: Collection[str] = NOUNS) -> str:
    """A plain sentence: `The quiet otter greets an old lantern.`"""
    subject, thing = rng.sample(sorted(nouns), 2)
    first, second = rng.sample(ADJECTIVES, 2)
    return f"The {first} {subject} {rng.choice(VERBS)} the {second} {thing}."
