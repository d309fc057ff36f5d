"""Random sequences of changes: after each step the model verifies, equals composing from scratch, and equals PEFT."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from recipes import SOAK, Recipe, assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteForCausalLM

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.composition.edit import add, remove, rename, update
from granite_switch.composition.extract import extract
from granite_switch.composition.verify import verify

NAMES = ("a", "b", "c.d")
MESSAGES = [{"role": "user", "content": "Where does Anna live? <rewrite> Answer briefly. <guardian>"}]
STEP = st.tuples(
    st.sampled_from(["add", "add", "remove", "update", "rename", "extract"]),
    st.integers(0, 5),
    st.sampled_from(["one", "two"]),
)


class Oracle:
    """PEFT's logits for a source's adapter, computed once per prompt."""

    def __init__(self, base: Path) -> None:
        self.base, self.known = base, {}

    def logits(self, source: Path, ids: tuple[int, ...]) -> torch.Tensor:
        if (source, ids) not in self.known:
            plain = GraniteForCausalLM.from_pretrained(self.base)
            with torch.no_grad():
                self.known[source, ids] = PeftModel.from_pretrained(plain, source)(torch.tensor([ids])).logits[0]
        return self.known[source, ids]


@pytest.fixture(scope="module")
def oracle(base: Path) -> Oracle:
    return Oracle(base)


def check(model: Path, recipe: Recipe, origins: dict[str, Path], oracle: Oracle) -> None:
    """Everything that must hold after every step."""
    assert sorted(verify(model, deep=True).names) == sorted(recipe.names)
    assert_same(model, recipe.compose())
    switch, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    substitutes = switch.config.switch_spec.substitutes
    for name in recipe.names:
        ids = tokenizer.apply_chat_template(
            MESSAGES, adapter_name=name, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        expected = oracle.logits(origins[name], tuple(substitutes.get(i, i) for i in ids[0].tolist()))
        with torch.no_grad():
            got = switch(ids).logits[0, :, : expected.shape[1]]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def change(model: Path, recipe: Recipe, origins: dict[str, Path], pool: Path, step: Any, number: int) -> bool:
    """Apply one step to the model and the recipe; False if it is not applicable."""
    kind, index, version = step
    if kind == "add":
        free = [name for name in NAMES if name not in recipe.names]
        if not free:
            return False
        name = free[index % len(free)]
        origins[name] = pool / version / name
        recipe.entries.append({"name": name, "path": str(origins[name])})
        add(model, [origins[name]])
        return True
    if not recipe.names:
        return False
    name = recipe.names[index % len(recipe.names)]
    entry = recipe.entry(name)
    if kind == "remove":
        substitute = verify(model).adapter(name).substitute_token_id
        entry.clear()
        entry.update(name=name, retired=True, substitute_token_id=substitute)
        remove(model, [name])
    elif kind == "rename":
        new = f"n{number}"
        origins[new] = origins[name]
        entry["name"] = new
        rename(model, name, new)
    elif kind == "extract":
        entry["path"] = str(extract(model, name, recipe.folder / "out" / str(number) / name))
    elif name in NAMES:  # renamed adapters are in no source under this name
        origins[name] = pool / version / name
        entry["path"] = str(origins[name])
        update(model, [origins[name]])
    return True


@settings(max_examples=60 if SOAK else 6)
@given(steps=st.lists(STEP, min_size=3, max_size=8))
def test_any_sequence_of_changes(
    steps: list[Any], base: Path, pool: Path, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sequence")
    origins = {"a": pool / "one/a"}
    recipe = Recipe(base, folder, [{"name": "a", "path": str(origins["a"])}])
    model = recipe.compose("model")
    for number, step in zip(itertools.count(), steps, strict=False):
        if change(model, recipe, origins, pool, step, number):
            check(model, recipe, origins, oracle)
    shutil.rmtree(folder)
