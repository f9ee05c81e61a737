# ruff: noqa: E501
"""First words of many kinds of text, for a language model to continue.

Every opening is made from a template and a seed, so that a few hundred differ in subject as well
as in form. Knows no model and no tokenizer. Names of people and places are common ones, drawn at
random; none means a particular person.
"""

from __future__ import annotations

import random
import string

_WORDS = {
    "first": (
        "James Mary Robert Elizabeth Thomas Anna William Sarah Henrik Maria Carlos Aisha Kenji "
        "Olga Samuel Ruth Peter Helen Ahmed Lucia David Margaret Paul Ingrid George Clara Daniel "
        "Rosa Edward Emma Victor Alice Frank Julia Walter Grace Nikolai Sofia Arthur Beatrice "
        "Louis Martha Stephen Leila Hugh Miriam Oscar Nora Philip Irene Raymond Edith"
    ),
    "last": (
        "Carter Hughes Morgan Whitfield Okafor Tanaka Petrov Lindqvist Alvarez Fischer Murphy "
        "Bennett Sullivan Moreau Rossi Novak Ahmadi Patel Kowalski Jensen Harper Mitchell Doyle "
        "Becker Silva Grant Fleming Barrett Osborne Walsh Keller Nakamura Stone Wright Palmer "
        "Hayes Dixon Marsh Fletcher Boyd Reyes Lambert Cole Warren Chandler Pierce Hobbs Ellison"
    ),
    "town": (
        "Ashford|Millbrook|Fairhaven|Lyon|Kraków|Porto|Leeds|Dresden|Cork|Savannah|Nagasaki|"
        "Halifax|Antwerp|Bristol|Dayton|Perth|Salamanca|Bergen|Calcutta|Quebec City|St. Louis|"
        "Naples|Aleppo|Cape Town|Manila|Richmond|Sheffield|Buffalo|Turin|Odessa|Glasgow|Tucson"
    ),
    "country": (
        "England|France|Japan|Brazil|India|the United States|Poland|Norway|Mexico|Australia|"
        "Canada|Egypt|Italy|Russia|Germany|Ireland|Scotland|Turkey|New Zealand|South Africa|"
        "China|Spain|Sweden|Peru|Korea|the Netherlands|Kenya|Greece|Vietnam|Cuba|Austria"
    ),
    "nation": (
        "English|French|Japanese|American|Brazilian|Indian|Polish|Norwegian|Mexican|Australian|"
        "Canadian|Italian|Russian|German|Irish|Scottish|Turkish|Chinese|Spanish|Swedish|Dutch"
    ),
    "job": (
        "actor|novelist|footballer|cricketer|physicist|painter|composer|politician|general|"
        "botanist|singer and songwriter|film director|architect|naval officer|journalist|"
        "baseball pitcher|bishop|mathematician|basketball player|poet|explorer|lawyer|"
        "professional wrestler|racing driver|television presenter|economist|sculptor|boxer"
    ),
    "animal": (
        "beetle|frog|owl|shark|bat|snake|spider|parrot|whale|lizard|salmon|moth|crab|antelope|"
        "gull|tortoise|dinosaur|octopus|warbler|fox"
    ),
    "plant": (
        "orchid|oak|fern|mushroom|grass|shrub|pine|eucalyptus|cactus|lily|moss|banksia|rose"
    ),
    "land": "River|Mountains|Island|Valley|Lake|Bay|County|Forest|Peninsula|Castle|Cathedral|Bridge",
    "war": "Civil War|Seven Years' War|First World War|Second World War|Crimean War|Napoleonic Wars",
    "genre": (
        "rock|folk|jazz|hip hop|pop|country|heavy metal|electronic|soul|indie rock|orchestral"
    ),
    "play": (
        "role-playing|platform|puzzle|racing|first-person shooter|real-time strategy|adventure|"
        "fighting|simulation"
    ),
    "thing": (
        "The Silent Harbor|Winter Light|A House of Glass|Broken Arrow|The Last Garden|Midnight "
        "Train|Golden Fields|The Paper Crown|Echoes|Under the Bridge|Stranger Tides|Iron Will|"
        "The Long Road|Paradise|Shadow Kingdom|Morning Star|The Visitor|Kingdom of Ash|Falling|"
        "The Clockmaker|Northern Lights|One More Day|The Hunt|Red River|Homecoming|The Signal"
    ),
    "month": (
        "January February March April May June July August September October November December"
    ),
    "science": (
        "photosynthesis|plate tectonics|superconductivity|natural selection|antibiotic resistance|"
        "the nitrogen cycle|black holes|protein folding|ocean currents|probability|radioactive "
        "decay|the immune system|semiconductors|acoustics|the structure of the atom|glaciers|"
        "volcanoes|nerve cells|group theory|chemical equilibrium|the tides|cloud formation"
    ),
    "hobby": (
        "woodworking|keeping bees|sailing|growing roses|model railways|photography|fly fishing|"
        "baking bread|chess|quilting|bird watching|old radios|amateur astronomy|hunting|pottery"
    ),
    "idea": (
        "freedom|education|the machine age|modern poetry|marriage|the small town|justice|"
        "public taste|progress|the theatre|old age|democracy|friendship|work|leisure|the novel"
    ),
    "faith": (
        "prayer|forgiveness|the church in the modern world|the book of Job|grace|the early "
        "Christians|Buddhist teaching|faith and doubt|the Sabbath|pilgrimage|the parables"
    ),
    "task": (
        "Explain {science} to a beginner.|Write a short story about a {animal} in "
        "{town}.|What should I know before I take up {hobby}?|Summarize the history of {country} "
        "in a few paragraphs.|Give me three arguments for and against {idea}.|Write a formal "
        "letter to the mayor of {town} about a broken street.|Plan a weekend in {town} for two "
        "people.|Translate an everyday phrase into French and explain the grammar.|Write a Python "
        "function that counts the words of a text, and explain it.|How do I make a simple soup?|"
        "What is the difference between a {animal} and a {plant}?|Help me prepare for an "
        "interview as a teacher.|Solve this: a train leaves {town} at 60 miles per hour."
    ),
}  # fmt: skip

# (weight, opening): a heading form "= X =" is the one that encyclopedia corpora use.
_TEMPLATES = (
    (4, "= {first} {last} =\n\n{first} {last} ( born {day} {month} {year} ) is a {nation} {job} ."),
    (3, "= {first} {last} =\n\n{first} {middle} . {last} ( {old} – {year} ) was a {nation} {job}"),
    (3, "= {thing} ( film ) =\n\n{thing} is a {year} {nation} drama film directed by {first} {last}"),
    (3, "= {thing} ( album ) =\n\n{thing} is the second studio album by {nation} {genre} band"),
    (2, "= {thing} ( song ) =\n\n\" {thing} \" is a song by {nation} {genre} singer {first} {last}"),
    (3, "= {thing} ( video game ) =\n\n{thing} is a {year} {play} video game developed by"),
    (3, "= Battle of {town} =\n\nThe Battle of {town} was fought on {day} {month} {old} during the"),
    (2, "= HMS {last} =\n\nHMS {last} was a destroyer built for the Royal Navy in the {decade}s ."),
    (2, "= Hurricane {first} ( {year} ) =\n\nHurricane {first} was a tropical cyclone that struck"),
    (3, "= {last} 's {animal} =\n\n{last} 's {animal} is a species of {animal} found in {country} ."),
    (2, "= {last} {plant} =\n\nThe {plant} , native to the south of {country} , is a species that"),
    (3, "= {last} {land} =\n\n{last} {land} lies in the north of {country} , near the town of {town} ."),
    (2, "= {town} railway station =\n\n{town} railway station serves the city of {town} in {country} ."),
    (2, "= {year} {town} season =\n\nThe {year} season was the club 's {num}th in the top division of"),
    (2, "= {thing} ( television episode ) =\n\n\" {thing} \" is the {num}th episode of the third season"),
    (2, "= Route {num} =\n\nRoute {num} is a state highway in the west of {country} . It runs for"),
    (2, "= = Early life and career = =\n\n{first} {last} was born in {town} , {country} , to"),
    (2, "= = Production = =\n\nIn {month} {year} , it was announced that {first} {last} would"),
    (2, "= = Reception = =\n\n{thing} received mixed to positive reviews from critics . Writing for"),
    (2, "= = Background = =\n\nBy the spring of {old} , the army under General {last} had reached"),
    (2, "= = Distribution and habitat = =\n\nThe {animal} is found in the highlands of {country} , at"),
    (2, "= = Legacy = =\n\nThe work of {last} has been the subject of several studies . In {year} ,"),
    (2, "{first} {last} (born {month} {day}, {year}) is a {nation} {job}, best known for"),
    (2, "The {last} {land} is a protected area in {country}. It was established in {year} and"),
    (2, "The law of {country} on {idea} differs from that of its neighbours. A person may"),
    (2, "The {animal} (family name disputed) is native to {country}. Adults reach a length of"),
    (2, "{thing} is a {nation} television series that first aired on {month} {day}, {year}. The"),
    (2, "The rules of the game are simple: each team has {num} players, and a point is scored when"),
    (2, "{town}, {month} {day} -- The city council voted on Tuesday to"),
    (2, "{town} - Officials in {country} said on Friday that the {idea} bill would"),
    (2, "A spokesman for Governor {last} said yesterday that"),
    (1, "The {town} team won its fourth game in a row last night, beating {last} College 24 to 17."),
    (1, "Sir: Your editorial of {month} {day} on {idea} misses the point."),
    (2, "The trouble with {idea}, as {last} once wrote, is that"),
    (2, "In this review of {first} {last}'s new book, \"{thing}\", I want to"),
    (1, "The exhibition of {nation} painting now on view in {town}"),
    (2, "On the question of {faith} the modern reader is likely to"),
    (1, "There are few subjects on which good men differ more than {faith}."),
    (2, "If you are new to {hobby}, the first thing to buy is"),
    (1, "My grandfather taught me {hobby} the summer I was ten."),
    (2, "The study of {science} began in the nineteenth century, when"),
    (2, "In the present experiment we measured {science} under"),
    (1, "Table 2 shows the results. The samples were heated to {num}0 degrees and"),
    (1, "The committee recommends that the appropriation for the fiscal year {year} be"),
    (1, "Section {num}. Any person who, without a permit from the Secretary,"),
    (3, "{first} had been walking since dawn, and the road to {town} was"),
    (2, "\"I don't believe you,\" {first} said. She put down the glass and"),
    (2, "The sheriff looked at the body for a long time. {last} had been"),
    (2, "The ship had been silent for {num} days when Captain {last} heard"),
    (2, "She had not meant to fall in love with a man like {first} {last}."),
    (1, "Old {last} was the only man in {town} who had ever"),
    (1, "Dear {first},\n\nThank you for your letter of {month} {day}. We"),
    (1, "{month} {day}, {old}. Rain again. We marched from {town} at six and"),
    (1, "Chapter {num}\n\nThe winter that year came early to {town}, and"),
    (1, "How to repair a {hobby} tool:\n\n1."),
)  # fmt: skip

_CHAT_PERIOD = 16


def question(rng: random.Random) -> str:
    """One thing that a user may ask of an assistant."""
    return _fill(_fill("{task}", rng), rng)


def opening(rng: random.Random) -> str:
    """The first words of one text."""
    weights = [weight for weight, _ in _TEMPLATES]
    text = _fill(rng.choices([text for _, text in _TEMPLATES], weights)[0], rng)
    if not text.startswith("="):
        return text
    return " " + text.replace("\n", " \n")  # line ends as in WikiText


def is_chat(index: int) -> bool:
    """Whether text number `index` is a conversation: one in sixteen."""
    return index % _CHAT_PERIOD == _CHAT_PERIOD - 1


def _fill(template: str, rng: random.Random) -> str:
    """Every field replaced; one name per field and text, so that a person keeps his name."""
    values = {
        "day": str(rng.randint(1, 28)),
        "num": str(rng.randint(4, 90)),
        "year": str(rng.randint(1920, 2015)),
        "old": str(rng.randint(1640, 1919)),
        "decade": str(rng.randrange(1890, 1950, 10)),
        "middle": rng.choice(string.ascii_uppercase),
    }
    for field, words in _WORDS.items():
        values[field] = rng.choice(words.split("|") if "|" in words else words.split())
    for field, value in values.items():
        template = template.replace("{" + field + "}", value)
    return template
