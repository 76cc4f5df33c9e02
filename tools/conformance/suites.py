"""The suites: what each needs, how it is asked to run, and what of it does not apply to this server, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

# the names by which the suites' own tests ask for a model
OPENAI_NAMES = ("gpt-6-astra", "gpt-3.5-turbo-instruct", "text-embedding-3-small", "model")


@dataclass(frozen=True)
class Suite:
    """``command`` runs in ``folder``; ``{python}``, ``{url}``, ``{here}``, ``{modules}``, ``{source}``, ``{work}`` and ``{root}`` are
    filled in.

    ``package`` names the requirement whose version is told; ``unpack`` is one whose source archive is fetched from PyPI, and
    ``{source}`` is where that lies. ``not_applicable`` holds (pattern of a test's name or message, reason).
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    command: tuple[str, ...]
    folder: str = "{here}"
    package: str = ""
    unpack: str = ""
    needs: str = ""  # what --source has to name
    usual: str = ""  # where that is looked for, from the project's folder
    kind: str = "python"  # or node
    server: tuple[str, ...] = ()
    not_applicable: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()  # environment
    own: str = ""  # whose parameters those are that are not known here, which then do not apply


RESOURCES = (
    "tests/api_resources/chat/test_completions.py", "tests/api_resources/test_completions.py", "tests/api_resources/test_embeddings.py",
    "tests/api_resources/test_models.py", "tests/api_resources/test_responses.py", "tests/api_resources/responses",
)  # fmt: skip
OPENAI_TOOLS = (
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "pytest-asyncio==1.5.0",
    "inline-snapshot==0.36.1",
    "rich==15.0.0",
    "aiohttp==3.14.5",
)
# of tests that were written for a mock server, which takes anything
MOCK = (
    (r"input must be given", "asks without an input, which the suite's mock server takes"),
    (r"input should be (greater|less)|out_of_range", "sends 0, or another placeholder that is out of range"),
    (r"logit_bias: 'foo' is not a token id", "sends the placeholder 'foo' as a token id"),
    (r"(?s)api_resources/test_completions.py.*all_params.*(None, float|APIResponseValidationError)",
     "the first token of an echoed prompt has null for a log-probability, with OpenAI too, and the package's types know numbers only"),
    (r"dimensions: this model's vectors", "asks for vectors of length 1"),
    (r"(?s)test_embeddings.py.*(strict|aiohttp).*APIResponseValidationError",
     "the package asks for base64 and its strict check runs before it decodes that: OpenAI's own answers fail it too"),
)  # fmt: skip
PYTEST = ("{python}", "-m", "pytest", "-p", "watch", "-q", "-p", "no:cacheprovider")
LLAMA_OWN = (
    (r"assert '' is None", "wants null for the content of a stream's first piece, which is '' with OpenAI and here"),
    (r"test_server_multiple_addresses", "wants one server at several addresses"),
    (r"test_server_(models|props|slots)|test_load_split", "wants llama.cpp's own list of models, properties or slots"),
    (r"test_chat_completion(_stream|_cached_tokens|_with_openai_library)?(\[|\n)|test_embedding_usage|test_chat_completions_multiple",
     "compares the build number of llama.cpp, or words and token counts of its own model"),
    (r"test_responses_(stream_)?with_openai_library", "compares words and the number of events that its own model gives"),
    (r"test_logit_bias", "sends logit_bias in llama.cpp's own forms"),
    (r"test_context_size_exceeded", "wants llama.cpp's type of error; here it is OpenAI's (context_length_exceeded)"),
    (r"test_embedding_mixed_input", "mixes texts and ids, or sends an empty text: refused by design"),
    (r"test_access_static_assets", "wants the files of llama.cpp's own page"),
    (r"test_cors_options", "wants pages of other sites let in: refused by design"),
)  # fmt: skip
LLAMA = tuple(
    f"unit/test_{name}.py"
    for name in ("basic", "chat_completion", "ctx_shift", "embedding", "security", "tokenize", "compat_oai_responses")
)
MADE_UP = ("resp_677efb5139a88190b512bc3fef8e535d", "resp_123", "response_id", "previous_response_id")
ALIASES = tuple(word for name in OPENAI_NAMES for word in ("--alias", name))
MADE = tuple(word for id in MADE_UP for word in ("--made-up", id))

SUITES = (
    Suite(
        "openai-python", "openai-python's own tests of chat, completions, embeddings, models and responses",
        ("openai==3.57.0", *OPENAI_TOOLS), (*PYTEST, "-n0", *RESOURCES), folder="{source}", package="openai", unpack="openai==3.57.0",
        server=(*ALIASES, *MADE, "--database", "{work}/store.sqlite"),
        settings=(("TEST_API_BASE_URL", "{url}/v1"),), not_applicable=MOCK,
    ),
    Suite(
        "openai-python-without", "the same, each request asked again without the parameters that were refused",
        ("openai==3.57.0", *OPENAI_TOOLS), (*PYTEST, "-n0", *RESOURCES), folder="{source}", package="openai", unpack="openai==3.57.0",
        server=(*ALIASES, *MADE, "--database", "{work}/store.sqlite", "--drop-refused"),
        settings=(("TEST_API_BASE_URL", "{url}/v1"),), not_applicable=MOCK,
    ),
    Suite(
        "openai-client", "the openai package as a client: chat, streams, tools, structured output, completions, embeddings, errors",
        ("openai==3.57.0", *OPENAI_TOOLS), (*PYTEST, "clients/test_openai_client.py"), package="openai",
        server=("--database", "{work}/store.sqlite"),
    ),
    Suite(
        "anthropic-client", "the anthropic package as a client: messages, streams, tools, counting, errors",
        ("anthropic==2.13.0", "pytest==9.2.0"), (*PYTEST, "clients/test_anthropic_client.py"), package="anthropic",
    ),
    Suite(
        "openai-node", "the openai package for Node.js as a client: chat, streams, tools, structured output, embeddings, responses",
        ("openai@7.59.0", "zod@4"), ("node", "clients/openai_client.mjs"), package="openai", kind="node",
        server=("--database", "{work}/store.sqlite"), settings=(("CRIADERO_MODULES", "{modules}"),),
    ),
    Suite(
        "schemathesis", "schemathesis on our own OpenAPI document: every operation, right and wrong requests, answers compared with it",
        ("schemathesis==4.32.5",), ("{python}", "schemathesis_spec.py"), package="schemathesis",
        server=("--database", "{work}/store.sqlite"),
    ),
    Suite(
        "schemathesis-openai", "schemathesis on OpenAI's OpenAPI document, for the paths that are ours: no request may be a server error",
        ("schemathesis==4.32.5",), ("{python}", "schemathesis_spec.py", "{source}"), package="schemathesis",
        needs="a checkout of openai/openai-openapi",
        server=(*ALIASES, "--database", "{work}/store.sqlite"),
    ),
    Suite(
        "langchain", "langchain's standard tests of chat models and embeddings, with langchain-openai",
        ("langchain-tests==1.1.9", "langchain-openai==1.7.4"), (*PYTEST, "-o", "asyncio_mode=auto", "-o",
        "asyncio_default_test_loop_scope=session", "--disable-recording", "clients/test_langchain.py"), package="langchain-tests",
        server=("--alias", "model"),
        not_applicable=(
            (r"test_agent_loop|test_tool_calling(_async)?(\[|$|\n)|test_unicode_tool|test_json_mode",
             "wants the right arguments, keys or words of the model, and cria-chat has ten million parameters; the call itself came back"),
            ("VCR", "measures against a recording"),
        ),
    ),
    Suite(
        "lm-eval", "lm-eval's local-completions (token ids, echo, log-probabilities): scores as computed in process",
        ("lm-eval[api]==0.4.13", "transformers==5.24.0"), ("{python}", "lm_eval_scores.py", "{source}/openbook_qa.jsonl"),
        package="lm-eval",
        needs="a folder with openbook_qa.jsonl (query, choices, gold)", usual="../shared/data/eval/openbook_qa",
    ),
    Suite(
        "llama.cpp", "test files of llama.cpp's server, which start it for each test: a script takes its flags and starts ours",
        ("pytest==9.2.0", "openai==3.57.0", "requests==2.34.2", "wget==3.2", "filelock==4.3.1", "numpy==2.4.6",
         "prometheus-client==0.26.0", "huggingface_hub==2.4.0", "aiohttp==3.14.5"),
        (*PYTEST, *LLAMA), folder="{source}/vendor/llama.cpp/tools/server/tests", package="llama-cpp-python",
        unpack="llama-cpp-python==0.3.36", settings=(("LLAMA_SERVER_BIN_PATH", "{here}/llama_server.sh"),),
        own="llama.cpp", not_applicable=LLAMA_OWN,
    ),
)  # fmt: skip
