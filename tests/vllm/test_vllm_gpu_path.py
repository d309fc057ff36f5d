"""What GPUs run, on this CPU: `TritonRouter` in whole engines, vLLM's kernels replaced by their definition.

The kernels themselves are run in Triton's interpreter (test_vllm_lora.py), which is too slow for a model.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import core_of, runner_of, running
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu_worker import Worker

from granite_switch.vllm.lora import TritonRouter

TEXT = [7, 60, 61, 90, 12, 33]


@torch.library.custom_op("granite_switch_test::shrink", mutates_args=["hidden"])
def shrink(
    x: Tensor, a: list[Tensor], hidden: Tensor, order: Tensor, counts: Tensor, starts: Tensor, ids: Tensor
) -> None:
    hidden.fill_(float("nan"))  # what no token has must not be read
    for slot, rows in spans(order, counts, starts, ids):
        for part, matrix in enumerate(a):
            hidden[part, rows] = x[rows].float() @ matrix[slot, 0].float().T


@torch.library.custom_op("granite_switch_test::expand", mutates_args=["y"])
def expand(
    hidden: Tensor, b: list[Tensor], y: Tensor, order: Tensor, counts: Tensor, starts: Tensor, ids: Tensor
) -> None:
    for slot, rows in spans(order, counts, starts, ids):
        parts = [hidden[part, rows] @ matrix[slot, 0].float().T for part, matrix in enumerate(b)]
        y[rows] += torch.cat(parts, 1).to(y.dtype)


for operator in (shrink, expand):
    operator.register_fake(lambda *_: None)


def spans(order: Tensor, counts: Tensor, starts: Tensor, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    for slot, count, start in zip(ids.tolist(), counts.tolist(), starts.tolist(), strict=False):
        if slot >= 0 and count:
            yield slot, order[start : start + count].long()


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Models that are made in here route as on a GPU; the kernels stay replaced while it lasts."""

    def in_order(operator: Any) -> Callable[..., None]:
        def call(x: Tensor, stacks: tuple[Tensor, ...], out: Tensor, mapping: Tensor, *rest: Any, **_: Any) -> None:
            operator(x, list(stacks), out, *rest[:4])

        return call

    with ExitStack() as stack:
        for name, value in [("lora_shrink", in_order(shrink)), ("lora_expand", in_order(expand))]:
            stack.enter_context(patch(f"vllm.lora.ops.triton_ops.{name}", value))
        stack.enter_context(patch("granite_switch.vllm.lora.EagerRouter", TritonRouter))
        yield


@contextmanager
def noting_what_loading_allocates(found: list[Tensor]) -> Iterator[None]:
    """On a GPU with sleep mode that comes out of one pool of memory, which level 2 gives up."""
    load = BaseModelLoader.load_model

    def noted(*args: Any, **kwargs: Any) -> nn.Module:
        before = storages()
        model = load(*args, **kwargs)
        host = (model.router.no_lora, model.router.groups)  # on a GPU these stay in the host's memory
        spared = set(before) | {tensor.untyped_storage().data_ptr() for tensor in host}
        found.extend(tensor for pointer, tensor in storages().items() if pointer not in spared)
        return model

    with patch.object(BaseModelLoader, "load_model", noted):
        yield


def storages() -> dict[int, Tensor]:
    """Tensors by their memory, without scalars: the addresses of oneDNN's objects are among those."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {t.untyped_storage().data_ptr(): t for t in tensors if t.device.type == "cpu" and t.dim()}


@pytest.fixture(scope="module")
def loaded() -> list[Tensor]:
    return []


@pytest.fixture(scope="module")
def gpu_engine(composed: Path, loaded: list[Tensor]) -> Iterator[Any]:
    with as_on_gpus(), ExitStack() as stack:
        with noting_what_loading_allocates(loaded):
            llm = stack.enter_context(running(composed))
        yield llm


def greedy(llm: Any, prompts: list[list[int]], count: int = 8) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    llm.reset_prefix_cache()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def prompts(spec: Any) -> list[list[int]]:
    """Text under the base and under each adapter."""
    return [TEXT, *([*TEXT, token, 41, 42] for token in spec.control_slots)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]], reference: Callable[[list[int], int], list[int]]) -> list[list[int]]:
    """By the transformers backend."""
    return [reference(prompt, 8) for prompt in prompts]


def test_mixed_batches_are_answered_as_transformers_does(gpu_engine: Any, prompts: Any, expected: Any) -> None:
    assert greedy(gpu_engine, prompts) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert greedy(gpu_engine, [prompt]) == [tokens]


def asleep_and_awake(llm: Any, loaded: list[Tensor], level: int) -> None:
    """Sleep as a GPU's worker does it: what loading allocated, and the KV cache, is lost.

    At level 1 the allocator brings what loading allocated back from a copy; at level 2 the worker does so with buffers.
    """
    worker = core_of(llm).model_executor.driver_worker.worker
    memory = [torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()) for tensor in loaded]
    cache = [torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()) for x in worker.model_runner.kv_caches]
    assert len(cache) == 3  # two of the decoder's layers, and the switch
    offloaded = [piece.clone() for piece in memory if level == 1]

    def suspend(level: int) -> None:
        for piece in memory:
            piece.fill_(255)
        for piece in cache:
            piece.fill_(64)  # finite numbers, because kernels on CPU multiply places that are not in use by 0

    def resume(tags: list[str] | None) -> None:
        for piece, copy in zip(memory, offloaded, strict=False):
            piece.copy_(copy)

    with (
        patch.object(worker, "_sleep_mode_backend", SimpleNamespace(suspend=suspend, resume=resume)),
        patch("torch.accelerator.synchronize"),
        patch("torch.accelerator.get_memory_info", return_value=(1 << 30, 1 << 30)),
        patch.object(worker, "synchronize_device", create=True),
    ):
        Worker.sleep(worker, level=level)
        assert runner_of(llm).model.model.norm.weight.isnan().all()
        Worker.wake_up(worker)


def test_sleep_level_1_restores_everything(gpu_engine: Any, loaded: list[Tensor], prompts: Any, expected: Any) -> None:
    asleep_and_awake(gpu_engine, loaded, level=1)
    assert greedy(gpu_engine, prompts) == expected


@pytest.mark.parametrize("with_adapters", [True, False])
def test_adapters_outlast_sleep_level_2(
    gpu_engine: Any, loaded: list[Tensor], composed: Path, prompts: Any, expected: Any, with_adapters: bool
) -> None:
    """The base's weights have to be sent again; the adapters are there, whether they come along or not."""
    model = runner_of(gpu_engine).model
    stacks = [s for x in model.linears.values() for s in (*x.layer.lora_a_stacked, *x.layer.lora_b_stacked)]
    gone = {tensor.untyped_storage().data_ptr() for tensor in loaded}
    assert len(stacks) > 8
    assert {stack.untyped_storage().data_ptr() for stack in stacks} < gone
    asleep_and_awake(gpu_engine, loaded, level=2)
    assert model.model.norm.weight.isnan().all()
    weights = [pair for file in sorted(composed.glob("*.safetensors")) for pair in load_file(file).items()]
    weights = [(name, tensor) for name, tensor in weights if with_adapters or "_lora" not in name]
    gpu_engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    assert greedy(gpu_engine, prompts) == expected


@contextmanager
def on_a_pretended_gpu(composed: Path) -> Iterator[nn.Module]:
    """The whole model as for CUDA, on the meta device: a copy to the host, or a shape read from data, raises there."""
    options = {"enforce_eager": True, "max_model_len": 512, "compilation_config": {"custom_ops": ["none"]}}
    config = EngineArgs(str(composed), dtype="bfloat16", load_format="dummy", **options).create_engine_config()
    gpu = SimpleNamespace(is_cpu=lambda: False)
    with (
        set_current_vllm_config(config),
        set_forward_context(None, config),
        patch.object(type(current_platform), "opaque_attention_op", return_value=True),
        patch("vllm.lora.ops.triton_ops.lora_shrink", torch.ops.vllm.lora_shrink),
        patch("vllm.lora.ops.triton_ops.lora_expand", torch.ops.vllm.lora_expand),
        patch("granite_switch.vllm.lora.current_platform", gpu),
        patch("granite_switch.vllm.switch.current_platform", gpu),
        torch.device("meta"),
        set_default_torch_dtype(torch.bfloat16),
    ):
        model = initialize_model(config)
        model.process_weights_after_loading()
        for module in model.modules():
            module.cpu_linear = nn.functional.linear  # in place of oneDNN's, which loading makes
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().as_subclass(Tensor), requires_grad=False))
        assert type(model.router) is TritonRouter
        yield model


def test_the_whole_model_is_one_graph_for_any_number_of_tokens(gpu_engine: Any, composed: Path) -> None:
    """`gpu_engine` is there for its process groups."""
    with on_a_pretended_gpu(composed) as model, torch.inference_mode():
        ids, positions = torch.zeros(7, dtype=torch.int32), torch.zeros(7, dtype=torch.int64)
        linears = len(model.linears)

        def forward(ids: Tensor, positions: Tensor) -> Tensor:
            return model.compute_logits(model(ids, positions))

        graph = make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(ids, positions)
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count("vllm.lora_shrink.default") == targets.count("vllm.lora_expand.default") == linears > 0
        assert not {"aten._local_scalar_dense.default", "aten.item.default"} & set(targets)

        captured = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            captured.append((graph, [x for x in inputs if isinstance(x, torch.SymInt)]))
            raise Captured

        for tensor in (ids, positions):
            torch._dynamo.mark_dynamic(tensor, 0)
        with pytest.raises(Exception, match="Captured"):
            torch.compile(model.forward, fullgraph=True, backend=backend)(ids, positions)
        ((whole, symbols),) = captured
        names = [str(node.target) for node in whole.graph.nodes]
        assert names.count("vllm.lora_shrink") == names.count("vllm.lora_expand") == linears
        assert len(set(map(str, symbols))) == 1  # the number of tokens
        assert "item" not in names


class Captured(Exception):
    """Ends a compilation once the graph is there."""


@pytest.mark.slow
def test_compiled_too(composed: Path, prompts: Any, expected: Any) -> None:
    # last, since the process groups end with an engine
    with as_on_gpus(), running(composed, enforce_eager=False) as llm:
        assert greedy(llm, prompts) == expected
        assert greedy(llm, prompts[:1]) == expected[:1]
