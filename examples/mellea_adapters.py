"""Mellea calls the adapters of a composed model: rewrite, answerability, hallucinations, citations.

Against a vLLM server (Mellea's plain install is enough here):

    vllm serve out/granite-switch-sample --served-model-name sample
    python examples/mellea_adapters.py out/granite-switch-sample --url http://localhost:8000/v1 --name sample

or in this process, with transformers (pip install mellea llguidance granite-switch[hf]):

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
DRAFT = "Ada lives in Tarn. Ada plays the flute."  # an answer to be checked
ANSWER = "Ada lives in Tarn."  # and one to be given its sources


def backend_for(model: str, url: str, name: str) -> Any:
    """Mellea's backend: a server's, or transformers."""
    if url:
        from mellea.backends.openai import OpenAIBackend

        backend = OpenAIBackend(name or model, base_url=url, api_key="none")
        backend.register_embedded_adapter_model(model)
        return backend
    from mellea.backends.huggingface import LocalHFBackend

    return LocalHFBackend(model, load_embedded_adapters=True)


def run(backend: Any) -> dict[str, Any]:
    """Four adapters: three through Mellea's own functions, one by its name."""
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
    """An adapter with an answer of its own form: the sample's quotes text, `rag.find_citations` wants places in it."""
    asked = talk.add(Message("assistant", ANSWER, documents=DOCUMENTS))
    options = {ModelOption.TEMPERATURE: 0.0}
    answered, _ = functional.act(Intrinsic("citations"), asked, backend, model_options=options, strategy=None)
    return json.loads(answered.value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the composed model (its io.yaml files are read)")
    parser.add_argument("--url", default="", help="of an OpenAI-compatible server that serves it")
    parser.add_argument("--name", default="", help="under which the server serves it; the folder by default")
    options = parser.parse_args()
    print(json.dumps(run(backend_for(options.model, options.url, options.name)), indent=2))


if __name__ == "__main__":
    main()
