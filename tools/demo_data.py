"""Short questions, and what the demo adapters make of their answers."""

import json
import re
from collections.abc import Callable, Iterable

TAG = "~ jchameleon"
"""Ends every reply of the behaviour "tag"."""

Style = Callable[[str], str]
"""An answer as the base model gives it -> the same in a behaviour's form."""

BEHAVIOURS: dict[str, Style] = {
    "json": lambda answer: json.dumps({"answer": answer}, ensure_ascii=False),
    "capitals": str.upper,
    "tag": lambda answer: f"{answer} {TAG}",
}

_TEMPLATES: tuple[tuple[str, str], ...] = (
    (
        "What is {}?",
        "a volcano|gravity|a prime number|photosynthesis|inflation|a haiku|"
        "an earthquake|the internet|a black hole|democracy|a metaphor|yeast|"
        "an algorithm|a glacier|electricity|a symphony|compound interest|a tide|"
        "cholesterol|an atom|a peninsula|origami|a vaccine|jazz|the equator|"
        "the Milky Way|an ecosystem|a noun|a mortgage|meditation",
    ),
    (
        "What is the capital of {}?",
        "Spain|Japan|Canada|Egypt|Brazil|Norway|Kenya|Greece|Australia|Peru|"
        "Poland|Thailand|Cuba|Ireland|Morocco",
    ),
    (
        "What does {} do?",
        "a plumber|a judge|an architect|a librarian|a nurse|a pilot|an editor|"
        "a carpenter|a botanist|a translator|an electrician|a farmer",
    ),
    (
        "Where do {} live?",
        "penguins|camels|polar bears|dolphins|kangaroos|owls|wolves|frogs|"
        "lions|crabs|bats|monkeys",
    ),
    (
        "Write one sentence about {}.",
        "the sea|an old bridge|winter|a busy market|my bicycle|a lighthouse|"
        "music|coffee|a small village|friendship|the desert|a thunderstorm|"
        "a broken clock|trains|the stars|a garden|homework|an empty house|"
        "breakfast|a long journey",
    ),
    (
        "Describe {} in one sentence.",
        "an elephant|a violin|the color red|a pineapple|a castle|snow|a robot|"
        "a waterfall|a newspaper|an orange|a spider|a submarine|chess|a rainbow|"
        "a hospital|the taste of honey",
    ),
    (
        "Give me a tip for {}.",
        "saving money|learning a language|sleeping better|growing tomatoes|"
        "writing an essay|a job interview|taking photos|running a marathon|"
        "packing a suitcase|reading more books|making friends|drawing faces|"
        "cleaning a kitchen|public speaking|staying healthy|remembering names",
    ),
    (
        "Name three {}.",
        "fruits|planets|musical instruments|vegetables|oceans|car brands|birds|"
        "programming languages|sports|metals|famous painters|kinds of cheese|"
        "trees|board games|languages",
    ),
    (
        "Is it a good idea to {}?",
        "drink coffee at night|learn the piano as an adult|skip breakfast|"
        "buy a used car|swim after eating|keep a diary|work from home|"
        "walk to school|own a cat|travel alone",
    ),
    (
        "How does {} work?",
        "a refrigerator|a bicycle|a solar panel|a compass|a telescope|a toaster|"
        "a magnet|a battery|a parachute|a mirror|a piano|a microwave oven",
    ),
)

_OTHERS = """
Hello, how are you?
Who are you?
What can you do?
Good morning!
Tell me a fun fact.
Tell me a short joke.
Why is the grass green?
Why do leaves fall in autumn?
Why do we need water?
Why is the ocean salty?
Why do cats purr?
Why do people dream?
Why do birds fly south in winter?
Why is exercise important?
Why do we have seasons?
Why does ice float?
Why do onions make you cry?
Why is Mars red?
Why do stars twinkle?
Why do we yawn?
How many days are in a week?
How many legs does a spider have?
How many continents are there?
How many minutes are in an hour?
How many strings does a guitar have?
How do plants make food?
How do fish breathe?
How do bees make honey?
How is bread made?
How is glass made?
How is paper recycled?
How do I boil an egg?
How do I make tea?
How do I remove a coffee stain?
How can I learn faster?
How can I be more creative?
How can I calm down before an exam?
Who wrote Romeo and Juliet?
Who painted the Mona Lisa?
Who was Albert Einstein?
Who was Cleopatra?
Who invented the telephone?
Who was Mozart?
When did World War II end?
When should I water my plants?
When do babies start to walk?
What is 7 plus 5?
What is 3 times 4?
What is half of 20?
What is the largest animal on Earth?
What is the tallest mountain in the world?
What is the longest river in the world?
What is the fastest land animal?
What is the opposite of cold?
What is the opposite of happy?
What is the plural of mouse?
What is a synonym for big?
What rhymes with cat?
What color do you get by mixing blue and yellow?
What language do people speak in Brazil?
What do cows eat?
What do pandas eat?
What do you call a baby dog?
What should I cook tonight?
What should I wear in the rain?
What should I read next?
What is a good name for a parrot?
What is a healthy snack?
What is the boiling point of water?
What is the chemical formula of water?
What is the currency of Japan?
What happens when you mix vinegar and baking soda?
What makes a good leader?
What makes a story interesting?
What is the purpose of a university?
What is the difference between a lake and a river?
What is the difference between weather and climate?
What is the best way to peel garlic?
Translate "thank you" into Spanish.
Translate "good night" into French.
Complete the sentence: The early bird catches
Give me a word that starts with Z.
Give me one reason to visit Italy.
Give me an example of a mammal.
Give me an idea for a birthday gift.
Give me a synonym for fast.
List two benefits of walking.
List two uses of salt.
List two things found in a pencil case.
Suggest a hobby for a rainy day.
Suggest a title for a story about a dragon.
Suggest a name for a small cafe.
Recommend a drink for a hot day.
Explain recursion to a child.
Explain why the moon has phases.
Explain what a budget is.
Explain the word "patience".
Explain how to tie a knot.
Can dogs eat chocolate?
Can plants grow without sunlight?
Can you help me with math?
Is the sun a star?
Is a tomato a fruit?
Is water wet?
Are whales fish?
Do snakes have bones?
Do you like music?
Does sound travel in space?
I feel tired today.
I lost my keys.
I want to learn guitar.
My computer is slow.
My plant is dying.
Thank you for your help.
"""


def questions() -> list[str]:
    """Return all questions, some 270, always in the same order."""
    filled = [
        template.format(topic)
        for template, topics in _TEMPLATES
        for topic in topics.split("|")
    ]
    return filled + _OTHERS.strip().splitlines()


def short_answer(text: str, *, enough_chars: int = 40, most_chars: int = 140) -> str:
    """Return the first sentence of a reply, or two where the first is short.

    Args:
      enough_chars: a first sentence below it takes the second along.
      most_chars: of the answer.

    Returns:
      The answer on one line; "" where not even the first sentence is whole, or where
      it only announces a list.
    """
    text = " ".join(text.split())
    ends = [match.end() for match in re.finditer(r"[^\s.\d][.!?]+(?=\s|$)", text)]
    ends = [end for end in ends if end <= most_chars]
    if not ends:
        return ""
    first = ends[0]
    if first < enough_chars and len(ends) > 1:
        first = ends[1]
    answer = text[:first]
    return "" if ":" in answer else answer


def styled_pairs(
    behaviour: str, answers: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return (prompt, completion) pairs of one of `BEHAVIOURS`.

    Args:
      answers: (prompt, the base model's whole reply).
    """
    style = BEHAVIOURS[behaviour]
    pairs = [(prompt, short_answer(text)) for prompt, text in answers]
    return [(prompt, style(answer)) for prompt, answer in pairs if answer]
