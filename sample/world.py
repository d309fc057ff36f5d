"""The small world of the sample's training data: people, six facts about each, and conversations about them.

The facts in the documents are drawn at random for each example, so nothing can be memorised: answers must be looked up
in the prompt. The split holds by construction. Each pair of person and value (Ada, Tarn) always belongs to either the
held-out side or the training side, and an example uses pairs of one side only.

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
NOWHERE = "not stated"
TASKS = ("answer", "answerability", "query_rewrite", "hallucination_detection", "citations")

REWRITE_TAG = "<rewrite>"
INSTRUCTIONS = {  # the user message that clients append, as in each adapter's io.yaml
    "query_rewrite": f"{REWRITE_TAG} Write the last question so that it stands alone.",
    "hallucination_detection": "Check each sentence of the last answer.",
    "citations": "Quote the documents for each sentence of the last answer.",
}


@dataclass(frozen=True)
class Relation:
    """One kind of fact about a person. The model answers in the form of `statements[0]`."""

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
    """A prompt (documents, and messages ending with the user's) and the expected answer."""

    task: str
    messages: list[dict]
    documents: list[dict]
    expected: str


def is_held_out(person: str, value: str) -> bool:
    """Whether this pair is used for evaluation only, as about a third of all pairs are."""
    return zlib.crc32(f"{person} {value}".encode()) % 3 == 0


def is_right(example: Example, text: str) -> bool:
    """Whether `text` is the expected answer; JSON is compared as data, ignoring spaces."""
    if example.task == "answer":
        return text.strip() == example.expected
    try:
        return json.loads(text) == json.loads(example.expected)
    except ValueError:
        return False


def examples(task: str, count: int, seed: int = 0, held_out: bool = True) -> list[Example]:
    """`count` examples of a task; the same arguments give the same examples."""
    maker = Maker(random.Random(f"{task} {seed} {held_out}"), held_out)
    return [maker.example(task) for _ in range(count)]


@dataclass
class Maker:
    """Draws examples from one side of the split.

    `size`, from 0 to 1, limits the size of the documents. `dense` is the share of conversations about only two or three
    relations: their documents state the same relation for several people, so neither the person nor the relation alone
    identifies a fact.
    """

    rng: random.Random
    held_out: bool = False
    size: float = 1.0
    dense: float = 0.0
    _values: dict[tuple[str, str], list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self._values = {(p, r): [v for v in RELATIONS[r].values if is_held_out(p, v) == self.held_out] for p, r in KEYS}

    def example(self, task: str) -> Example:
        return getattr(self, "_" + task)()

    def conversation(self) -> Example:
        """A long conversation for the base: several questions about one set of documents, or without documents."""
        talk = self._talk(turns=self.rng.randint(2, 6), final=True)
        return talk.example()

    def drill(self) -> Example:
        """A conversation of hard cases: false claims, quotes, and the reference of "what about".

        The user asks here for what two of the adapters do unasked: in words, or in JSON by name.
        """
        talk = self._talk(turns=0, documents_only=True)
        talk.ask(known=True)
        talk.say("assistant", talk.answer(*talk.last))
        for _ in range(self.rng.randint(3, 5)):
            draw = self.rng.random()
            if draw < 0.08:
                talk.truth(false=0.65)
            elif draw < 0.15:
                talk.review(false=0.65)
            elif draw < 0.55:
                talk.check_all()
            elif draw < 0.95:
                talk.quote_all()
            else:
                key = talk.ask(plain=0.0)
                talk.say("assistant", talk.answer(*key))
        return talk.example()

    def facts(self) -> Example:
        """A short conversation about one fact in the documents and claims about it, which compare the two values."""
        talk = self._talk(turns=0, documents_only=True)
        for _ in range(self.rng.randint(1, 2)):
            talk.check_facts()
        return talk.example()

    def claims(self) -> Example:
        """A short conversation of claims (true, false, or about unknown facts) in all forms of asking."""
        talk = self._talk(turns=0, documents_only=True)
        for _ in range(self.rng.randint(1, 2)):
            draw = self.rng.random()
            if draw < 0.25:
                talk.truth()
            elif draw < 0.4:
                talk.review()
            else:
                talk.check_all()
        return talk.example()

    def match(self) -> Example:
        """Plain questions about all people and relations: is a fact stated for this person, or for another?"""
        if not round(self.size):
            return self.conversation()  # one-sentence documents contain nothing to confuse
        talk = self._talk(turns=0, documents_only=True)
        while len(talk.facts) < 2:
            talk = self._talk(turns=0, documents_only=True)
        near = dict.fromkeys(r for _, r in talk.facts)  # ordered, so that a seed gives the same conversation
        keys = [(p, r) for p in talk.cast for r in near]
        for key in self.rng.sample(keys, min(7, len(keys))):
            talk.form = self.rng.randrange(2)
            talk.say("user", talk.question(*key))
            talk.say("assistant", talk.answer(*key))
        return talk.example()

    def repeat(self) -> Example:
        """Repeat a text. The base learns to write the words of its adapters' answers, not when to write them."""
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
        claims = talk.state([talk.claim(key) for key in talk.some_keys(self.rng.randint(1, 2))], ask=False)
        talk.say("user", INSTRUCTIONS["hallucination_detection"])
        verdicts = talk.verdicts(claims)
        return Example("hallucination_detection", talk.messages, talk.documents, json.dumps(verdicts))

    def _citations(self) -> Example:
        talk = self._talk(turns=self.rng.choice((0, 0, 1)), documents_only=True)
        keys = [talk.ask(known=True)]
        if self.rng.random() < 0.5:
            known = self.rng.random() < 0.6
            others = [key for key in (talk.facts if known else talk.all_keys()) if key not in talk.facts or known]
            keys += self.rng.sample([key for key in others if key != keys[0]], min(1, len(others) - known))
        talk.state([talk.facts.get(key) or talk.claim(key) for key in keys], ask=False)
        talk.say("user", INSTRUCTIONS["citations"])
        cited = talk.cited(keys)
        return Example("citations", talk.messages, talk.documents, json.dumps(cited))

    def _talk(self, turns: int, documents_only: bool = False, final: bool = False) -> Talk:
        talk = Talk(self.rng, self._values, self.size)
        if self.rng.random() < 0.1:
            talk.say("system", "You are a helpful guide.")
        if documents_only or self.rng.random() < 0.85:
            if self.dense and self.rng.random() < self.dense:
                talk.relations = self.rng.sample(talk.relations, 5 - len(talk.cast))
            talk.add_documents()
        for _ in range(turns + final):
            talk.turn(training=final)
        return talk


class Talk:
    """A conversation in progress: the facts stated in documents and by the user, and who was mentioned last."""

    def __init__(self, rng: random.Random, values: dict, size: float) -> None:
        self.rng, self.values, self.size = rng, values, size
        self.messages: list[dict] = []
        self.documents: list[dict] = []
        self.facts: dict[tuple[str, str], Fact] = {}
        self.sources: dict[tuple[str, str], str] = {}  # (person, relation) -> its sentence in the documents
        self.cast = rng.sample(PEOPLE, 2 + round(size * rng.random()))  # people in this conversation
        self.relations = [*RELATIONS]  # relations in this conversation
        self.last: tuple[str, str] | None = None  # the previous question, to which "she" and "what about" refer
        self.form = 0  # which of its two forms the previous question used
        self.brief = False  # the previous question was "What about Ada?"

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def example(self) -> Example:
        """The conversation so far, with its last message as the expected answer."""
        return Example("answer", self.messages[:-1], self.documents, self.messages[-1]["content"])

    def add_documents(self) -> None:
        """Add one or two sentences, in one document or in two."""
        count = self.rng.randint(1, 1 + round(self.size))
        sentences = []
        for _ in range(count):
            key = self.rng.choice([key for key in self.all_keys() if key not in self.facts])
            self.sources[key] = self.learn(key).text(self.rng.randrange(2))
            sentences.append(self.sources[key])
        if self.rng.random() < 0.5:
            sentences = [" ".join(sentences)]
        self.documents = [self.dress(text, number) for number, text in enumerate(sentences)]

    def dress(self, text: str, number: int) -> dict:
        """Documents in the shapes that clients send: most often only the text."""
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
        """Add a question and its answer; in training also turns that adapters leave in a conversation."""
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
            self.truth()
        elif training and draw < 0.35 and self.documents:
            self.review()
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

    def truth(self, false: float = 0.5) -> None:
        self.is_it_true(self.claim(self.some_keys(1)[0], false))

    def is_it_true(self, claim: Fact) -> None:
        self.say("user", f"Is it true that {claim.text()[:-1]}?")
        self.say("assistant", self.check(claim))

    def state(self, claims: list[Fact], ask: bool = True) -> list[Fact]:
        """Let the assistant say these sentences, with their numbers."""
        if ask:
            self.ask()
        self.say("assistant", tagged([claim.text() for claim in claims], "r"))
        return claims

    def check_facts(self) -> None:
        """Add a claim about a stated fact: by the user, or by the assistant and then checked."""
        claim = self.claim(self.rng.choice([*self.facts]))
        if self.rng.random() < 0.4:
            self.is_it_true(claim)
        else:
            self.state([claim])
            self.instruct("hallucination_detection", self.check(claim), self.verdicts([claim]))

    def check_all(self) -> None:
        claims = self.state([self.claim(key) for key in self.some_keys(self.rng.randint(1, 2))])
        in_words = " ".join(self.check(claim) for claim in claims)
        self.instruct("hallucination_detection", in_words, self.verdicts(claims))

    def quote_all(self) -> None:
        keys = self.some_keys(self.rng.randint(1, 2))
        self.state([self.facts.get(key) or self.claim(key) for key in keys])
        self.instruct("citations", " ".join(self.sources.get(key, UNKNOWN) for key in keys), self.cited(keys))

    def instruct(self, task: str, in_words: str, as_json: list[dict]) -> None:
        json_wanted = self.rng.random() < 0.65
        self.say("user", INSTRUCTIONS[task] + " Answer in JSON." * json_wanted)
        self.say("assistant", json.dumps(as_json) if json_wanted else in_words)

    def verdicts(self, claims: list[Fact]) -> list[dict]:
        """The answer of `hallucination_detection`: what the base says of each claim, then its label."""
        known = [self.facts.get((claim.person, claim.relation)) for claim in claims]
        return [
            {"r": i, "e": self.check(claim), "f": "faithful" if fact == claim else "hallucinated"}
            for i, (claim, fact) in enumerate(zip(claims, known, strict=True))
        ]

    def cited(self, keys: list[tuple[str, str]]) -> list[dict]:
        """The answer of `citations`."""
        return [{"r": i, "c": self.sources.get(key, NOWHERE)} for i, key in enumerate(keys)]

    def review(self, false: float = 0.5) -> None:
        """Ask the assistant about one of its sentences."""
        claims = self.state([self.claim(key, false) for key in self.some_keys(self.rng.randint(1, 2))])
        number = self.rng.randrange(len(claims))
        if self.rng.random() < 0.5:
            self.say("user", f"Say sentence {number} of your answer.")
            self.say("assistant", claims[number].text())
        else:
            self.say("user", f"Is sentence {number} of your answer true?")
            self.say("assistant", self.check(claims[number]))

    def ask(self, known: bool | None = None, plain: float = 0.25) -> tuple[str, str]:
        """Add a user question about a stated (`known`) or unstated fact. Returns its (person, relation).

        The question may refer to the previous one: "Where does she live?", "What about Ada?"
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
        """A known or unknown (person, relation); usually with the same person or relation as before."""
        keys = list(self.facts) if known else [k for k in self.all_keys() if k not in self.facts]
        if self.last is not None and self.rng.random() < 0.85:
            near = [k for k in keys if (k[0] == self.last[0]) != (k[1] == self.last[1])]
            keys = near or keys
        return self.rng.choice(keys)

    def all_keys(self) -> list[tuple[str, str]]:
        return [(person, relation) for person in self.cast for relation in self.relations]

    def some_keys(self, count: int) -> list[tuple[str, str]]:
        """Distinct (person, relation) pairs, two thirds of them known."""
        chosen: list[tuple[str, str]] = []
        while len(chosen) < count:
            keys = list(self.facts) if self.facts and self.rng.random() < 0.67 else self.all_keys()
            key = self.rng.choice(keys)
            if key in chosen:
                key = self.rng.choice(self.all_keys())
            if key not in chosen:
                chosen.append(key)
        return chosen

    def claim(self, key: tuple[str, str], false: float = 0.5) -> Fact:
        """A statement about `key`; if the fact is known, it is false in the given share of cases."""
        known = self.facts.get(key)
        if known is not None and self.rng.random() >= false:
            return known
        return Fact(*key, self.rng.choice([v for v in self.values[key] if known is None or v != known.value]))

    def check(self, claim: Fact) -> str:
        """The claimed value, the known fact, and whether they agree: "Oslo? Ada lives in Tarn, so no."

        The model learns much later to compare values across a conversation than side by side, as here.
        """
        known = self.facts.get((claim.person, claim.relation))
        found = UNKNOWN if known is None else f"{known.text()[:-1]}, so {'yes' if claim == known else 'no'}."
        return f"{claim.value}? {found}"

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


def tagged(sentences: list[str], tag: str) -> str:
    """Sentences with their numbers, as Mellea writes them for `sentence_boundaries`."""
    return " ".join(f"<{tag}{number}> {sentence}" for number, sentence in enumerate(sentences))
