"""After any sequence of uses and changes, a model computes with its current parameters.

The oracle adds each linear's adapter by the formula of `core.lora`, with the parameters' current values. SEQUENCES=500
draws 500 sequences.
"""

import copy
import os
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from artefacts import ALL, ASSISTANT, make_adapter, make_base
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import granite_switch.hf  # noqa: F401
from granite_switch import compose
from granite_switch.hf.updates import Updates

EXAMPLES = int(os.environ.get("SEQUENCES", "12"))


@pytest.fixture(scope="module", autouse=True)
def composed_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sequences")
    base = make_base(folder / "base", layers=1, hidden=32, heads=2, kv_heads=1, mlp=24)
    ranks = {"a": (4, None), "b": (4, ASSISTANT), "c": (2, None)}  # two share a rank, as in IBM's libraries
    for i, (name, (rank, invocation)) in enumerate(ranks.items()):
        make_adapter(folder / name, base, seed=i, rank=rank, targets=ALL, invocation=invocation, strength=0.2)
    compose(base, [folder / name for name in ranks], folder / "model")
    Sequences.folder = folder / "model"


@torch.no_grad()
def defined(model: nn.Module, ids: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """Logits by the definition: each sequence alone, on a base with the adapter merged into its linears."""
    rows = []
    for row, slot in zip(ids, slots, strict=True):
        merged = copy.deepcopy(model)
        for name, module in model.named_modules():
            if isinstance(module, Updates) and slot in module.adapters:
                a, b, scale = module.adapters[slot]
                weight = merged.get_submodule(name.removesuffix("_lora")).weight
                weight.copy_(weight + scale * getattr(module, b) @ getattr(module, a))
        plain = model.model.switch.control_to_substitute[row[None]]
        rows.append(merged(plain, use_cache=False).logits[0])
    return torch.stack(rows)


class Sequences(RuleBasedStateMachine):
    folder: Path

    @initialize()
    def load(self) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float64).eval()
        self.spec = self.model.config.switch_spec
        self.optimizer = torch.optim.SGD([p for n, p in self.model.named_parameters() if "_lora" in n], lr=0.05)
        self.names = [name for name, _ in self.model.named_parameters() if "_lora" in name]
        self.shapes = {name: t.shape for name, t in self.model.state_dict().items()}

    def batch(self, slots: list[int], length: int = 6) -> torch.Tensor:
        ids = torch.randint(10, 300, (len(slots), length))
        for row, slot in zip(ids, slots, strict=True):
            if slot:
                row[0] = self.spec.adapters[slot - 1].token_id
        return ids

    @rule(slots=st.lists(st.integers(0, 3), min_size=1, max_size=4), steps=st.integers(1, 3))
    def generate(self, slots: list[int], steps: int) -> None:
        ids = self.batch(slots)
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        out = self.model.generate(ids, attention_mask=mask, **options)
        again = self.model.generate(ids, attention_mask=mask, use_cache=False, **options)
        assert out.tolist() == again.tolist()

    @rule(slots=st.lists(st.integers(0, 3), min_size=2, max_size=4), name=st.integers(0, 99))
    def change_between_decode_steps(self, slots: list[int], name: int) -> None:
        ids, cache = self.batch(slots), DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(ids[:, :1], past_key_values=cache)
            self.model(ids[:, 1:2], past_key_values=cache)
            self.model.get_parameter(self.names[name % len(self.names)]).mul_(1.5)
            fresh = copy.deepcopy(cache)
            got = self.model(ids[:, 2:3], past_key_values=cache).logits
            expected = copy.deepcopy(self.model)(ids[:, 2:3], past_key_values=fresh).logits
        torch.testing.assert_close(got, expected)

    @rule(slots=st.lists(st.integers(0, 3), min_size=1, max_size=3))
    def train_step(self, slots: list[int]) -> None:
        ids = self.batch(slots)
        self.optimizer.zero_grad()
        self.model(ids, labels=ids).loss.backward()
        self.optimizer.step()

    @rule(name=st.integers(0, 99), how=st.sampled_from(["setattr", ".data =", "in place", ".data in place"]))
    def change_one(self, name: int, how: str) -> None:
        path, _, attribute = self.names[name % len(self.names)].rpartition(".")
        module = self.model.get_submodule(path)
        old = getattr(module, attribute)
        if how == "setattr":
            setattr(module, attribute, nn.Parameter(old.detach() * 1.3))
            self.optimizer = torch.optim.SGD([p for n, p in self.model.named_parameters() if "_lora" in n], lr=0.05)
        elif how == ".data =":
            old.data = old.data * 1.3
        elif how == "in place":
            with torch.no_grad():
                old.mul_(1.3)
        else:
            old.data.mul_(1.3)

    @rule(assign=st.booleans())
    def load_state_dict(self, assign: bool) -> None:
        state = {n: t * (1.1 if "_lora" in n else 1) for n, t in self.model.state_dict().items()}
        self.model.load_state_dict(state, assign=assign)
        self.model.tie_weights()
        self.optimizer = torch.optim.SGD([p for n, p in self.model.named_parameters() if "_lora" in n], lr=0.05)

    @rule()
    def cast_and_move(self) -> None:
        self.model.float().double().to("cpu")

    @rule()
    def compiled(self) -> None:
        torch.compiler.reset()
        ids = self.batch([1, 0])
        with torch.no_grad():
            got = torch.compile(self.model, backend="eager")(ids, use_cache=False).logits
            torch.testing.assert_close(got, self.model(ids, use_cache=False).logits)

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copied(self, how) -> None:
        self.model = how(self.model)
        self.optimizer = torch.optim.SGD([p for n, p in self.model.named_parameters() if "_lora" in n], lr=0.05)

    @rule()
    def saved(self) -> None:
        with TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            first = {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}
            with torch.no_grad():
                self.model.generate(self.batch([1, 2, 3]), max_new_tokens=2, eos_token_id=None, pad_token_id=1)
        with TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            assert {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")} == first
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            for name, tensor in self.model.state_dict().items():
                assert torch.equal(again.state_dict()[name], tensor)
            save_model(self.model, f"{folder}/all")
            assert load_file(f"{folder}/all")

    @invariant()
    def parameters_are_parameters(self) -> None:
        if not hasattr(self, "model"):
            return
        state = self.model.state_dict()
        assert {name: tensor.shape for name, tensor in state.items()} == self.shapes
        assert all(tensor.is_contiguous() for tensor in state.values())
        held = {id(p) for p in self.model.parameters()}
        assert all(id(p) in held for group in self.optimizer.param_groups for p in group["params"])
        ids = self.batch([0, 1, 2, 3], length=3)
        with torch.no_grad():
            got = self.model(ids).logits
            torch.testing.assert_close(got, defined(self.model, ids, [0, 1, 2, 3]), rtol=1e-7, atol=1e-8)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=EXAMPLES, stateful_step_count=8, deadline=None, derandomize=True)
