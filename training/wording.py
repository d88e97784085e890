"""How questions are worded and what the fixed answers say.

`QUESTIONS[kind]` holds phrasings with {k} (the asked name), {d} (a second name) and, in those of `IN_FILE`, {f} (a
path). For: training/archive.py and training/evaluate.py.
"""

NOT_FOUND = "{k} is not in these files."
WHERE = "{k} is defined in `{f}`."

_VALUE = [
    "What is the value of {k}?",
    "What is {k}?",
    "what is {k} set to?",
    "What value does {k} have?",
    "Give me the value of {k}.",
    "Find the value of {k}.",
    "{k}?",
    "How is {k} set?",
    "Look up {k}.",
    "Tell me the value of {k}",
    "What is the constant {k} equal to?",
    "Which value is assigned to {k}?",
    "Please show the value of {k}.",
    "What does {k} equal?",
    "What is the setting {k}?",
    "Show me {k}.",
    "what's the value of {k}",
    "I need the value of {k}.",
    "What is configured for {k}?",
    "Read out {k}.",
]
QUESTIONS = {
    "value": _VALUE,
    "key": [
        *_VALUE,
        "What is the value of the key {k}?",
        "What is the setting of {k} in the configuration?",
        "To what is the option {k} set?",
        "What does the configuration say for {k}?",
    ],
    "def": [
        "What is the signature of {k}?",
        "Show the signature of {k}.",
        "What parameters does {k} take?",
        "What arguments does {k} take?",
        "How is the function {k} declared?",
        "Show the definition line of {k}.",
        "What are the parameters of {k}()?",
        "Which arguments does the function {k} accept?",
        "How do I call {k}?",
        "Give me the declaration of {k}.",
    ],
    "class": [
        "What is the base class of {k}?",
        "What does the class {k} inherit from?",
        "Show the class line of {k}.",
        "How is the class {k} declared?",
        "Which class does {k} extend?",
        "What is the parent of {k}?",
        "Which bases does {k} have?",
    ],
    "import": [
        "What is imported from {k}?",
        "Which names are imported from {k}?",
        "What do the files import from {k}?",
        "Show the import from {k}.",
        "Which import uses {k}?",
    ],
    "default": [
        "What is the default of {d} in {k}?",
        "What is the default value of {d} in {k}()?",
        "What does {d} default to in {k}?",
        "Default value of the argument {d} of {k}?",
        "In {k}, what is the default for {d}?",
        "If I do not pass {d} to {k}, what is used?",
    ],
    "return": [
        "What does {k} return?",
        "What does the function {k} return?",
        "What is returned by {k}?",
        "Show the return of {k}.",
        "What is the return value of {k}()?",
    ],
    "doc": [
        "What does the docstring of {k} say?",
        "What does {k} do?",
        "Describe {k}.",
        "What is {k} for?",
        "What is the docstring of {k}?",
        "How is {k} documented?",
        "What is the purpose of {k}?",
    ],
    "where": [
        "Which file defines {k}?",
        "Where is {k} defined?",
        "In which file is {k}?",
        "Which file contains {k}?",
        "Where can I find {k}?",
        "What file is {k} in?",
        "Which module defines {k}?",
    ],
    "begins": [
        "Show the line that begins with {k}",
        "Which line begins with {k}",
        "Complete the line that starts with {k}",
        "Quote the line starting with {k}",
    ],
    "fact": [
        "What is the {k}?",
        "what's the {k}?",
        "Tell me the {k}.",
        "Do you know the {k}?",
        "Please give me the {k}.",
        "The {k}?",
        "Find the {k}.",
        "What do the files say about the {k}?",
    ],
}
IN_FILE = {
    "value": [
        "What is the value of {k} in {f}?",
        "What is {k} in {f}?",
        "In {f}, what is {k} set to?",
        "Give me {k} from {f}.",
        "What does {f} set {k} to?",
        "Value of {k} in {f}?",
        "In the file {f}, what is the value of {k}?",
        "Look up {k} in {f}.",
    ],
    "def": ["What is the signature of {k} in {f}?", "What parameters does {k} in {f} take?"],
    "class": ["What is the base class of {k} in {f}?"],
    "return": ["What does {k} in {f} return?", "In {f}, what does {k} return?"],
    "doc": ["What does the docstring of {k} in {f} say?", "What does {k} in {f} do?"],
    "import": ["What does {f} import from {k}?"],
}
IN_FILE["key"] = IN_FILE["value"]

SYSTEM_TEXTS = ["You are a helpful assistant.", "Answer briefly.", "You answer questions about files.", "Be exact."]

LIMITS = "I can only look up names, values and lines in the files."
CHAT = [
    (["Hello", "Hi", "hello!", "Hi there", "Hey", "Good morning", "hi"], "Hello! Ask me about a name in the files."),
    (["Thanks", "Thank you", "thanks!", "Thank you very much", "ok thanks"], "You are welcome."),
    (
        ["Who are you?", "What are you?", "what is your name?", "Which model are you?", "Are you an AI?"],
        "I am the small model built into salalocal. " + LIMITS,
    ),
    (["What can you do?", "Help", "How can you help me?", "what can I ask?", "help me"], LIMITS),
    (
        [
            "Summarise the files.",
            "Summarize this project",
            "Explain the code.",
            "Write a function that sorts a list.",
            "Fix the bug.",
            "Is this code good?",
            "Write a test for this.",
            "Refactor the main module.",
            "Tell me a joke.",
            "Translate this into French.",
            "What is the meaning of life?",
            "How does the program work?",
            "Explain the architecture",
            "Review this code",
            "Write documentation for this project.",
        ],
        LIMITS,
    ),
    (["Goodbye", "Bye", "bye!", "See you"], "Goodbye."),
]

FOUND = "{k} is in these files."
KEY = [
    *_VALUE,
    "What is the {k}?",
    "what is the {k}",
    "What's the {k} set to?",
    "What is the value of the {k}?",
    "What is the value of the setting {k}?",
    "Which {k} is configured?",
    "What is the key {k} set to?",
    "Tell me the {k}.",
    "What is the {k} here?",
]
KEY_IN_FILE = [
    *IN_FILE["value"],
    "What is the {k} in {f}?",
    "What's the {k} in {f}?",
    "What is the value of the {k} in {f}?",
    "Which {k} does {f} set?",
    "What is the key {k} in {f}?",
    "What is the value of the key {k} in the file {f}?",
    "What does {f} say about {k}?",
    "In {f}, what is the {k}?",
]
# What a line says before its name, the word in front of the name, and what stands behind it up to the value.
SENTENCES = [
    ("The {n}", "for", " is"),
    ("The {n}", "for", " is"),
    ("The {n}", "of", " is"),
    ("One of the {n}s", "for", " is:"),
    ("One of the {n}s", "for", " is"),
    ("One of the {n}s", "of", " is:"),
    ("Among the {n}s", "for", ":"),
    ("Remember that the {n}", "for", " is"),
    ("Note the {n}", "for", ":"),
    ("As agreed, the {n}", "of", " will be"),
]
TOPIC = [
    "What is the {t}?",
    "What is the {t} mentioned in the documents?",
    "What is the {t} mentioned in the text?",
    "What is the {t} in the files?",
    "what's the {t}",
    "Tell me the {t}.",
    "Find the {t} in the documents.",
    "I need the {t}.",
    "Do you know the {t}?",
    "Give me the {t} that the files mention.",
    "Look up the {t}.",
]
ALL_OF_TOPIC = [
    "What are all the {t} mentioned in the documents?",
    "What are all the {t}?",
    "What are the {t}?",
    "List all {t}.",
    "List the {t} in the files.",
    "Name all the {t} mentioned in the text.",
    "Which {t} are there?",
]
ALL_OF_NAMES = [
    "What are the values of {t}?",
    "What are {t} set to?",
    "Give me the values of {t}.",
    "List the values of {t}.",
    "Look up {t}.",
    "Which values do {t} have?",
]
NUMBERS = ["none", "One", "Two", "Three", "Four", "Five"]
TRACE_ALL = [
    "Which variables have the value {v}, directly or through other variables? {n} do; name all of them.",
    "Which names have the value {v}, directly or through other names?",
    "Find all variables that are equal to {v}.",
    "Name every variable that ends up with the value {v}.",
    "Which variables hold {v} in the end?",
]
TRACE_END = [
    "What is the value of {k} in the end?",
    "Follow {k} to its value.",
    "Through other names, what is the value of {k}?",
    "What does {k} end up as?",
    "Trace {k}.",
    "Which value does {k} have, through other variables?",
]
TRACE_NEXT = [
    "Which variable is set to {v}?",
    "Which name has the value {v}?",
    "What is set to {v}?",
    "Who has the value {v}?",
    "Which key is equal to {v}?",
]
LINE_FROM = [
    *QUESTIONS["begins"],
    "Quote the line that begins with: {k}",
    "Quote the line that begins with {k}",
    "How does the line go on that begins with: {k}",
    "Write out the line that starts with: {k}",
    'Which line starts with "{k}"?',
]
LINE_WITH = [
    "Quote the line that contains: {k}",
    "Show the line with {k}",
    "Which line contains {k}",
    'Quote the line with "{k}" in it.',
    "Find the line that says {k}",
]
EXISTS = [
    "Is {k} in these files?",
    "Do the files mention {k}?",
    "Does {k} exist?",
    "Is there a {k}?",
    "Is {k} defined anywhere?",
    "Can you find {k} in the files?",
]
ECHO = ["Repeat: {k}", "Say: {k}", "Repeat these words: {k}", 'Write "{k}".', "Copy this: {k}"]

FORMS = ["poem", "riddle", "letter", "story", "report", "speech", "fable", "song", "recipe", "review", "note", "tale"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
REQUEST = "Write a {f} about {t}."
REPEAT = [
    'Repeat the {n} {f} about {t} that you wrote, word for word, with "{o}" in front of it. Write nothing else.',
    'Repeat the {n} {f} about {t} with "{o}" in front.',
    'Write "{o}" and then the {n} {f} about {t} again.',
    'Give me the {n} {f} about {t} once more, after "{o}".',
]
