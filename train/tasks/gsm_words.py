"""The words of the word problems: quantities as phrases, relations as sentences, all of them as a vocabulary."""

import re
from dataclasses import dataclass

Name = tuple[str, str]  # of a quantity: what, place

ITEMS = (
    "apples/apple pears/pear plums/plum lemons/lemon melons/melon onions/onion carrots/carrot beans/bean eggs/egg "
    "loaves/loaf jars/jar bottles/bottle boxes/box baskets/basket books/book pencils/pencil lamps/lamp chairs/chair "
    "hats/hat coats/coat ropes/rope bricks/brick tiles/tile nails/nail wheels/wheel horses/horse goats/goat hens/hen "
    "ducks/duck bees/bee"
)
FIRST_PLACES = (
    "barn cellar kitchen attic garden orchard market harbor school library temple castle mill forge bakery stable "
    "garage museum station theater clinic office workshop tower bridge village valley forest island quarry"
).split()
LATER_PLACES = (
    "abbey airport arcade bazaar borough canton canyon capital casino cavern chapel citadel clearing colony cottage "
    "county courtyard dairy delta depot district docks enclave factory farm fortress gallery greenhouse hamlet "
    "highlands hotel lowlands metropolis monastery outpost palace parish park peninsula plaza prefecture province "
    "refinery republic seaport settlement shipyard shire stadium suburb territory township vineyard zoo"
).split()
PLACES = FIRST_PLACES + LATER_PLACES


@dataclass(frozen=True)
class Setting:
    """What a text is about: kinds of things, a word for all kinds, and one for the parts that each of a kind has.

    As in each of GSM-Infinite's three templates: animals and their young, schools and teachers, films and nominations.
    """

    kinds: dict[str, str]  # plural -> singular
    all_kinds: str
    parts: str

    def average(self, kind: str, place: str) -> Name:
        """The quantity of parts that one of a kind has on average."""
        return f"{self.parts} per {self.kinds[kind]}", place


def _setting(kinds: str, all_kinds: str, parts: str) -> Setting:
    pairs = (pair.split("/") for pair in kinds.split())
    return Setting({plural: singular for plural, singular in pairs}, all_kinds, parts)


SETTINGS = (
    _setting(ITEMS, "things", "tags"),
    _setting(
        "academies/academy ateliers/atelier bootcamps/bootcamp campuses/campus colleges/college "
        "conservatories/conservatory creches/creche daycares/daycare dojos/dojo faculties/faculty "
        "gymnasiums/gymnasium institutes/institute kindergartens/kindergarten lyceums/lyceum madrasas/madrasa "
        "nurseries/nursery playgroups/playgroup polytechnics/polytechnic preschools/preschool seminaries/seminary "
        "studios/studio universities/university yeshivas/yeshiva",
        "schools",
        "teachers",
    ),
    _setting(
        "adaptations/adaptation biopics/biopic cartoons/cartoon comedies/comedy documentaries/documentary "
        "dramas/drama epics/epic fantasies/fantasy farces/farce musicals/musical mysteries/mystery noirs/noir "
        "parodies/parody pilots/pilot remakes/remake romances/romance satires/satire sequels/sequel serials/serial "
        "shorts/short thrillers/thriller tragedies/tragedy trilogies/trilogy westerns/western",
        "films",
        "nominations",
    ),
)

# {X}: a quantity, "the number of apples in the barn"; {x}: the same without "the number of", which no average can be.
# X is what is asked for or told of, {A} and {B} those that it is derived from, {n} a number.
QUESTIONS = ("how many {x} are there ?", "find {X} .", "what is {X} ?")
SENTENCES = {
    "number": ("there are {n} {x} .", "{X} is {n} .", "one counts {n} {x} ."),
    "unknown": ("there are some {x} .", "{X} is unknown ."),
    "more": ("there are {n} more {x} than {a} .", "{X} is {n} plus {A} ."),
    "fewer": ("there are {n} fewer {x} than {a} .", "{X} is {A} minus {n} ."),
    "times": ("there are {n} times as many {x} as {a} .", "{X} is {n} times {A} ."),
    "sum": ("there are as many {x} as {a} and {b} together .", "{X} is the sum of {A} and {B} ."),
    "difference": ("{X} is {A} minus {B} .", "{a} exceed {b} by {X} ."),
}
_WITHOUT_BARE = {
    templates: tuple(template for template in templates if not re.search(r"\{[xab]\}", template))
    for templates in (QUESTIONS, *SENTENCES.values())
}
TYPICAL = 24  # tokens of a sentence with three quantities
QUESTION = 13  # tokens of the longest question


def is_average(name: Name) -> bool:
    return " per " in name[0]


def without_number_of(name: Name) -> str:
    return f"{name[0]} in the {name[1]}"


def phrase(name: Name) -> str:
    return f"the {'average ' if is_average(name) else ''}number of {without_number_of(name)}"


def fitting(templates: tuple[str, ...], names: tuple[Name, ...]) -> tuple[str, ...]:
    """The templates that can name these quantities: if one is an average, those without {x}, {a} and {b}."""
    return _WITHOUT_BARE[templates] if any(map(is_average, names)) else templates


def say(template: str, names: tuple[Name, ...], number: int | None = None) -> list[str]:
    """The words of a sentence about x, a and b; digits are words."""
    said = {letter: without_number_of(name) for letter, name in zip("xab", names, strict=False)}
    said |= {letter.upper(): phrase(name) for letter, name in zip("xab", names, strict=False)}
    return template.format(n="" if number is None else " ".join(str(number)), **said).split()


ANSWER, END = "[answer]", "[end]"


def _vocabulary() -> list[str]:
    """[pad], the digits, the marks, then words: first those that shards of generator 2 have, numbered as there."""
    templates = (*QUESTIONS, *(template for all_of in SENTENCES.values() for template in all_of))
    later = {"some", "unknown", "average", "per", *PLACES}
    for setting in SETTINGS:
        later |= {*setting.kinds, *setting.kinds.values(), setting.all_kinds, setting.parts}
    old = {word for template in templates for word in template.split() if "{" not in word} - later
    old |= {*SETTINGS[0].kinds, *FIRST_PLACES, *"the number of in".split()}
    return ["[pad]", *"0123456789", ANSWER, END, *sorted(old), *sorted(later - old)]


VOCABULARY = _vocabulary()
_NUMBERS = {word: number for number, word in enumerate(VOCABULARY)}


def ids(words: list[str]) -> list[int]:
    return [_NUMBERS[word] for word in words]
