"""The small world that the sample is trained on: people, six things to know about each, and talk about them.

Everything a document says is drawn anew for each example, so nothing can be learnt by heart: an answer has to be
looked up in the prompt. The split is by construction. A pair of person and value (Ada, Tarn) belongs to the held-out
side or to the training side for good, and an example is built from pairs of one side only.

No torch, no transformers: tests import this file for examples and for `is_right`.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass, field


def words(text: str) -> list[str]:
    return text.split()


SHE = words("""Ada Beth Cleo Dora Edith Freya Greta Hanna Ida Jana Kira Lena Maud Nora Olga Petra
Rosa Sara Tilda Ulla Vera Wanda Yara Zoe Alma Berta Carla Dina Ella Flora Gita Hilda""")
HE = words("""Adam Boris Carl David Emil Felix Georg Hugo Ivan Jonas Karl Leo Max Nils Oskar Paul
Ralf Simon Tom Udo Victor Willi Yusuf Zeno Anton Bruno Conrad Dirk Erik Frank Gustav Henry""")
PEOPLE = SHE + HE

TOWNS = words("""Tarn Belmont Corwick Dunmore Eastvale Farnley Glenby Harrow Ilford Kelso Lorne Marsden
Norwick Oakham Penrith Quorn Ripley Selby Thorpe Upton Verwood Wexley Yarm Alford""")
JOBS = words("""baker barber butcher cook dentist doctor driver farmer gardener hunter judge lawyer
miller nurse painter pilot plumber sailor singer smith tailor teacher waiter writer""")
ANIMALS = words("""bear bird camel cat cow dog donkey dove duck fish fox frog
goat goose hare horse lamb mouse parrot pig rabbit sheep snake swan""")
COLOURS = words("""amber azure beige black blue bronze brown coral crimson cyan gold green
grey ivory lilac mauve olive orange pink purple red silver violet white""")
FOODS = words("""apples beans bread butter cakes carrots cheese cherries corn dates figs grapes
honey lemons lentils melons noodles nuts pasta peaches pears plums rice soup""")
INSTRUMENTS = words("""banjo bassoon bells bugle cello clarinet cornet drums fiddle flute gong guitar
harp horn lute lyre mandolin piano pipes sitar tabla trumpet tuba viola""")

UNKNOWN = "I do not know."
TASKS = ("answer", "answerability", "query_rewrite", "hallucination_detection", "citations")

REWRITE_TAG = "<rewrite>"
INSTRUCTIONS = {  # as in the io.yaml of each adapter: the user message that the client appends
    "query_rewrite": f"{REWRITE_TAG} Write the last question so that it stands alone.",
    "hallucination_detection": "Check each sentence of the last answer.",
    "citations": "Cite the documents for each sentence of the last answer.",
}


@dataclass(frozen=True)
class Relation:
    """One thing to know about a person. `statements[0]` is the form in which the model answers."""

    values: list[str]
    statements: tuple[str, str]
    questions: tuple[str, str]  # {p} is the person, {d} "does", {g} the possessive


RELATIONS = {
    "town": Relation(
        TOWNS,
        ("{p} lives in {v}.", "The home of {p} is {v}."),
        ("Where does {p} live?", "Which town is the home of {p}?"),
    ),
    "job": Relation(
        JOBS,
        ("{p} works as a {v}.", "The job of {p} is {v}."),
        ("What does {p} work as?", "What is the job of {p}?"),
    ),
    "animal": Relation(
        ANIMALS,
        ("{p} has a {v}.", "The animal of {p} is a {v}."),
        ("Which animal does {p} have?", "What is the animal of {p}?"),
    ),
    "colour": Relation(
        COLOURS,
        ("{p} likes {v}.", "The colour of {p} is {v}."),
        ("Which colour does {p} like?", "What is the colour of {p}?"),
    ),
    "food": Relation(
        FOODS,
        ("{p} eats {v}.", "The food of {p} is {v}."),
        ("What does {p} eat?", "What is the food of {p}?"),
    ),
    "instrument": Relation(
        INSTRUMENTS,
        ("{p} plays the {v}.", "The instrument of {p} is the {v}."),
        ("What does {p} play?", "What is the instrument of {p}?"),
    ),
}
KEYS = [(person, relation) for person in PEOPLE for relation in RELATIONS]


@dataclass(frozen=True)
class Fact:
    person: str
    relation: str
    value: str

    def text(self, form: int = 0) -> str:
        return RELATIONS[self.relation].statements[form].format(p=self.person, v=self.value)


@dataclass(frozen=True)
class Example:
    """A prompt (messages that end with the user, and documents) and the text that a right model writes next."""

    task: str
    messages: list[dict]
    documents: list[dict]
    expected: str


def is_held_out(person: str, value: str) -> bool:
    """Whether this pair is for evaluation only; about a third of all pairs are."""
    return zlib.crc32(f"{person} {value}".encode()) % 3 == 0


def is_right(example: Example, text: str) -> bool:
    """Whether `text` is the expected answer; JSON is compared as data, so spaces do not count."""
    if example.task == "answer":
        return text.strip() == example.expected
    try:
        return json.loads(text) == json.loads(example.expected)
    except ValueError:
        return False


def examples(task: str, count: int, seed: int = 0, held_out: bool = True) -> list[Example]:
    """`count` examples of a task, the same ones for the same arguments."""
    maker = Maker(random.Random(f"{task} {seed} {held_out}"), held_out)
    return [maker.example(task) for _ in range(count)]


@dataclass
class Maker:
    """Draws examples from one side of the split. `size` from 0 to 1 is how large the documents may be."""

    rng: random.Random
    held_out: bool = False
    size: float = 1.0
    _values: dict[tuple[str, str], list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self._values = {(p, r): [v for v in RELATIONS[r].values if is_held_out(p, v) == self.held_out] for p, r in KEYS}

    def example(self, task: str) -> Example:
        return getattr(self, "_" + task)()

    def conversation(self) -> Example:
        """A long talk for the base model: several questions about one set of documents, or no documents at all."""
        talk = self._talk(tags=self.rng.random() < 0.15, turns=self.rng.randint(2, 6), final=True)
        return Example("answer", talk.messages[:-1], talk.documents, talk.messages[-1]["content"])

    def repeat(self) -> Example:
        """Say something again: how the base learns to write the words of its adapters' answers, and nothing of why."""
        text = self.example(self.rng.choice(TASKS)).expected
        return Example("repeat", [{"role": "user", "content": f"Repeat: {text}"}], [], text)

    def _answer(self) -> Example:
        talk = self._talk(turns=self.rng.choice((0, 0, 1, 2)))
        person, relation = talk.ask()
        return Example("answer", talk.messages, talk.documents, talk.answer(person, relation))

    def _answerability(self) -> Example:
        talk = self._talk(turns=self.rng.choice((0, 0, 1, 2)), documents_only=True)
        key = talk.ask(known=self.rng.random() < 0.5)
        label = "answerable" if key in talk.facts else "unanswerable"
        return Example("answerability", talk.messages, talk.documents, json.dumps({"answerability": label}))

    def _query_rewrite(self) -> Example:
        talk = self._talk(turns=self.rng.choice((1, 1, 2, 3)))
        person, relation = talk.ask(plain=0.15)
        talk.say("user", INSTRUCTIONS["query_rewrite"])
        expected = json.dumps({"rewritten_question": talk.question(person, relation)})
        return Example("query_rewrite", talk.messages, talk.documents, expected)

    def _hallucination_detection(self) -> Example:
        talk = self._talk(turns=self.rng.choice((0, 0, 1)), documents_only=True)
        talk.ask(known=True)
        sentences, verdicts = [], []
        for key in talk.some_keys(self.rng.randint(1, 2)):
            fact, kind = talk.claim(key)
            sentences.append(fact.text())
            label = "faithful" if kind == "stated" else "hallucinated"
            verdicts.append({"r": len(verdicts), "f": label, "e": kind})
        talk.say("assistant", tagged(sentences, "r"))
        talk.say("user", INSTRUCTIONS["hallucination_detection"])
        return Example("hallucination_detection", talk.messages, talk.documents, json.dumps(verdicts))

    def _citations(self) -> Example:
        talk = self._talk(turns=self.rng.choice((0, 0, 1)), tags=True, documents_only=True)
        first = talk.ask(known=True)
        others = [key for key in talk.facts if key != first]
        keys = [first, *self.rng.sample(others, min(len(others), self.rng.randint(0, 1)))]
        talk.say("assistant", tagged([talk.facts[key].text() for key in keys], "r"))
        talk.say("user", INSTRUCTIONS["citations"])
        cited = [{"r": i, "c": [n for n, k in enumerate(talk.sources) if k == key]} for i, key in enumerate(keys)]
        return Example("citations", talk.messages, talk.documents, json.dumps(cited))

    def _talk(self, turns: int, tags: bool = False, documents_only: bool = False, final: bool = False) -> Talk:
        talk = Talk(self.rng, self._values, self.size)
        if self.rng.random() < 0.1:
            talk.say("system", "You are a helpful guide.")
        if documents_only or self.rng.random() < 0.85:
            talk.add_documents(tags)
        for _ in range(turns + final):
            talk.turn(training=final)
        return talk


class Talk:
    """One conversation under way: what the documents (and the user) have said, and who was spoken of last."""

    def __init__(self, rng: random.Random, values: dict, size: float) -> None:
        self.rng, self.values, self.size = rng, values, size
        self.messages: list[dict] = []
        self.documents: list[dict] = []
        self.facts: dict[tuple[str, str], Fact] = {}
        self.sources: list[tuple[str, str]] = []  # the key stated by each sentence of the documents
        self.cast = rng.sample(PEOPLE, 2 + round(size * rng.random()))  # the people this talk is about
        self.last: tuple[str, str] | None = None  # the question before: what "she" and "what about" refer to
        self.form = 0  # which of the two ways of asking the question before used
        self.brief = False  # the question before was "What about Ada?"

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def add_documents(self, tags: bool) -> None:
        """One or two documents of one or two sentences, about one or more people."""
        count = self.rng.randint(1, 1 + round(self.size))
        for number in range(count):
            sentences = []
            for _ in range(self.rng.randint(1, 1 + round(self.size))):
                key = self.rng.choice(self.all_keys())
                sentences.append(self.learn(key).text(self.rng.randrange(2)))
                self.sources.append(key)
            text = tagged(sentences, "c", len(self.sources) - len(sentences)) if tags else " ".join(sentences)
            self.documents.append(self.dress(text, number))

    def dress(self, text: str, number: int) -> dict:
        """The shapes in which clients send a document: most often only its text."""
        shape = self.rng.random()
        if shape < 0.6:
            return {"text": text}
        if shape < 0.75:
            return {"doc_id": str(number), "text": text}
        if shape < 0.9:
            return {"text": text, "doc_id": str(number)}
        return {"doc_id": str(number), "title": "Note", "text": text}

    def learn(self, key: tuple[str, str]) -> Fact:
        if key not in self.facts:
            self.facts[key] = Fact(*key, self.rng.choice(self.values[key]))
        return self.facts[key]

    def turn(self, training: bool) -> None:
        """One exchange; in training also the turns that adapters leave behind in a conversation."""
        draw = self.rng.random()
        if draw < 0.05:
            self.say("user", "Hello.")
            self.say("assistant", "Hello! What do you want to know?")
        elif draw < 0.08:
            self.say("user", "Thank you.")
            self.say("assistant", "You are welcome.")
        elif draw < 0.5 and not self.documents:
            self.say("user", self.learn(self.rng.choice(self.all_keys())).text())
            self.say("assistant", "I see.")
        elif training and draw < 0.2:
            fact, kind = self.claim(self.some_keys(1)[0])
            self.say("user", f"Is it true that {fact.text()[:-1]}?")
            self.say("assistant", {"stated": "Yes.", "contradicted": "No.", "not stated": UNKNOWN}[kind])
            self.last = None
        else:
            key = self.ask()
            if self.rng.random() < 0.12:
                self.say("user", INSTRUCTIONS["query_rewrite"])
                self.say("assistant", json.dumps({"rewritten_question": self.question(*key)}))
                if self.rng.random() < 0.7:
                    self.say("user", self.question(*key))
            if self.rng.random() < 0.12:
                label = "answerable" if key in self.facts else "unanswerable"
                self.say("assistant", json.dumps({"answerability": label}))
            self.say("assistant", self.answer(*key))

    def ask(self, known: bool | None = None, plain: float = 0.25) -> tuple[str, str]:
        """The user asks; about what was said (`known`) or what was not. Returns what the question is about.

        With a question before it, it may lean on that: "Where does she live?", "What about Ada?"
        """
        if known is None:
            known = self.rng.random() < 0.75
        person, relation = key = self.pick(known and bool(self.facts))
        before, self.last = self.last, key
        lean = before is not None and self.rng.random() >= plain
        if lean and not self.brief and relation == before[1] and person != before[0]:
            self.brief = True
            self.say("user", self.rng.choice(("What about {p}?", "And {p}?")).format(p=person))
            return key
        self.brief = False
        self.form = self.rng.randrange(2)
        if lean and person == before[0]:
            self.say("user", self.question(person, relation, pronoun=True))
        else:
            self.say("user", self.question(person, relation))
        return key

    def pick(self, known: bool) -> tuple[str, str]:
        """A key that is known or not; more often than not the same person or the same relation as before."""
        keys = list(self.facts) if known else [k for k in self.all_keys() if k not in self.facts]
        if self.last is not None and self.rng.random() < 0.85:
            near = [k for k in keys if (k[0] == self.last[0]) != (k[1] == self.last[1])]
            keys = near or keys
        return self.rng.choice(keys)

    def all_keys(self) -> list[tuple[str, str]]:
        return [(person, relation) for person in self.cast for relation in RELATIONS]

    def some_keys(self, count: int) -> list[tuple[str, str]]:
        """Different keys, two thirds of them known."""
        chosen: list[tuple[str, str]] = []
        while len(chosen) < count:
            keys = list(self.facts) if self.facts and self.rng.random() < 0.67 else self.all_keys()
            key = self.rng.choice(keys)
            if key in chosen:
                key = self.rng.choice(self.all_keys())
            if key not in chosen:
                chosen.append(key)
        return chosen

    def claim(self, key: tuple[str, str]) -> tuple[Fact, str]:
        """A statement about `key`, true or not, and how it stands to what was said."""
        known = self.facts.get(key)
        if known is None:
            return Fact(*key, self.rng.choice(self.values[key])), "not stated"
        if self.rng.random() < 0.5:
            return known, "stated"
        return Fact(*key, self.rng.choice([v for v in self.values[key] if v != known.value])), "contradicted"

    def question(self, person: str, relation: str, pronoun: bool = False) -> str:
        text = RELATIONS[relation].questions[self.form]
        if not pronoun:
            return text.format(p=person)
        she = person in SHE
        if " of {p}" in text:  # "the job of {p}" is "her job"
            head, _ = text.split(" of {p}")
            return head.replace("the ", "her " if she else "his ") + "?"
        return text.format(p="she" if she else "he")

    def answer(self, person: str, relation: str) -> str:
        fact = self.facts.get((person, relation))
        return fact.text() if fact else UNKNOWN


def tagged(sentences: list[str], tag: str, first: int = 0) -> str:
    """Sentences with their numbers, as Mellea writes them for `sentence_boundaries`."""
    return " ".join(f"<{tag}{number}> {sentence}" for number, sentence in enumerate(sentences, first))
