"""llama.cpp through llama-cpp-python's C bindings: float32 cache, no flash attention, every logit."""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]  # [tokens, vocabulary]

_said: list[str] = []  # the engine's log since it last began to load
_keep = llama_cpp.llama_log_callback(lambda level, text, data: _said.append(text.decode(errors="replace")))


class Engine:
    """A loaded GGUF file."""

    def __init__(self, path: Path, vocab_only: bool = False) -> None:
        _said.clear()
        llama_cpp.llama_log_set(_keep, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = vocab_only
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}: {''.join(_said[-3:])}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = True, around: bool = False) -> list[int]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), around, special)
        assert count >= 0
        return list(room[:count])

    @contextmanager
    def context(self, sequences: int = 1, length: int = 256, kv: int = 0, threads: int = 1) -> Iterator["Context"]:
        """A context of `length` tokens per sequence. `kv` is the ggml type of the cache, float32 by default."""
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length * sequences
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = kv
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert context
        try:
            yield Context(context, self.size)
        finally:
            llama_cpp.llama_free(context)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Logits of one sequence, computed in one batch."""
        with self.context(length=max(64, len(tokens))) as context:
            return context.decode({0: tokens})[0]


class Context:
    """A KV cache with its sequences."""

    def __init__(self, pointer: object, size: int) -> None:
        self.pointer, self.size = pointer, size
        self.positions: dict[int, int] = {}

    def decode(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """Append tokens to sequences in one interleaved batch. Returns the logits of each sequence."""
        total = sum(len(tokens) for tokens in sequences.values())
        batch = llama_cpp.llama_batch_init(total, 0, 1)
        order: list[int] = []
        for step in range(max(len(tokens) for tokens in sequences.values())):
            for sequence, tokens in sequences.items():
                if step < len(tokens):
                    i = len(order)
                    batch.token[i] = tokens[step]
                    batch.pos[i] = self.positions.get(sequence, 0) + step
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = sequence
                    batch.logits[i] = 1
                    order.append(sequence)
        batch.n_tokens = total
        assert llama_cpp.llama_decode(self.pointer, batch) == 0
        data = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.pointer), (total, self.size)).copy()
        llama_cpp.llama_batch_free(batch)
        for sequence, tokens in sequences.items():
            self.positions[sequence] = self.positions.get(sequence, 0) + len(tokens)
        return {sequence: data[[i for i, s in enumerate(order) if s == sequence]] for sequence in sequences}
