"""Mellea calls the adapters of a composed model: rewrite, answerability, hallucinations, citations.

Against a vLLM server (here Mellea needs no extras):

    vllm serve out/granite-switch-sample --served-model-name sample
    python examples/mellea_adapters.py out/granite-switch-sample --url http://localhost:8000/v1 --name sample

or in this process, with transformers (pip install mellea llguidance '.[hf]' 'transformers<5.24', because
Mellea 0.8 calls methods in which 5.24 asks for PEFT 0.22, which is not released yet):

    python examples/mellea_adapters.py out/granite-switch-sample
"""

import argparse
import json
from typing import Any

from mellea.backends import ModelOption
from mellea.stdlib import functional
from mellea.stdlib.components import Document, Message
from mellea.stdlib.components.intrinsic import Intrinsic, rag
from mellea.stdlib.context import ChatContext

DOCUMENTS = [
    Document("Ada lives in Tarn. Ada works as a baker.", doc_id="0"),
    Document("Hugo plays the harp.", doc_id="1"),
]
HISTORY = [Message("user", "What does Ada work as?"), Message("assistant", "Ada works as a baker.")]
QUESTION, UNKNOWN = "Where does she live?", "What does Hugo eat?"
DRAFT = "Ada lives in Tarn. Ada plays the flute."  # the answer to check
ANSWER = "Ada lives in Tarn."  # the answer to cite sources for


def backend_for(model: str, url: str, name: str) -> Any:
    """Mellea's backend: for a server if `url` is given, else for transformers."""
    if url:
        from mellea.backends.openai import OpenAIBackend

        backend = OpenAIBackend(name or model, base_url=url, api_key="none")
        backend.register_embedded_adapter_model(model)
        return backend
    from mellea.backends.huggingface import LocalHFBackend

    return LocalHFBackend(model, load_embedded_adapters=True)


def run(backend: Any) -> dict[str, Any]:
    """Results of four adapters: three called through Mellea's own functions, one by its name."""
    talk = ChatContext()
    for message in HISTORY:
        talk = talk.add(message)
    result: dict[str, Any] = {}
    result["rewritten"] = rag.rewrite_question(QUESTION, talk, backend)
    result["answerable"] = {
        question: rag.check_answerability(question, DOCUMENTS, talk, backend)
        for question in (result["rewritten"], UNKNOWN)
    }
    talk = talk.add(Message("user", result["rewritten"]))
    result["checked"] = rag.flag_hallucinated_content(DRAFT, DOCUMENTS, talk, backend)
    result["cited"] = cite(talk, backend)
    return result


def cite(talk: ChatContext, backend: Any) -> list[dict[str, Any]]:
    """Citations as quoted text, which `rag.find_citations` cannot read: it expects positions in the documents."""
    asked = talk.add(Message("assistant", ANSWER, documents=DOCUMENTS))
    options = {ModelOption.TEMPERATURE: 0.0}
    answered, _ = functional.act(Intrinsic("citations"), asked, backend, model_options=options, strategy=None)
    return json.loads(answered.value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the composed model (its io.yaml files are read)")
    parser.add_argument("--url", default="", help="URL of an OpenAI-compatible server that serves the model")
    parser.add_argument("--name", default="", help="the model's name on the server; the folder by default")
    options = parser.parse_args()
    print(json.dumps(run(backend_for(options.model, options.url, options.name)), indent=2))


if __name__ == "__main__":
    main()
