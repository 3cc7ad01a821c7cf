# ruff: noqa: E501, F541, SIM905 - tables of words and sentences read better unbroken
"""Synthetic chat tasks for the tiny model.  Every task is a function of a `Maker`.

A task returns (messages, tools, check): `check` says how the last answer is judged
({"kind": "contains"|"exact"|"json"|"tool", ...}).  The "train" and "heldout" splits use
disjoint names, cities, words, sums and tools, so held-out answers cannot be memorised.
"""

import hashlib
import json
import random
import string

from training.knowledge import (
    CAPITALS,
    CODE,
    FACTS,
    GREETINGS,
    HAIKUS,
    IDENTITY,
    JOKES,
    LISTS,
    SENTENCES,
    SPEECH,
)

NAMES = """Alice Bob Carla David Elena Felix Grace Hannah Ivan Julia Kevin Laura Marco Nina Oscar Paula Quentin Rosa
Samuel Tara Umar Vera Walter Xenia Yusuf Zoe Adam Bella Carlos Diana Emil Fatima George Helen Igor Jane Karl Lena
Mario Nora Olga Peter Rachel Simon Tina Ursula Victor Wendy Yara Zack Amir Bianca Chloe Daniel Eva Frank Gina Hugo Iris
Jack Kate Leo Maya Noah Otto Petra Ryan Sara Tom Una Vincent Will Anna Ben Clara Dora Eric Fiona Gary Holly Ian Jenny
Kim Luca Mia Nick Olive Paul Rita Stella Theo Vivian Zara Sofia Omar Priya Ravi Mei Kenji Aiko Lars Ingrid Pablo""".split()
CITIES = """London Paris Berlin Madrid Rome Vienna Prague Lisbon Oslo Stockholm Helsinki Dublin Athens Warsaw Budapest
Zurich Geneva Munich Hamburg Milan Naples Venice Barcelona Seville Porto Lyon Marseille Brussels Amsterdam Copenhagen
Tokyo Osaka Kyoto Seoul Beijing Shanghai Bangkok Hanoi Delhi Mumbai Lagos Cairo Nairobi Boston Chicago Denver Seattle
Austin Toronto Montreal Vancouver Sydney Melbourne Auckland Lima Bogota Santiago Havana Quito Singapore Jakarta Manila
Istanbul Ankara Tbilisi Riga Tallinn Vilnius Sofia Zagreb Ljubljana Leeds Bristol Cardiff Glasgow Edinburgh""".split()
COLORS = "red blue green yellow purple orange black white pink brown grey silver golden turquoise violet".split()
ANIMALS = "dog cat parrot rabbit hamster turtle horse goldfish lizard snake pony canary mouse goat duck".split()
FOODS = """pizza sushi pasta curry salad soup tacos rice bread cheese chocolate pancakes noodles dumplings apples
mangoes bananas risotto falafel burgers""".split()
HOBBIES = """painting chess climbing swimming reading gardening cycling cooking photography dancing fishing hiking
sailing knitting running skiing""".split()
JOBS = """teacher doctor baker pilot nurse engineer lawyer farmer chef painter plumber librarian journalist carpenter
architect dentist singer mechanic""".split()
OBJECTS = """box door safe locker bag car key book lamp chair table drawer cabinet vault crate suitcase notebook
envelope gate bicycle""".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant.", "You are a concise assistant.",
          "Answer briefly.", "You are a friendly assistant that answers questions.", "Be accurate and brief.",
          "You are an assistant. Use the conversation to answer.", "You are a helpful AI assistant."]  # fmt: skip
WORDS = []  # common words of the corpus, set by data.py


def held_out(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 8 == 0


class Maker:
    """Random draws restricted to one split."""

    def __init__(self, seed, split="train", corpus=None):
        self.r, self.split, self.corpus = random.Random(seed), split, corpus
        keep = lambda items: [x for x in items if held_out(x) == (split == "heldout")]  # noqa: E731
        self.names, self.cities, self.words = keep(NAMES), keep(CITIES), keep(WORDS)

    def pick(self, items):
        return items[self.r.randrange(len(items))]

    def chance(self, p):
        return self.r.random() < p

    def name(self):
        return self.pick(self.names)

    def city(self):
        return self.pick(self.cities)

    def word(self):
        return self.pick(self.words)

    def number(self, digits=None):
        digits = digits or self.r.randint(1, 7)
        return str(self.r.randint(10 ** (digits - 1), 10**digits - 1))

    def chars(self, alphabet, low, high):
        return "".join(self.r.choices(alphabet, k=self.r.randint(low, high)))

    def pseudo(self):
        def syllable():
            start = self.pick("b d f g k l m n p r s t v z br tr kl st th sh ch".split())
            return start + self.pick("a e i o u ai ou".split()) + self.pick(["", "", "n", "r", "l", "x", "s"])

        return "".join(syllable() for _ in range(self.r.randint(2, 3)))

    def value(self):
        """Something only attention can reproduce."""
        kind = self.r.randrange(10)
        if kind < 3:
            return self.number(self.r.randint(3, 8))
        if kind == 3:
            return self.word()
        if kind == 4:
            return f"{self.word()}-{self.word()}"
        if kind == 5:
            return self.chars("0123456789abcdef", 6, 12)
        if kind == 6:
            return self.chars(string.ascii_uppercase + string.digits, 4, 8)
        if kind == 7:
            return f"{self.pick(COLORS)}-{self.pick(ANIMALS)}-{self.number(2)}"
        if kind == 8:
            return self.chars(string.ascii_uppercase, 2, 4) + "-" + self.number(self.r.randint(2, 5))
        return self.pseudo().capitalize()

    def ask(self, question):
        """A question with a little variety in how it is put."""
        lead = self.pick(["", "", "", "", "Please tell me: ", "Tell me, ", "Quick question: ", "Hi! "])
        if lead.endswith(", ") or lead.endswith(": "):
            question = question[0].lower() + question[1:] if not question.startswith("I ") else question
        return lead + question


def article(noun):
    return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def with_system(m, messages, p=0.35):
    return [{"role": "system", "content": m.pick(SYSTEM)}, *messages] if m.chance(p) else messages


def contains(text):
    return {"kind": "contains", "value": text}


def exact(text):
    return {"kind": "exact", "value": text}


# --- knowledge -----------------------------------------------------------------------------------

ASK_DOC = {
    "function": ["What does {n} do?", "What does the function {n} do?", "What does Python's {n} do?", "Explain {n}.",
                 "Describe {n}.", "What is {n} for?", "help({n})", "In Python, what does {n} do?",
                 "Can you explain {n}?", "What does {n}() do?"],
    "class": ["What is {n}?", "What is the class {n}?", "Explain {n}.", "Describe the class {n}.", "help({n})",
              "In Python, what is {n}?", "What is {n} for?", "What does {n} do?"],
    "module": ["What is the module {n}?", "What is the {n} module for?", "What does the module {n} do?",
               "Explain the Python module {n}.", "Describe the {n} module."],
    "term": ["What is a {n} in Python?", "What does {n} mean in Python?", "Define {n}.", "Explain the term {n}.",
             "What is {n}?", "In Python, what is a {n}?"],
}  # fmt: skip
ASK_DOC["method"] = [*ASK_DOC["function"][:8], "What does the method {n} do?", "Describe the method {n}."]


def docstring(m):
    """A question whose answer is the first paragraph of a docstring; the last phrasing is held out."""
    messages, item, answer = [], None, ""
    for _ in range(m.r.randint(1, 3) if m.split == "train" else 1):
        item = m.pick(m.corpus.facts)
        phrasings = ASK_DOC[item["kind"]]
        phrasing = phrasings[-1] if m.split == "heldout" else m.pick(phrasings[:-1])
        answer = item["text"]
        messages += [user(phrasing.format(n=item["name"])), says(answer)]
    return with_system(m, messages), None, exact(answer)


def grounded(m):
    """The same kind of question, with the answer in the prompt."""
    items = m.r.sample(m.corpus.facts, m.r.randint(2, 8))
    item = m.pick(items)
    listing = "\n".join(f"{x['name']}: {x['text']}" for x in items)
    if m.chance(0.5):
        question, answer = f"What does it say about {item['name']}?", item["text"]
    else:
        question, answer = f'Which entry says: "{item["text"]}"?', item["name"]
    return with_system(m, [user(f"{listing}\n\n{question}"), says(answer)]), None, exact(answer)


def fact(m):
    kind = m.r.randrange(5)
    if kind <= 1:
        country, city = m.pick(CAPITALS)
        question, answer = m.pick([
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"What's the capital of {country}?", f"The capital of {country} is {city}."),
            (f"Which city is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"{city} is the capital of which country?", f"{city} is the capital of {country}."),
        ])  # fmt: skip
    elif kind == 2:
        question, answer = m.pick(CODE)
    else:
        questions, answer = m.pick(FACTS)
        question = m.pick(questions)
    return with_system(m, [user(m.ask(question)), says(answer)]), None, exact(answer)


def small_talk(m):
    """Greetings, identity, jokes, thanks; and a persona given by the system prompt."""
    kind = m.r.randrange(12)
    if kind < 4:
        questions, answers = m.pick(GREETINGS)
        return with_system(m, [user(m.pick(questions)), says(answers[0])]), None, exact(answers[0])
    if kind < 7:
        questions, answer = m.pick(IDENTITY)
        return with_system(m, [user(m.pick(questions)), says(answer)]), None, exact(answer)
    if kind < 9:
        name, firm = m.pick([m.name(), m.pseudo().capitalize()]), m.pseudo().capitalize()
        system = m.pick([f"You are {name}, the assistant of {firm}.", f"Your name is {name}. You work for {firm}.",
                         f"You are {name}, an assistant for {firm}. Answer briefly."])  # fmt: skip
        question, answer = m.pick([
            ("Who are you?", f"I am {name}, the assistant of {firm}."),
            ("What is your name?", f"My name is {name}."),
            ("Who do you work for?", f"I work for {firm}."),
            ("Introduce yourself.", f"I am {name}, the assistant of {firm}."),
        ])  # fmt: skip
        return [{"role": "system", "content": system}, user(question), says(answer)], None, exact(answer)
    if kind == 9:
        joke = m.pick(JOKES)
        question = m.pick(["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Tell me a joke, please."])
        return with_system(m, [user(question), says(joke)]), None, {"kind": "any"}
    if kind == 10:
        question = m.pick(["Write a haiku.", "Write a short poem.", "Write me a poem.", "Can you write a haiku?"])
        return with_system(m, [user(question), says(m.pick(HAIKUS))]), None, {"kind": "any"}
    question, answer = m.pick([
        (f"What is {article(m.pseudo())}?", "I don't know."), (f"Who is {m.pseudo().capitalize()}?", "I don't know."),
        (f"Who won the match in {m.city()} yesterday?", "I don't know."),
        (f"What happened in {m.city()} on {m.r.randint(1, 28)} {m.pick(MONTHS)} {m.r.randint(1900, 2024)}?",
         "I don't know."),
        (f"What is the population of {m.city()}?", "I don't know."),
        (f"What will the weather be in {m.city()} tomorrow?", "I don't know. I have no access to live data."),
        (f"What is the weather in {m.city()}?", "I don't know. I have no access to live data."),
        ("What time is it?", "I don't know. I have no access to live data."),
        ("What is today's date?", "I don't know. I have no access to live data."),
        (f"How old is {m.name()}?", "I don't know."), (f"What does {m.pseudo()} mean?", "I don't know."),
    ])  # fmt: skip
    return with_system(m, [user(question), says(answer)]), None, contains("I don't know")


def story(m):
    """Longer answers from templates, so that streaming has something to stream."""
    name, animal, city, color = m.name(), m.pick(ANIMALS), m.city(), m.pick(COLORS)
    thing, food, friend, day = m.pick(OBJECTS), m.pick(FOODS), m.name(), m.pick(DAYS)
    kind = m.r.randrange(4)
    if kind == 0:
        question = m.pick(["Write a short story about {0} named {1}.", "Tell me a story about {0} named {1}.",
                           "Tell a short story about {0} called {1}."]).format(article(animal), name)  # fmt: skip
        answer = " ".join([
            f"Once upon a time there was a {animal} named {name} who lived in a quiet house near {city}.",
            m.pick([f"Every morning {name} looked for something new to do.",
                    f"{name} was curious about everything and afraid of nothing.",
                    f"{name} had one wish: to see the world outside the garden."]),
            m.pick([f"One {day}, {name} found {article(color)} {thing} behind the old wall.",
                    f"On a rainy {day}, {article(color)} {thing} appeared in front of the door."]),
            m.pick([f"Inside there was a letter and a piece of {food}.", "Nobody knew where it came from.",
                    f"It belonged to {friend}, who had been looking for it for weeks."]),
            m.pick([f"{name} carried it all the way to {friend}, who smiled and said thank you.",
                    f"{name} asked {friend} for help, and together they found out the truth."]),
            m.pick(["From that day on they were the best of friends.", "And they all lived happily ever after.",
                    f"That evening they ate {food} together and laughed until the stars came out."])])  # fmt: skip
    elif kind == 1:
        title, items = m.pick(LISTS)
        count = m.r.randint(3, len(items))
        question = m.pick(["List {0} {1}.", "Name {0} {1}.", "Give me a list of {0} {1}.", "Write down {0} {1}."])
        question = question.format(count, title)
        answer = "\n".join(f"{i + 1}. {item}" for i, item in enumerate(items[:count]))
    elif kind == 2:
        low = m.r.choice([0, 1, 1, 1, m.r.randint(2, 60)])
        high = low + m.r.randint(3, 40)
        question = m.pick([f"Count from {low} to {high}.", f"Please count from {low} up to {high}."])
        answer = ", ".join(str(i) for i in range(low, high + 1))
    else:
        text = m.corpus.passage(m, m.r.randint(300, 1500))
        cut = text.rfind(" ", 0, len(text) // 2)
        if cut < 80:
            return story(m)
        question, answer = f"Continue this text:\n\n{text[:cut]}", text[cut + 1 :]
        return [user(question), says(answer)], None, {"kind": "any"}
    return with_system(m, [user(question), says(answer)]), None, {"kind": "any"}


# --- arithmetic and small text operations ----------------------------------------------------------


def arithmetic(m):
    while True:
        op = m.pick("+++---**/")
        a, b = (m.r.randint(0, 12), m.r.randint(0, 12)) if op in "*/" else (m.r.randint(0, 99), m.r.randint(0, 99))
        if op in "+-" and m.chance(0.25):
            a, b = m.r.randint(0, 20), m.r.randint(0, 20)
        if op == "/":
            b = max(b, 1)
            a *= b
        if held_out(f"{a}{op}{b}") == (m.split == "heldout"):
            break
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
    words = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[op]
    sign = m.pick({"*": ["*", "×", "x"], "/": ["/", "÷"]}.get(op, [op]))
    question = m.pick([f"What is {a} {sign} {b}?", f"What is {a} {words} {b}?", f"{a} {sign} {b} = ?",
                       f"Calculate {a} {sign} {b}.", f"Compute {a} {sign} {b}.", f"What's {a}{sign}{b}?"])  # fmt: skip
    sentence = f"{a} {sign if sign in question else words} {b} = {result}."
    sentence = f"{a} {op} {b} = {result}."
    if m.chance(0.12):
        question, sentence = question + " Answer with just the number.", str(result)
    return with_system(m, [user(question), says(sentence)], 0.2), None, exact(sentence)


def text_operation(m):
    kind = m.r.randrange(14)
    words = [m.word() if m.chance(0.8) else m.pseudo() for _ in range(m.r.randint(2, 8))]
    numbers = [m.r.randint(0, 99) for _ in range(m.r.randint(3, 9))]
    listing = ", ".join(words)
    word = words[0]
    if kind == 0:
        question, answer = f"Sort these numbers: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))
    elif kind == 1:
        question, answer = f"Reverse this list: {listing}", ", ".join(reversed(words))
    elif kind == 2:
        question, answer = f"Spell the word {word}.", "-".join(word)
    elif kind == 3:
        question, answer = f"How many words are in this list: {listing}?", str(len(words))
    elif kind == 4:
        text = " ".join(words) if m.chance(0.5) else m.value()
        question = m.pick([f"Repeat after me: {text}", f"Say exactly this: {text}", f"Repeat: {text}", f'Say "{text}"'])
        answer = text
    elif kind == 5:
        question, answer = f"What is the first word of this list: {listing}?", words[0]
    elif kind == 6:
        question, answer = f"What is the last word of this list: {listing}?", words[-1]
    elif kind == 7:
        question, answer = f"Write this in capital letters: {word}", word.upper()
    elif kind == 8:
        question, answer = f"What is the largest of these numbers: {', '.join(map(str, numbers))}?", str(max(numbers))
    elif kind == 9:
        question, answer = f"What is the smallest of these numbers: {', '.join(map(str, numbers))}?", str(min(numbers))
    elif kind == 10:
        question, answer = f"Sort these words: {', '.join(words)}", ", ".join(sorted(words))
    elif kind == 11:
        i = m.r.randrange(len(words))
        ordinal = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"][i]
        question, answer = f"What is the {ordinal} word of this list: {listing}?", words[i]
    elif kind == 12:
        i, day = m.r.randrange(7), m.pick(["after", "before"])
        question, answer = f"Which day comes {day} {DAYS[i]}?", DAYS[(i + (1 if day == "after" else -1)) % 7]
    else:
        number = m.r.randint(0, 999)
        question = f"Is {number} even or odd?"
        answer = f"{number} is {'odd' if number % 2 else 'even'}."
    return with_system(m, [user(question), says(answer)], 0.2), None, exact(answer)


def copying(m):
    """Copy part of a document, so that any token can be copied."""
    passage = m.corpus.passage(m, m.r.randint(60, 700))
    words = passage.split(" ")
    start = m.r.randrange(max(1, len(words) - 3))
    text = " ".join(words[start : start + m.r.choice([1, 2, 3, 5, 8, 20, 60])]).strip() or words[0]
    question = m.pick([f"Repeat after me: {text}", f"Say exactly this: {text}", f"Repeat this text:\n\n{text}",
                       f"Copy this text exactly:\n\n{text}", f'Say "{text}"', f"Repeat: {text}"])  # fmt: skip
    return with_system(m, [user(question), says(text)], 0.2), None, exact(text)


# --- memory over several turns ---------------------------------------------------------------------


def personal_fact(m):
    """(topic, statement, acknowledgement, question, answer, value)"""
    name, city, number = m.name(), m.city(), m.number(m.r.randint(1, 4))
    pet, pet_name = m.pick(ANIMALS), m.pick([m.name(), m.pseudo().capitalize()])
    color, food, hobby, job, value = m.pick(COLORS), m.pick(FOODS), m.pick(HOBBIES), m.pick(JOBS), m.value()
    day, age = f"{m.r.randint(1, 28)} {m.pick(MONTHS)}", str(m.r.randint(18, 90))
    if m.chance(0.15):
        name = m.pseudo().capitalize()
    return m.pick([
        ("name", m.pick([f"My name is {name}.", f"Hi, I'm {name}.", f"I am {name}.", f"Call me {name}."]),
         f"Nice to meet you, {name}!", m.pick(["What is my name?", "What's my name?", "Who am I?",
                                               "Do you remember my name?"]), f"Your name is {name}.", name),
        ("city", m.pick([f"I live in {city}.", f"I'm from {city}.", f"My home is in {city}."]),
         f"Got it, you live in {city}.", m.pick(["Where do I live?", "Which city do I live in?", "Where am I from?"]),
         f"You live in {city}.", city),
        ("pet", m.pick([f"I have a {pet} named {pet_name}.", f"My {pet} is called {pet_name}."]),
         f"{pet_name} is a lovely name for a {pet}.",
         m.pick(["What is my pet's name?", "What is my pet called?", f"What is the name of my {pet}?"]),
         f"Your {pet} is called {pet_name}.", pet_name),
        ("number", m.pick([f"My favourite number is {number}.", f"My lucky number is {number}."]),
         f"I will remember that: {number}.", m.pick(["What is my favourite number?", "What is my lucky number?"]),
         f"Your number is {number}.", number),
        ("color", m.pick([f"My favourite colour is {color}.", f"I like the colour {color} best.",
                          f"My favorite color is {color}."]),
         f"{color.capitalize()} is a nice colour.", m.pick(["What is my favourite colour?",
                                                            "What's my favorite color?"]),
         f"Your favourite colour is {color}.", color),
        ("food", m.pick([f"I love {food}.", f"My favourite food is {food}."]), f"Good choice, {food}!",
         m.pick(["What is my favourite food?", "What do I love to eat?"]), f"Your favourite food is {food}.", food),
        ("hobby", m.pick([f"My hobby is {hobby}.", f"In my free time I enjoy {hobby}."]), f"{hobby.capitalize()} is fun.",
         m.pick(["What is my hobby?", "What do I enjoy in my free time?"]), f"Your hobby is {hobby}.", hobby),
        ("job", m.pick([f"I work as {article(job)}.", f"I am {article(job)}.", f"My job: {job}."]), f"I see, you work as {article(job)}.",
         m.pick(["What is my job?", "What do I do for work?"]), f"You work as {article(job)}.", job),
        ("age", m.pick([f"I am {age} years old.", f"I'm {age}."]), f"Noted, you are {age} years old.",
         m.pick(["How old am I?", "What is my age?"]), f"You are {age} years old.", age),
        ("birthday", f"My birthday is on {day}.", f"I will remember {day}.",
         m.pick(["When is my birthday?", "What is my birthday?"]), f"Your birthday is on {day}.", day),
        ("code", m.pick([f"My access code is {value}.", f"Please remember this code: {value}.",
                         f"Remember the code {value}."]), f"I will remember the code {value}.",
         m.pick(["What is the code?", "What code did I give you?", "What was the code?"]),
         f"The code is {value}.", value),
    ])  # fmt: skip


UNKNOWN = {
    "name": "What is my name?", "city": "Where do I live?", "pet": "What is my pet's name?",
    "number": "What is my favourite number?", "color": "What is my favourite colour?",
    "food": "What is my favourite food?", "hobby": "What is my hobby?", "job": "What is my job?",
    "age": "How old am I?", "birthday": "When is my birthday?", "code": "What is the code?",
}  # fmt: skip


def memory(m):
    """Facts told by the user, turns about something else, then questions about the facts."""
    facts = {}
    for _ in range(m.r.randint(1, 7)):
        new = personal_fact(m)
        facts.setdefault(new[0], new)
    messages, order = [], list(facts.values())
    if m.chance(0.4) and len(order) > 1:  # several facts in one turn
        together = order[: m.r.randint(2, len(order))]
        order = order[len(together) :]
        messages += [user(" ".join(f[1] for f in together)), says(together[-1][2])]
    for one in order:
        messages += [user(one[1]), says(one[2])]
        if m.chance(0.35):
            messages += distractor(m)
    if facts and m.chance(0.2):  # a correction: the last statement counts
        topic = m.pick(list(facts))
        for _ in range(40):
            new = personal_fact(m)
            if new[0] == topic and new[5] != facts[topic][5]:
                facts[topic] = new
                messages += [user("Actually, " + new[1][0].lower() + new[1][1:] if not new[1].startswith("I")
                                  else "Actually, " + new[1]), says(new[2])]  # fmt: skip
                break
    for _ in range(m.r.randint(0, 5)):
        messages += distractor(m)
    check = None
    for _ in range(m.r.randint(1, 4)):
        if m.chance(0.12):
            topic = m.pick([t for t in UNKNOWN if t not in facts] or ["name"])
            if topic not in facts:
                messages += [user(UNKNOWN[topic]), says("I don't know. You have not told me.")]
                check = contains("I don't know")
                continue
        one = m.pick(list(facts.values()))
        messages += [user(one[3]), says(one[4])]
        check = contains(one[5])
    return with_system(m, messages), None, check


def distractor(m):
    task = m.pick([arithmetic, text_operation, fact, small_talk, docstring])
    messages = task(m)[0]
    return (
        [x for x in messages if x["role"] != "system"]
        if messages[0]["role"] != "system" or task is not small_talk
        else distractor(m)
    )


# --- needles in long texts -------------------------------------------------------------------------

ATTRIBUTES = """secret code|password|access code|passphrase|locker number|phone number|code word|serial number|
order number|PIN|key|token|room number|magic number|special number|badge number|account number|ticket number|
secret word|identifier|secret ingredient|secret number|registration number|verification code|special magic number"""
ATTRIBUTES = [a.strip() for a in ATTRIBUTES.replace("\n", "").split("|")]


def subject(m):
    return m.pick([
        m.name, m.city, m.word, lambda: m.pseudo().capitalize(), lambda: f"the {m.pick(COLORS)} {m.pick(OBJECTS)}",
        lambda: f"the {m.word()} {m.pick(OBJECTS)}", lambda: f"project {m.word()}", lambda: f"server {m.word()}",
        lambda: f"agent {m.pseudo().capitalize()}", lambda: f"room {m.number(3)}",
    ])()  # fmt: skip


def needle(m, attribute=None):
    """(key, statement, question, answer, value)"""
    if m.chance(0.12):
        attribute = attribute or m.pick(ATTRIBUTES)
        value = m.value()
        statement = m.pick(
            [f"The {attribute} is {value}.", f"Remember: the {attribute} is {value}.", f"The {attribute} is: {value}."]
        )
        return ((attribute, ""), statement, f"What is the {attribute}?", f"The {attribute} is {value}.", value)
    attribute, who, value = attribute or m.pick(ATTRIBUTES), subject(m), m.value()
    link = m.pick(["of", "for", "of", "for", "to"]) if not attribute.endswith("r") else m.pick(["of", "for"])
    key = f"{attribute} {link} {who}"
    statement = m.pick(
        [
            f"The {key} is {value}.",
            f"The {key} is {value}.",
            f"The {key} is: {value}.",
            f"Remember that the {key} is {value}.",
            f"Note: the {key} is {value}.",
            f"One of the facts here: the {key} is {value}.",
            f"IMPORTANT: The {key} is {value}.",
        ]
    )
    question = m.pick([f"What is the {key}?", f"What is the {key}?", f"What's the {key}?", f"Tell me the {key}.",
                       f"What is the {key} mentioned in the text?", f"Find the {key}."])  # fmt: skip
    answer = f"The {key} is {value}."
    return ((attribute, who), statement, question, answer, value)


def filler(m, chars):
    kind = m.r.random()
    if kind < 0.8:
        return m.corpus.passage(m, chars)
    if kind < 0.93:
        base = m.pick(SENTENCES)
        return ((base + "\n") * (chars // len(base) + 1))[:chars].rsplit("\n", 1)[0] + "\n"
    sentences, size = [], 0
    while size < chars:
        sentence = " ".join(m.word() for _ in range(m.r.randint(4, 12))).capitalize() + "."
        sentences.append(sentence)
        size += len(sentence) + 1
    return " ".join(sentences) + "\n"


def needles(m, chars, count=None, questions=None, depth=None):
    """Facts hidden in `chars` characters of filler, asked for afterwards, one turn each."""
    count = count or m.pick([1, 1, 2, 3, 4, 6, 8, 12])
    shared = m.pick(ATTRIBUTES) if m.chance(0.4) else None
    items = {}
    for _ in range(count):
        new = needle(m, shared)
        items.setdefault(new[0], new)
    items = list(items.values())
    lines = filler(m, chars).split("\n")
    if len(lines) < 5:
        lines = [x + "." for x in " ".join(lines).split(". ")]
    spots = sorted(m.r.randrange(len(lines) + 1) for _ in items)
    if depth is not None:
        spots = [int(depth * len(lines))] * len(items)
    for spot, item in reversed(list(zip(spots, items, strict=True))):
        if m.chance(0.3) and 0 < spot < len(lines) and lines[spot].endswith("."):
            lines[spot] += " " + item[1]  # inside a paragraph
        else:
            lines.insert(spot, item[1])
    text = "\n".join(lines)
    asked = m.r.sample(items, min(len(items), questions or m.pick([1, 2, 3, 4, 6])))
    messages, check, first = [], None, asked[0][2]
    style = m.r.randrange(5)
    if style == 0:
        messages = [user(f"{text}\n\n{first}")]
    elif style == 1:
        messages = [user(f"{m.pick(['Read this text and answer the question.', 'Some facts are hidden in this text.'])}"
                         f"\n\n{text}\n\nQuestion: {first}")]  # fmt: skip
    elif style == 2:
        ready = m.pick(["I have read the text. What would you like to know?", "OK.", "I have read it."])
        messages = [user(f"{m.pick(['Read this:', 'Here is a text:', 'Memorise this text.'])}\n\n{text}"), says(ready),
                    user(first)]  # fmt: skip
    elif style == 3:
        messages = [{"role": "system", "content": f"{m.pick(SYSTEM)} Use this text:\n\n{text}"}, user(first)]
    else:
        messages = [user(f"{first}\n\n{text}\n\n{first}")]
    for i, item in enumerate(asked):
        if i:
            messages.append(user(item[2]))
        if m.chance(0.06) and i and depth is None:
            other = needle(m, shared)
            if other[0] not in [x[0] for x in items] and other[0][1]:
                messages[-1] = user(other[2])
                messages.append(says("I don't know. The text does not say."))
                check = contains("I don't know")
                continue
        messages.append(says(item[3]))
        check = contains(item[4])
    return messages, None, check


def lookup(m, chars):
    """Many random key-value pairs as JSON, lines or a table."""
    count = max(3, min(300, chars // 22))
    keys = m.pick([m.word, m.pseudo, lambda: m.number(4), lambda: f"{m.word()}-{m.pseudo()}", m.value])
    values = m.pick([lambda: m.number(5), m.word, lambda: m.chars("0123456789abcdef", 6, 8), m.pseudo, m.value])
    pairs = {}
    for _ in range(count):
        pairs.setdefault(keys(), values())
    style = m.r.randrange(4)
    if style == 0:
        text = json.dumps(pairs, indent=m.pick([None, 2]))
    elif style == 1:
        text = "\n".join(f"line {k}: the content is {v}" for k, v in pairs.items())
    elif style == 2:
        text = "\n".join(f"{k} = {v}" for k, v in pairs.items())
    else:
        text = "key,value\n" + "\n".join(f"{k},{v}" for k, v in pairs.items())
    asked = m.r.sample(list(pairs), min(len(pairs), m.r.randint(2, 8)))
    messages, value = [], ""
    for i, key in enumerate(asked):
        question = m.pick([f"What is the value of {key}?", f'What is the value for "{key}"?', f"Look up {key}."])
        value = pairs[key]
        messages += [user(f"{text}\n\n{question}" if i == 0 else question), says(value)]
    return messages, None, exact(value)


# --- JSON answers ----------------------------------------------------------------------------------


def json_answer(m):
    name, city, age, job = m.name(), m.city(), m.r.randint(18, 90), m.pick(JOBS)
    last, food, color, pet = m.pseudo().capitalize(), m.pick(FOODS), m.pick(COLORS), m.pick(ANIMALS)
    price, amount, thing = m.r.randint(1, 500), m.r.randint(1, 40), m.pick(OBJECTS)
    day, month = m.r.randint(1, 28), m.pick(MONTHS)
    sentence, record = m.pick([
        (f"{name} {last} is {age} years old and works as {article(job)} in {city}.",
         {"name": f"{name} {last}", "age": age, "job": job, "city": city}),
        (f"{name} lives in {city} and has {article(color)} {pet}.", {"name": name, "city": city, "color": color, "pet": pet}),
        (f"I bought {amount} {color} {thing}s for {price} euros in {city}.",
         {"item": thing, "amount": amount, "price": price, "city": city, "color": color}),
        (f"The meeting with {name} is on {day} {month} in {city}.",
         {"name": name, "day": day, "month": month, "city": city}),
        (f"{name} ordered {amount} portions of {food} and paid {price} dollars.",
         {"name": name, "food": food, "amount": amount, "price": price}),
        (f"My name is {name}, I am {age} and I work as {article(job)}.", {"name": name, "age": age, "job": job}),
    ])  # fmt: skip
    keys = m.r.sample(list(record), m.r.randint(2, len(record)))
    answer = json.dumps({k: record[k] for k in keys})
    listing = ", ".join(keys)
    prompt = m.pick([f"Reply with JSON with the keys {listing}.\n\n{sentence}",
                     f"Extract {listing} from this sentence as JSON: {sentence}",
                     f"{sentence}\n\nReply with a JSON object with keys {listing}.",
                     f"{sentence} Give me {listing} as JSON."])  # fmt: skip
    messages = [user(prompt), says(answer)]
    if m.chance(0.2):
        messages = [{"role": "system", "content": "You extract data. Reply with JSON only."}, *messages]
    else:
        messages = with_system(m, messages, 0.2)
    return messages, None, {"kind": "json", "value": json.loads(answer)}


# --- tool calls ------------------------------------------------------------------------------------


def schema(name, description, properties, required=None):
    return {"type": "function", "function": {
        "name": name, "description": description,
        "parameters": {"type": "object", "properties": properties,
                       "required": list(properties) if required is None else required}}}  # fmt: skip


def prop(kind, description, **more):
    return {"type": kind, "description": description, **more}


def weather(m):
    city, unit = m.city(), m.pick([None, None, "celsius", "fahrenheit"])
    properties = {"location": prop("string", m.pick(["The city name", "City, e.g. Paris"]))}
    key = m.pick(["location", "city", "location"])
    properties = {key: properties["location"]}
    if unit or m.chance(0.4):
        properties["unit"] = prop("string", "The unit", enum=["celsius", "fahrenheit"])
    tool = schema(m.pick(["get_weather", "get_current_weather", "weather", "getWeather"]),
                  m.pick(["Get the current weather", "Get the weather for a city", "Current weather of a location"]),
                  properties, [key])  # fmt: skip
    request = m.pick([f"What is the weather in {city}", f"What's the weather like in {city}",
                      f"How is the weather in {city}", f"Is it cold in {city}", f"Weather in {city}",
                      f"What is the weather in {city} today"])  # fmt: skip
    request += f" in {unit}?" if unit else "?"
    arguments = {key: city} | ({"unit": unit} if unit else {})
    degrees, sky = m.r.randint(-10, 38), m.pick(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"])
    return (
        tool,
        request,
        arguments,
        {"temperature": degrees, "condition": sky},
        f"It is {degrees} degrees and {sky} in {city}.",
    )


def calendar(m):
    title, day = f"{m.pick(['meeting', 'lunch', 'call', 'dinner', 'interview'])} with {m.name()}", m.pick(DAYS)
    time = f"{m.r.randint(7, 20):02d}:{m.pick(['00', '15', '30', '45'])}"
    tool = schema(m.pick(["add_event", "create_event", "schedule_meeting"]), "Add an event to the calendar",
                  {"title": prop("string", "Title of the event"), "day": prop("string", "Day of the week"),
                   "time": prop("string", "Time as HH:MM")})  # fmt: skip
    request = m.pick([f"Add a {title} on {day} at {time}.", f"Schedule a {title} on {day} at {time}.",
                      f"Put a {title} in my calendar for {day} at {time}."])  # fmt: skip
    number = m.r.randint(100, 9999)
    return (
        tool,
        request,
        {"title": title, "day": day, "time": time},
        {"status": "ok", "id": number},
        f"Done. The {title} is on {day} at {time}.",
    )


def search(m):
    query = m.pick([" ".join(m.word() for _ in range(m.r.randint(1, 3))), m.pseudo(), f"{m.word()} in {m.city()}"])
    key = m.pick(["query", "q", "text"])
    properties = {key: prop("string", "What to search for")}
    arguments, limit = {key: query}, m.r.randint(1, 20)
    suffix = ""
    if m.chance(0.3):
        properties["limit"] = prop("integer", "Number of results")
        arguments["limit"], suffix = limit, f" and show {limit} results"
    tool = schema(m.pick(["search", "web_search", "search_docs", "find_documents"]), "Search for documents", properties,
                  [key])  # fmt: skip
    request = m.pick(
        [f"Search for {query}{suffix}.", f"Look up {query}{suffix}.", f"Find documents about {query}{suffix}."]
    )
    title = f"{m.word()} {m.word()}"
    return tool, request, arguments, {"results": [{"title": title}]}, f'I found "{title}".'


def calculator(m):
    a, b, op = m.r.randint(2, 9999), m.r.randint(2, 9999), m.pick("+-*")
    expression = f"{a} {op} {b}"
    tool = schema(m.pick(["calculate", "calculator", "evaluate"]), "Evaluate an arithmetic expression",
                  {"expression": prop("string", "The expression")})  # fmt: skip
    request = m.pick([f"Calculate {expression}.", f"Use the calculator: {expression}", f"What is {expression}?"])
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return tool, request, {"expression": expression}, {"result": result}, f"{expression} = {result}."


def message(m):
    who, text = m.name(), f"{m.word()} {m.word()} {m.word()}"
    tool = schema(m.pick(["send_message", "send_email", "sendMessage"]), "Send a message to a person",
                  {m.pick(["to", "recipient"]): prop("string", "Who receives it"),
                   m.pick(["body", "text", "message"]): prop("string", "The text")})  # fmt: skip
    keys = list(tool["function"]["parameters"]["properties"])
    request = m.pick([f'Send a message to {who}: "{text}"', f'Tell {who} "{text}".', f'Write to {who}: "{text}"'])
    return tool, request, {keys[0]: who, keys[1]: text}, {"status": "sent"}, f"The message to {who} was sent."


def reminder(m):
    task, minutes = f"{m.pick(['call', 'visit', 'write to', 'meet'])} {m.name()}", m.r.randint(1, 180)
    tool = schema(m.pick(["set_reminder", "set_timer", "remind_me"]), "Set a reminder",
                  {"task": prop("string", "What to remember"), "minutes": prop("integer", "In how many minutes")})  # fmt: skip
    request = m.pick([f"Remind me to {task} in {minutes} minutes.", f"In {minutes} minutes, remind me to {task}."])
    return (
        tool,
        request,
        {"task": task, "minutes": minutes},
        {"status": "ok"},
        f"I will remind you in {minutes} minutes.",
    )


def convert(m):
    amount, (a, b) = m.r.randint(1, 5000), m.r.sample(["USD", "EUR", "GBP", "JPY", "CHF", "SEK", "CAD"], 2)
    tool = schema(m.pick(["convert_currency", "exchange"]), "Convert an amount between currencies",
                  {"amount": prop("number", "The amount"), "from": prop("string", "Currency code"),
                   "to": prop("string", "Currency code")})  # fmt: skip
    request = m.pick([f"Convert {amount} {a} to {b}.", f"How much is {amount} {a} in {b}?"])
    result = m.r.randint(1, 9999)
    return tool, request, {"amount": amount, "from": a, "to": b}, {"result": result}, f"{amount} {a} is {result} {b}."


def switch(m):
    device, state, room = (
        m.pick(["light", "lamp", "heater", "fan", "radio"]),
        m.pick(["on", "off"]),
        m.pick(["kitchen", "bedroom", "garage", "office", "bathroom", "hall"]),
    )
    tool = schema(m.pick(["set_device", "control_device", "switch"]), "Switch a device on or off",
                  {"device": prop("string", "The device"), "room": prop("string", "The room"),
                   "state": prop("string", "on or off", enum=["on", "off"])})  # fmt: skip
    request = m.pick([f"Turn {state} the {device} in the {room}.", f"Switch the {device} in the {room} {state}."])
    return (
        tool,
        request,
        {"device": device, "room": room, "state": state},
        {"status": "ok"},
        f"The {device} in the {room} is now {state}.",
    )


def read_file(m):
    path = f"{m.word()}/{m.word()}.{m.pick(['txt', 'py', 'md', 'json', 'csv'])}"
    key, text = m.pick(["path", "file", "filename"]), f"{m.word()} {m.value()}"
    tool = schema(m.pick(["read_file", "open_file", "cat"]), "Read a file", {key: prop("string", "Path of the file")})
    request = m.pick([f"Read the file {path}.", f"What is in {path}?", f"Show me {path}."])
    return tool, request, {key: path}, {"content": text}, f"The file {path} contains: {text}"


VERBS = "create update delete open close start stop book order print load copy move rename lock archive".split()


def invented(m):
    """A tool with a made-up purpose, so that the model reads the schema instead of knowing it."""
    verb, noun = m.pick(VERBS), m.pick([m.word(), m.pick(OBJECTS), m.pseudo()])
    style = m.r.randrange(3)
    name = [f"{verb}_{noun}", f"{verb}{noun.capitalize()}", f"{noun}_{verb}"][style]
    properties, arguments, wishes = {}, {}, []
    for _ in range(m.r.randint(1, 3)):
        key = m.pick([m.word(), m.pick(["name", "id", "size", "color", "owner", "date", "count", "label", "target"])])
        if key in properties or key == noun:
            continue
        kind = m.pick(["string", "string", "integer", "boolean"])
        value = {"string": lambda: m.pick([m.word(), m.value(), m.name(), m.city()]),
                 "integer": lambda: m.r.randint(0, 9999), "boolean": lambda: m.chance(0.5)}[kind]()  # fmt: skip
        properties[key] = prop(kind, m.pick([f"The {key}", f"The {key} of the {noun}", key]))
        arguments[key] = value
        shown = ("true" if value else "false") if kind == "boolean" else value
        wishes.append(m.pick([f"{key} {shown}", f"the {key} {shown}", f"{key} set to {shown}", f"{key} = {shown}"]))
    if not properties:
        return invented(m)
    tool = schema(
        name, m.pick([f"{verb.capitalize()} {article(noun)}", f"{verb.capitalize()}s the {noun}"]), properties
    )
    request = m.pick([f"Please {verb} the {noun} with {' and '.join(wishes)}.",
                      f"{verb.capitalize()} {article(noun)} with {', '.join(wishes)}."])  # fmt: skip
    number = m.value()
    return tool, request, arguments, {"status": "ok", "id": number}, f"Done. The id is {number}."


KNOWN_TOOLS = [weather, weather, calendar, search, calculator, message, reminder, convert, switch, read_file]


def tool_call(m):
    """One request among several tools; sometimes two calls, sometimes none, usually with the result turn."""
    makers = [m.pick(KNOWN_TOOLS) if m.chance(0.5) else invented for _ in range(m.r.randint(1, 5))]
    drawn = {}
    for maker in makers:
        case = maker(m)
        drawn.setdefault(case[0]["function"]["name"], (maker, case))
    tools = [case[0] for _, case in drawn.values()]
    maker, (tool, request, arguments, result, final) = m.pick(list(drawn.values()))
    name = tool["function"]["name"]
    messages = []
    if m.chance(0.2):
        messages += distractor(m)
    if m.chance(0.15):  # no tool needed
        extra = m.pick([small_talk_no_data, fact, arithmetic_small, text_operation])(m)
        messages += [x for x in extra[0] if x["role"] != "system"]
        return with_system(m, messages), tools, {"kind": "no_tool", "value": messages[-1]["content"]}
    if m.chance(0.25):
        request = m.pick(["Please do this: ", "Can you help me? ", "Hi. ", "I need your help. "]) + request
    calls, results = [{"name": name, "arguments": arguments}], [result]
    if maker is weather and m.chance(0.25) and "unit" not in arguments:  # two calls at once
        other, key = m.city(), next(iter(arguments))
        if other != arguments[key]:
            request = f"What is the weather in {arguments[key]} and in {other}?"
            calls.append({"name": name, "arguments": {key: other}})
            results.append({"temperature": m.r.randint(-10, 38), "condition": "sunny"})
            final = " ".join(f"It is {r['temperature']} degrees and {r['condition']} in {c['arguments'][key]}."
                             for c, r in zip(calls, results, strict=True))  # fmt: skip
    messages += [user(request), {"role": "assistant", "content": "", "tool_calls": calls}]
    check = {"kind": "tool", "value": calls}
    if m.split == "train" and m.chance(0.7):
        messages += [{"role": "tool", "content": json.dumps(r)} for r in results] + [says(final)]
        if m.chance(0.25):  # a follow-up request for the same tool
            again = maker(m)
            if again[0]["function"]["name"] == name and list(again[2]) == list(arguments):
                messages += [user(again[1]), {"role": "assistant", "content": "",
                                              "tool_calls": [{"name": name, "arguments": again[2]}]}]  # fmt: skip
    return with_system(m, messages), tools, check


def tool_result(m):
    """The answer after a tool result (held-out counterpart of the second half of tool_call)."""
    tool, request, arguments, result, final = m.pick(KNOWN_TOOLS)(m)
    call = {"name": tool["function"]["name"], "arguments": arguments}
    messages = [user(request), {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": json.dumps(result)}, says(final)]  # fmt: skip
    return with_system(m, messages), [tool], exact(final)


def small_talk_no_data(m):
    questions, answer = m.pick(IDENTITY + [(q, a[0]) for q, a in GREETINGS])
    return [user(m.pick(questions)), says(answer)], None, exact(answer)


def arithmetic_small(m):
    a, b = m.r.randint(0, 12), m.r.randint(0, 12)
    return [user(f"What is {a} plus {b}?"), says(f"{a} + {b} = {a + b}.")], None, exact(f"{a} + {b} = {a + b}.")


def speech(m):
    """Follow a simple instruction about form given in the system prompt or the request."""
    rule, change = m.pick(SPEECH)
    word = m.pick([m.word(), m.name(), m.pseudo()])
    question, answer = m.pick([(f"Say the word {word}.", word), (f"Repeat: {word}", word), (f"What comes after Monday? ", "Tuesday")])  # fmt: skip
    answer = change(answer)
    return [{"role": "system", "content": rule}, user(question.strip()), says(answer)], None, exact(answer)


# (task, weight): how often each short task is drawn
SHORT_TASKS = [(docstring, 22), (grounded, 5), (fact, 9), (small_talk, 8), (story, 6), (arithmetic, 10),
               (text_operation, 11), (memory, 16), (json_answer, 8), (tool_call, 18), (tool_result, 3), (speech, 2), (copying, 10)]  # fmt: skip
