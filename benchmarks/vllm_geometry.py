"""What the geometry of the switch's attention layer costs: the decoder's own beside one head, in turns in one process.

    .venv-vllm/bin/python benchmarks/vllm_geometry.py [--size half] [--rounds 7] [--compiled]

Prints tokens a second with the decoder's geometry as a ratio to one head's in the same round (median [lowest-highest])
and the bytes that a token takes in the KV cache. Models and result files are those of vllm_serving.py.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

from vllm_serving import CASES, engine, models, report, settings, spread, timed

AFTER = {"decode 1 after 900": (1, 900, 48)}


def main() -> None:
    options = settings(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    folder = models(options.folder / options.size, options.size)
    quiet = {"enable_prefix_caching": False}
    contenders = {"decoder's": engine(folder / "switch", options, **quiet)}
    contenders |= {"again": contenders["decoder's"], "one head": with_one_head(folder / "switch", options, **quiet)}
    tokens = [a.token_id for a in contenders["one head"].llm_engine.model_config.hf_config.switch_spec.adapters]

    def prompts(count: int, length: int) -> list[list[int]]:
        """Every second request is the base's."""
        draw = random.Random(count * length)
        texts = [[draw.randrange(10, 300) for _ in range(length)] for _ in range(count)]
        return [text if i % 2 else [tokens[i // 2 % len(tokens)], *text[1:]] for i, text in enumerate(texts)]

    result: dict[str, Any] = {"bytes of a token in the cache": {n: bytes_of_a_token(x) for n, x in contenders.items()}}
    print(result)
    for case, (count, length, new) in (CASES | AFTER).items():
        work = prompts(count, length)
        for llm in contenders.values():
            timed(llm, work, new)
        rounds = []
        for _ in range(options.rounds):
            order = random.sample(list(contenders), len(contenders))
            rounds.append({name: timed(contenders[name], work, new) for name in order})
        result[case] = {
            name: {
                "seconds": statistics.median(r[name] for r in rounds),
                "speed": spread([r["one head"] / r[name] for r in rounds]),
            }
            for name in contenders
        }
        print(case, {name: row["speed"] for name, row in result[case].items()}, flush=True)
    report("geometry", options, result)


def with_one_head(model: Path, options: argparse.Namespace, **more: Any) -> Any:
    """An engine whose switch has one query and one key-value head, as large as a decoder's."""
    from vllm.config import ModelConfig

    from granite_switch.vllm import switch

    made = switch.Switch.__init__

    def narrow(*args: Any, **kwargs: Any) -> None:
        with (
            patch.object(ModelConfig, "get_num_attention_heads", return_value=1),
            patch.object(ModelConfig, "get_num_kv_heads", return_value=1),
        ):
            made(*args, **kwargs)

    with patch.object(switch.Switch, "__init__", narrow):
        return engine(model, options, **more)


def bytes_of_a_token(llm: Any) -> float:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return sum(spec.page_size_bytes / spec.block_size for spec in worker.get_kv_cache_spec().values())


if __name__ == "__main__":
    main()
