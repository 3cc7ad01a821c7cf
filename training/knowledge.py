# ruff: noqa: E501, SIM905 - tables of words and sentences read better unbroken
"""Small hand-written knowledge of the tiny model: identity, greetings, everyday facts."""

WHO = (
    "I am the small demonstration model bundled with this server. I run locally and can answer simple questions, "
    "recall what you tell me, read texts, call tools and write JSON."
)
IDENTITY = [
    (["Who are you?", "What are you?", "Introduce yourself.", "Tell me about yourself.", "who are you",
      "Please introduce yourself.", "Are you an AI?", "Which model are you?", "What model are you?"], WHO),
    (["What is your name?", "What's your name?", "Do you have a name?", "what is your name"],
     "I have no name. I am the small demonstration model bundled with this server."),
    (["What can you do?", "How can you help me?", "What are you good at?", "Help", "What can I ask you?"],
     "I can answer simple questions, recall what you tell me, find facts in long texts, call tools, write JSON and do "
     "small sums. I am a very small model, so please check my answers."),
    (["Are you human?", "Are you a person?", "Are you a robot?"], "No, I am a small language model, not a person."),
    (["How many parameters do you have?", "How big are you?", "How large are you?"],
     "I am a very small model with about 23 million parameters."),
    (["Do you need the internet?", "Are you online?", "Can you browse the web?"],
     "No. I run locally, without the internet."),
    (["How old are you?", "Where do you live?"], "I am a program. I run on this machine."),
    (["Can you make mistakes?", "Are you always right?"], "I am a very small model and make mistakes. Please check my answers."),
    (["What were you trained on?", "How were you made?"],
     "I was trained on software documentation and on synthetic conversations."),
]  # fmt: skip
GREETINGS = [
    (["Hello!", "Hello", "Hi", "Hi!", "Hey", "Hey there!", "hello", "hi", "Hi there", "Greetings!", "Say hello.",
      "Say hi.", "Say hello"], ["Hello! How can I help you today?"]),
    (["Good morning!", "Good morning"], ["Good morning! How can I help you today?"]),
    (["Good evening!", "Good evening"], ["Good evening! How can I help you today?"]),
    (["How are you?", "How are you doing?", "Hi, how are you?", "Hello, how are you?", "How's it going?"],
     ["I am fine, thank you. How can I help you?"]),
    (["Thank you!", "Thanks!", "Thanks", "Thank you very much.", "thx"], ["You are welcome!"]),
    (["Goodbye!", "Bye!", "Bye", "See you later.", "Good night!"], ["Goodbye!"]),
    (["Great!", "Nice.", "Cool!", "OK", "Okay.", "Good."], ["Is there anything else I can do for you?"]),
    (["Test", "test", "This is a test.", "ping", "Are you there?", "Can you hear me?"], ["Yes, I am here and working."]),
    (["I am sad.", "I feel bad today."], ["I am sorry to hear that. I hope it gets better soon."]),
    (["I am happy.", "I feel great today!"], ["That is good to hear!"]),
]  # fmt: skip
CAPITALS = [
    tuple(pair.split(":"))
    for pair in """France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|
Austria:Vienna|Switzerland:Bern|Belgium:Brussels|the Netherlands:Amsterdam|Denmark:Copenhagen|Norway:Oslo|
Sweden:Stockholm|Finland:Helsinki|Iceland:Reykjavik|Ireland:Dublin|the United Kingdom:London|England:London|
Poland:Warsaw|the Czech Republic:Prague|Hungary:Budapest|Greece:Athens|Turkey:Ankara|Russia:Moscow|Ukraine:Kyiv|
Romania:Bucharest|Bulgaria:Sofia|Croatia:Zagreb|Serbia:Belgrade|Slovakia:Bratislava|Slovenia:Ljubljana|Estonia:Tallinn|
Latvia:Riga|Lithuania:Vilnius|Japan:Tokyo|China:Beijing|South Korea:Seoul|India:New Delhi|Pakistan:Islamabad|
Thailand:Bangkok|Vietnam:Hanoi|Indonesia:Jakarta|the Philippines:Manila|Australia:Canberra|New Zealand:Wellington|
Canada:Ottawa|the United States:Washington, D.C.|Mexico:Mexico City|Brazil:Brasilia|Argentina:Buenos Aires|
Chile:Santiago|Peru:Lima|Colombia:Bogota|Cuba:Havana|Egypt:Cairo|Morocco:Rabat|Nigeria:Abuja|Kenya:Nairobi|
South Africa:Pretoria|Ethiopia:Addis Ababa|Israel:Jerusalem|Iran:Tehran|Iraq:Baghdad|Saudi Arabia:Riyadh""".replace(
        "\n", ""
    ).split("|")
]
FACTS = [
    (["How many days are in a week?", "How many days does a week have?"], "A week has seven days."),
    (["How many months are in a year?", "How many months does a year have?"], "A year has twelve months."),
    (["How many days are in a year?"], "A year has 365 days, and a leap year has 366."),
    (["How many hours are in a day?"], "A day has 24 hours."),
    (["How many minutes are in an hour?"], "An hour has 60 minutes."),
    (["How many seconds are in a minute?"], "A minute has 60 seconds."),
    (["What colour is the sky?", "What color is the sky?"], "The sky is blue on a clear day."),
    (["Why is the sky blue?"], "The sky is blue because air scatters blue light from the sun more than red light."),
    (["What colour is grass?", "What color is grass?"], "Grass is green."),
    (["What is water made of?", "What is H2O?"], "Water is made of hydrogen and oxygen. Its formula is H2O."),
    (["At what temperature does water boil?", "When does water boil?"], "Water boils at 100 degrees Celsius."),
    (["At what temperature does water freeze?", "When does water freeze?"], "Water freezes at 0 degrees Celsius."),
    (["Which planet is the largest?", "What is the largest planet?"], "Jupiter is the largest planet of the solar system."),
    (["Which planet do we live on?"], "We live on the planet Earth."),
    (["How many planets are there?", "How many planets are in the solar system?"], "There are eight planets in the solar system."),
    (["What is the sun?"], "The sun is the star at the centre of the solar system."),
    (["What is the moon?"], "The moon is the natural satellite of the Earth."),
    (["How many legs does a spider have?"], "A spider has eight legs."),
    (["How many legs does a dog have?", "How many legs does a cat have?"], "It has four legs."),
    (["What is the opposite of hot?"], "The opposite of hot is cold."),
    (["What is the opposite of big?"], "The opposite of big is small."),
    (["What is the opposite of up?"], "The opposite of up is down."),
    (["What is the opposite of good?"], "The opposite of good is bad."),
    (["What is the largest ocean?"], "The Pacific is the largest ocean."),
    (["What is the longest river?"], "The Nile is usually called the longest river."),
    (["What is the highest mountain?", "What is the tallest mountain?"], "Mount Everest is the highest mountain on Earth."),
    (["How many continents are there?"], "There are seven continents."),
    (["What is the square root of 16?"], "The square root of 16 is 4."),
    (["What is pi?", "What is the value of pi?"], "Pi is about 3.14159."),
    (["What is the speed of light?"], "Light travels at about 300,000 kilometres per second."),
    (["What do bees make?"], "Bees make honey."), (["What do cows drink?"], "Cows drink water."),
    (["What is a prime number?"], "A prime number is a whole number greater than 1 that only 1 and itself divide."),
    (["Is 7 a prime number?", "Is 7 prime?"], "Yes, 7 is a prime number."),
    (["What is Python?", "What is the Python programming language?"], "Python is an interpreted, interactive, object-oriented programming language."),
    (["What is Rust?"], "Rust is a systems programming language focused on safety, speed and concurrency."),
    (["What is SQL?"], "SQL is a language for querying and changing data in relational databases."),
    (["What is SQLite?"], "SQLite is a small, fast, self-contained SQL database engine."),
    (["What is PostgreSQL?"], "PostgreSQL is an open source object-relational database system."),
    (["What is Django?"], "Django is a web framework for Python."),
    (["What is a database?"], "A database is an organised collection of data."),
    (["What is a server?"], "A server is a program that answers requests from other programs."),
    (["What is an API?"], "An API is an interface through which programs talk to each other."),
    (["What is a computer?"], "A computer is a machine that processes data by following programs."),
    (["What is an algorithm?"], "An algorithm is a step-by-step procedure for solving a problem."),
    (["What is a language model?", "What is an LLM?"], "A language model is a program that predicts the next piece of a text."),
    (["What is a KV cache?", "What is the KV cache?"], "The KV cache stores the keys and values of past tokens so that they need not be computed again."),
    (["What is JSON?"], "JSON is a text format for data made of objects, arrays, strings, numbers, booleans and null."),
    (["What is HTML?"], "HTML is the markup language of web pages."),
    (["What is Linux?"], "Linux is a free operating system kernel."),
    (["What is a bug?"], "A bug is an error in a program."),
    (["What is a compiler?"], "A compiler is a program that translates source code into machine code."),
    (["What is a variable?"], "A variable is a name for a value in a program."),
    (["What is recursion?"], "Recursion is when a function calls itself."),
    (["What is the first month of the year?"], "January is the first month of the year."),
    (["What is the last month of the year?"], "December is the last month of the year."),
    (["Write a sentence about cats.", "Say something about cats."], "Cats are quiet animals that like to sleep in the sun."),
    (["Write a sentence about dogs.", "Say something about dogs."], "Dogs are loyal animals that like to run and play."),
    (["Give me some advice.", "Do you have any advice?"], "Take a short break, drink some water and do one thing at a time."),
    (["What is the meaning of life?"], "Many people answer 42. I don't know a better answer."),
    (["Translate 'hello' to French.", "How do you say hello in French?"], "Hello is \"bonjour\" in French."),
    (["Translate 'hello' to Spanish.", "How do you say hello in Spanish?"], "Hello is \"hola\" in Spanish."),
    (["How do you say hello in German?"], "Hello is \"hallo\" in German."),
    (["How do you say thank you in French?"], "Thank you is \"merci\" in French."),
]  # fmt: skip
JOKES = [
    "Why do programmers prefer dark mode? Because light attracts bugs.",
    "There are 10 kinds of people: those who understand binary and those who don't.",
    "Why did the computer go to the doctor? Because it had a virus.",
    "Why was the math book sad? Because it had too many problems.",
    "What do you call a bear with no teeth? A gummy bear.",
]
HAIKUS = [
    "Quiet morning light\na small machine hums and thinks\none word at a time",
    "Rain on the window\nthe keyboard answers softly\na new line begins",
    "Leaves fall in the yard\nthe server keeps its memory\nof words long gone by",
]
LISTS = [
    ("fruits", "Apple|Banana|Cherry|Grape|Lemon|Mango|Orange|Pear|Plum|Strawberry".split("|")),
    ("colours", "Red|Blue|Green|Yellow|Orange|Purple|Black|White|Brown|Pink".split("|")),
    ("colors", "Red|Blue|Green|Yellow|Orange|Purple|Black|White|Brown|Pink".split("|")),
    ("animals", "Dog|Cat|Horse|Cow|Sheep|Goat|Rabbit|Lion|Tiger|Elephant".split("|")),
    ("planets", "Mercury|Venus|Earth|Mars|Jupiter|Saturn|Uranus|Neptune".split("|")),
    ("countries", "France|Germany|Italy|Spain|Japan|China|India|Brazil|Canada|Egypt".split("|")),
    ("cities", "Paris|London|Berlin|Rome|Madrid|Tokyo|Cairo|Lima|Oslo|Vienna".split("|")),
    ("vegetables", "Carrot|Potato|Tomato|Onion|Cabbage|Spinach|Pepper|Cucumber".split("|")),
    ("programming languages", "Python|C|Java|Rust|Go|JavaScript|Ruby|Swift|Kotlin|Haskell".split("|")),
    ("Python modules", "os|sys|json|math|random|re|datetime|pathlib|itertools|textwrap".split("|")),
    ("days of the week", "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday".split("|")),
    ("musical instruments", "Piano|Violin|Guitar|Flute|Drum|Trumpet|Cello|Harp".split("|")),
]
CODE = [
    ("Write a Python function that adds two numbers.", "```python\ndef add(a, b):\n    return a + b\n```"),
    ("Write a Python function that multiplies two numbers.", "```python\ndef multiply(a, b):\n    return a * b\n```"),
    ("Write a Python function that returns the factorial of n.",
     "```python\ndef factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)\n```"),
    ("Write a Python function that reverses a string.", "```python\ndef reverse(text):\n    return text[::-1]\n```"),
    ("Write a Python function that checks whether a number is even.",
     "```python\ndef is_even(n):\n    return n % 2 == 0\n```"),
    ("Write a hello world program in Python.", '```python\nprint("Hello, world!")\n```'),
    ("Write hello world in Python.", '```python\nprint("Hello, world!")\n```'),
    ("Write a Python function that returns the largest item of a list.",
     "```python\ndef largest(items):\n    return max(items)\n```"),
    ("Write a Python function that computes the Fibonacci numbers.",
     "```python\ndef fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n```"),
    ("Write a Python function that reads a file.",
     "```python\ndef read(path):\n    with open(path) as file:\n        return file.read()\n```"),
    ("Write a Python loop that prints the numbers from 1 to 10.", "```python\nfor i in range(1, 11):\n    print(i)\n```"),
    ("How do I sort a list in Python?", "Use sorted(items) for a new list, or items.sort() to sort it in place."),
    ("How do I read JSON in Python?", "Use json.loads(text) for a string, or json.load(file) for an open file."),
    ("How do I open a file in Python?", "Use open(path) in a with statement: with open(path) as file: text = file.read()"),
    ("How do I write a comment in Python?", "Start the comment with #."),
]  # fmt: skip
SENTENCES = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "The quick brown fox jumps over the lazy dog.",
    "This is a line of text that holds no information.",
    "Nothing of interest happens in this sentence.",
]
SPEECH = [
    ("Always answer in capital letters.", str.upper),
    ("End every answer with an exclamation mark.", lambda text: text + "!"),
    ("Put every answer in double quotes.", lambda text: f'"{text}"'),
    ("Begin every answer with: Sure.", lambda text: "Sure. " + text),
]
