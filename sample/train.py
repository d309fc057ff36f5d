"""Train the sample from scratch: tokenizer, base model, four adapters. `python sample/train.py [--only NAME]`.

The base learns to hold a conversation about documents. It is rounded to bfloat16 before the adapters are trained, so
that they are trained on the shipped weights. Hand-written files (`io.yaml`, `chat_template.jinja`) are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the cores are shared; read when torch is imported
os.environ.setdefault(  # read by the training processes: use large pages, and keep freed memory
    "GLIBC_TUNABLES",
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2147483648:glibc.malloc.trim_threshold=4294967296",
)

import torch
import torch.nn.functional as F
import world
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BASE = HERE / "base"
NAME = "granite-switch-sample"

SPECIAL = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>", "<|unk|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROCESSES = 2
BASE_BATCH, ADAPTER_BATCH = 5, 8  # per process
BASE_STEPS = 3800
FACTS_STEPS, CLAIMS_STEPS = 320, 320
FINISH_STEPS = 1200
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. An invocation text makes it an aLoRA."""

    rank: int
    targets: list[str]
    invocation: str | None = None
    lora: dict = field(default_factory=dict)
    steps: int = 300
    rate: float = 2e-3
    dtype: torch.dtype = torch.float32  # as stored

    @property
    def technology(self) -> str:
        return "alora" if self.invocation else "lora"


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYWHERE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RECIPES = {
    "answerability": Recipe(8, EVERYWHERE, ASSISTANT, steps=650),
    "query_rewrite": Recipe(
        16, ATTENTION, world.REWRITE_TAG, {"use_rslora": True, "lora_alpha": 8}, steps=200, rate=3e-3
    ),
    "hallucination_detection": Recipe(
        32, EVERYWHERE, lora={"rank_pattern": {"down_proj": 16}}, steps=500, dtype=torch.bfloat16
    ),
    "citations": Recipe(24, EVERYWHERE, steps=450, dtype=torch.bfloat16),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the world is one token, with and without a space before it.

    `<`, `>` and `"` do not occur in the training text, so no merge crosses them: `<rewrite>` and `<c0>` give the same
    tokens everywhere, also after a control token.
    """
    rng = random.Random(0)
    corpus = list(world.PEOPLE) * 40
    for relation in world.RELATIONS.values():
        corpus += [*relation.values] * 40
    for task in world.TASKS:
        for example in world.examples(task, 400, held_out=False):
            said = " ".join(m["content"] for m in example.messages) + json.dumps(example.documents) + example.expected
            corpus.append(said.translate(str.maketrans('<>"', "\n\n\n")))
    corpus += ["system\nuser\nassistant\ndocuments\nrewrite\nAnswer from these documents.\n"] * 40
    rng.shuffle(corpus)
    words = [word for text in corpus for word in text.split()]
    corpus += [f"{word}\n {word}" for word in words]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048 - len(SPECIAL),
        min_frequency=10,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[3],
        unk_token=SPECIAL[4],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=(BASE / "chat_template.jinja").read_text(),
    )


def make_base(tokenizer: PreTrainedTokenizerFast) -> GraniteForCausalLM:
    config = GraniteConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.5,
        attention_multiplier=0.125,
        logits_scaling=2.0,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )
    return GraniteForCausalLM(config)


@dataclass
class Batch:
    ids: torch.Tensor  # [B, S], padded on the right
    weights: torch.Tensor  # [B, S], the loss weight of each token


def batches(tokenizer, draw: Callable[[], world.Example], weigh, size: int, pool: int = 16) -> Iterator[Batch]:
    """Endless batches; examples of similar length go together, so there is little padding."""
    while True:
        rows = []
        for _ in range(size * pool):
            example = draw()
            messages = [*example.messages, {"role": "assistant", "content": example.expected}]
            text = tokenizer.apply_chat_template(messages, documents=example.documents, tokenize=False)
            ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
            rows.append((ids, weigh(ids)))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        random.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            batch = Batch(torch.full((size, length), tokenizer.pad_token_id), torch.zeros(size, length))
            for row, (ids, weights) in enumerate(group):
                batch.ids[row, : len(ids)] = torch.tensor(ids)
                batch.weights[row, : len(ids)] = torch.tensor(weights)
            yield batch


class Weigher:
    """Loss weights of tokens: full for what the assistant says, and for the base a little for everything else.

    JSON that adapters leave in a conversation has no weight: the base should read it, not write it. At the end of an
    example it has, because there the base was asked to repeat it.

    Args:
        said: the weight of text that the base did not write itself.
        verdict: the weight of "yes" and "no" after a claim.
    """

    def __init__(self, tokenizer, said: float = 0.1, verdict: float = 1.0) -> None:
        self.said, self.verdict = said, verdict
        self.verdicts = {tokenizer.encode(word, add_special_tokens=False)[0] for word in (" yes", " no")}
        self.marker = tokenizer(ASSISTANT, add_special_tokens=False)["input_ids"]
        self.end = tokenizer.eos_token_id
        self.json = {tokenizer.encode(start, add_special_tokens=False)[0] for start in ('{"', "<r")}

    def base(self, ids: list[int]) -> list[float]:
        weights = [self.said] * len(ids)
        starts = self.starts(ids)
        for start in starts:
            stop = ids.index(self.end, start) + 1
            left = ids[start] in self.json and start != starts[-1]
            for i in range(start, stop):
                weights[i] = 0.0 if left else self.verdict if ids[i] in self.verdicts else 1.0
        return weights

    def adapter(self, ids: list[int]) -> list[float]:
        last = self.starts(ids)[-1]
        return [0.0] * last + [1.0] * (len(ids) - last)

    def starts(self, ids: list[int]) -> list[int]:
        n = len(self.marker)
        return [i + n for i in range(len(ids)) if ids[i] == self.marker[0] and ids[i : i + n] == self.marker]


def loss_and_accuracy(model, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted loss, and the share of sequences whose full-weight tokens are all predicted."""
    weights = batch.weights[:, 1:]
    rows = weights > 0
    head = model.get_output_embeddings()  # four of five prompt tokens have no weight: skip the head for them
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows],))
    logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits.float()
    hook.remove()
    targets, counted = batch.ids[:, 1:][rows], weights[rows]
    loss = (F.cross_entropy(logits, targets, reduction="none") * counted).sum() / counted.sum()
    wrong = torch.zeros_like(weights)
    wrong[rows] = ((logits.argmax(-1) != targets) & (counted >= 1)).float()
    return loss, (wrong.sum(1) == 0).float().mean().item()


def fit(model, stream: Iterator[Batch], steps: int, rate: float, schedule=None, label: str = "") -> None:
    """Train with Muon for matrices and AdamW for embeddings and norms, with warm-up and cosine decay.

    The model computes in `compute_dtype()`, with float32 masters of the trained parameters. Gradients are averaged over
    processes.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    exact = [p.detach().float().clone() for _, p in trained]
    is_matrix = [p.ndim == 2 and "proj" in n for n, p in trained]
    matrices = [p for p, matrix in zip(exact, is_matrix, strict=True) if matrix]
    others = [p for p, matrix in zip(exact, is_matrix, strict=True) if not matrix]
    dtype = compute_dtype()
    optimizers: list[torch.optim.Optimizer] = [SplitMuon(matrices, rate, dtype)]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0))
    warmup = min(100, max(1, steps // 10))
    model.to(dtype).train()
    began, tokens, recent = time.time(), 0, []
    for step in range(steps):
        if schedule:
            schedule(step / steps)
        factor = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor
        batch = next(stream)
        loss, accuracy = loss_and_accuracy(model, batch)
        loss.backward()
        gradient = torch.cat([p.grad.float().flatten() for _, p in trained]) / PROCESSES
        torch.distributed.all_reduce(gradient)
        gradient *= min(1.0, 1.0 / (gradient.norm().item() + 1e-6))
        for p, part in zip(exact, gradient.split([p.numel() for p in exact]), strict=True):
            p.grad = part.view_as(p)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for (_, p), value in zip(trained, exact, strict=True):
                p.copy_(value)
                p.grad = None
        tokens += PROCESSES * batch.ids.numel()
        recent.append((loss.item(), accuracy))
        if torch.distributed.get_rank() == 0 and ((step + 1) % 50 == 0 or step + 1 == steps):
            mean_loss, mean_accuracy = (sum(x) / len(recent) for x in zip(*recent, strict=True))
            spent = time.time() - began
            print(
                f"{label} step {step + 1}/{steps} loss {mean_loss:.3f} right {mean_accuracy:.2f} "
                f"{tokens / spent:.0f} tokens/s {spent:.0f} s",
                flush=True,
            )
            recent = []
    model.float().eval()
    with torch.no_grad():
        for (_, p), value in zip(trained, exact, strict=True):
            p.copy_(value)


class SplitMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, as `torch.optim.Muon`); each process orthogonalises its share of the matrices.

    Args:
        matrices: float32, the same in every process, with the same gradients.
        rate: learning rate, on the scale of AdamW's.
        dtype: of the Newton-Schulz iteration.
    """

    def __init__(self, matrices: list[torch.Tensor], rate: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": rate, "momentum": 0.95, "weight_decay": 0.01})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        matrices = group["params"]
        updates = torch.zeros(sum(p.numel() for p in matrices))
        for index, (p, update) in enumerate(zip(matrices, updates.split([p.numel() for p in matrices]), strict=True)):
            if index % PROCESSES == torch.distributed.get_rank():
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonal(p.grad.lerp(momentum, group["momentum"]).to(self.dtype))
                update.copy_(0.2 * max(p.shape) ** 0.5 * direction.flatten())
        torch.distributed.all_reduce(updates)
        for p, update in zip(matrices, updates.split([p.numel() for p in matrices]), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(p), alpha=group["lr"])


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Approximately the nearest matrix with all singular values one: five Newton-Schulz steps."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.T if tall else x


def compute_dtype() -> torch.dtype:
    """bfloat16 if the processor has instructions for it, else float32: emulation takes eight times as long."""
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def train_base() -> None:
    """Train on conversations and on drills of hard cases, small documents first: lookup is learnt on those in minutes.

    User text has a small weight at first and none later: it cannot be predicted, and its noise hides what is still to
    be learnt. One example in twelve asks the base to repeat text that adapters will write. Adapters change neither the
    embedding nor the head (which are tied). If the base has never written a token, no hidden state can single out that
    token's row, and an adapter that must write it learns nothing.
    """
    tokenizer = make_tokenizer()
    model = make_base(tokenizer)
    maker = world.Maker(own_random("base"), size=0.0)
    weigher = Weigher(tokenizer)
    draw = one_of(maker.rng, {maker.conversation: 40, maker.drill: 28, maker.match: 24, maker.repeat: 8})

    def grow(done: float) -> None:
        maker.size = min(1.0, max(0.0, 12 * done - 0.8))
        maker.dense = 0.3 * (done > 0.2)
        weigher.said = 0.1 * (done < 0.3)

    fit(model, batches(tokenizer, draw, weigher.base, BASE_BATCH), BASE_STEPS, 3e-3, grow, "base")
    save_base(model, tokenizer)


def claims_base() -> None:
    """Train on claims only: first about a single fact, then of all kinds."""
    tokenizer, model = load_base()
    weigher = Weigher(tokenizer, said=0.0, verdict=4.0)
    maker = world.Maker(own_random("claims"), size=0.0)
    fit(model, batches(tokenizer, maker.facts, weigher.base, 16), FACTS_STEPS, 2e-3, label="facts")
    maker.size, maker.dense = 1.0, 0.3
    fit(model, batches(tokenizer, maker.claims, weigher.base, 12), CLAIMS_STEPS, 2e-3, label="claims")
    save_base(model, tokenizer)


def finish_base() -> None:
    """Train again from a high learning rate, with more of the hardest cases: what was said of whom."""
    tokenizer, model = load_base()
    maker = world.Maker(own_random("finish"), dense=0.3)
    draw = one_of(maker.rng, {maker.conversation: 30, maker.drill: 30, maker.match: 36, maker.repeat: 4})
    stream = batches(tokenizer, draw, Weigher(tokenizer, said=0.0, verdict=4.0).base, BASE_BATCH)
    fit(model, stream, FINISH_STEPS, 2e-3, label="finish")
    save_base(model, tokenizer)


def one_of(rng: random.Random, shares: dict[Callable[[], world.Example], int]) -> Callable[[], world.Example]:
    """A function that draws examples of several kinds in the given shares."""
    return lambda: rng.choices([*shares], [*shares.values()])[0]()


def load_base() -> tuple[PreTrainedTokenizerFast, GraniteForCausalLM]:
    return AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def save_base(model, tokenizer) -> None:
    if torch.distributed.get_rank() == 0:
        model.to(torch.bfloat16).save_pretrained(BASE)
        (BASE / "model.safetensors").chmod(0o644)
        tokenizer.save_pretrained(BASE)


def own_random(name: str) -> random.Random:
    """A random generator that differs in each process."""
    return random.Random(f"train {name} {torch.distributed.get_rank()}")


def train_adapter(name: str) -> None:
    recipe = RECIPES[name]
    tokenizer, base = load_base()
    invocation = tokenizer(recipe.invocation, add_special_tokens=False)["input_ids"] if recipe.invocation else None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        target_modules=recipe.targets,
        alora_invocation_tokens=invocation,
        **{"lora_alpha": 2 * recipe.rank, **recipe.lora},
    )
    model = get_peft_model(base, config)
    maker = world.Maker(own_random(name), dense=0.2)
    stream = batches(tokenizer, lambda: maker.example(name), Weigher(tokenizer).adapter, ADAPTER_BATCH)
    fit(model, stream, recipe.steps, recipe.rate, label=name)
    if torch.distributed.get_rank() == 0:
        save_adapter(model.to(recipe.dtype), HERE / "library" / name / NAME / recipe.technology)


def save_adapter(model, folder: Path) -> None:
    """Write PEFT's files, without its model card and without machine-dependent content."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = NAME
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2) + "\n")


STAGES = {"base": train_base, "claims": claims_base, "finish": finish_base}


def work(rank: int, names: list[str], meeting: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    for name in names:
        torch.manual_seed(0)  # the same start and batches of similar length in every process
        random.seed(0)
        train_adapter(name) if name in RECIPES else STAGES[name]()
        torch.distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*STAGES, *RECIPES], help="train only these parts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.only or [*STAGES, *RECIPES], f"{folder}/meeting")
        torch.multiprocessing.spawn(work, arguments, nprocs=PROCESSES)


if __name__ == "__main__":
    main()
