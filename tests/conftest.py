"""Fixtures that the tests share: everything tiny, random, offline and on the CPU."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging as transformers_logging

from pointalign.models.language_model import EMBEDDED, resolve_language_model
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor
from randomness import randomize

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so the commands that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")
torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<point>"]
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)
NUM_POINTS = 48
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Files whose tests take longest: begun first, so that no process is left alone with one of them at the end.
LONGEST = (
    "test_runs.py",
    "test_recipes.py",
    "test_answering_benchmarks.py",
    "test_quickstart.py",
    "test_processes.py",
    "test_sweep.py",
    "test_training_benchmarks.py",
    "test_evaluate.py",
    "test_caption.py",
    "test_household_curve.py",
    "test_encoding_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw is the same whatever ran before."""
    set_seed(0)


def make_tokenizer(special_tokens: list[str] = SPECIAL_TOKENS, chat_template: str | None = CHATML) -> Any:
    """A tokenizer with one token per byte, then the special tokens; `<|im_end|>` ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config(
    kind: str = "qformer", tied: bool = False, qformer_dropout: float = 0.0, layers: int = 4, **text: Any
) -> PointAlignConfig:
    """A model of some 30,000 weights. All stacks have equally many layers, so that none is found by its length alone."""
    return PointAlignConfig(
        point_encoder_config={
            "num_groups": 8,
            "group_size": 6,
            "group_hidden_sizes": (8, 12, 16),
            "group_width": 10,
            "hidden_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "position_hidden_size": 8,
        },
        connector_config={
            "kind": kind,
            "hidden_sizes": (20,),
            "num_query_tokens": 5,
            "projection_size": 28,
            "qformer_config": {
                "vocab_size": 1,
                "hidden_size": 24,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "encoder_hidden_size": 18,
                "cross_attention_frequency": 2,
                "hidden_dropout_prob": qformer_dropout,
                "attention_probs_dropout_prob": qformer_dropout,
                "max_position_embeddings": 8,
            },
        },
        text_config=LlamaConfig(
            **{
                "vocab_size": VOCABULARY_SIZE,
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "tie_word_embeddings": tied,
                "pad_token_id": 256,
                "bos_token_id": 257,
                "eos_token_id": 258,
                **text,
            }
        ).to_dict(),
        point_token_id=259,
    )


def make_model(seed: int = 0, **kwargs: Any) -> PointAlignForConditionalGeneration:
    """A tiny model in evaluation mode whose outputs depend visibly on every weight."""
    model = PointAlignForConditionalGeneration(make_config(**kwargs))
    randomize(model, seed)
    model.generation_config.pad_token_id = 256
    return model.eval()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PointAlignForConditionalGeneration]:
    """`make_model`."""
    return make_model


@pytest.fixture(scope="session")
def build_around() -> Callable[[PreTrainedConfig], PointAlignForConditionalGeneration]:
    """From a language model's configuration to a tiny model around it."""

    def build(text: PreTrainedConfig) -> PointAlignForConditionalGeneration:
        sizes: Any = make_config()
        return PointAlignForConditionalGeneration(
            PointAlignConfig(
                point_encoder_config=sizes.point_encoder_config.to_dict(),
                connector_config=sizes.connector_config.to_dict(),
                text_config=text.to_dict(),
                point_token_id=259,
            )
        )

    return build


@pytest.fixture(scope="session")
def write_extra() -> Callable[[Path, Sequence[str]], Path]:
    """Writes a file as `pointalign data extra` does, of made-up objects with these nouns."""

    def write(path: Path, nouns: Sequence[str]) -> Path:
        import pyarrow as pa

        from pointalign.data.household_build import write_clouds

        clouds = np.random.default_rng(0).integers(0, 256, (len(nouns), 2048, 6))
        names = pa.array([f"extra-{number}" for number in range(len(nouns))])
        columns = {
            **dict.fromkeys(("id", "name", "category", "creator", "licence", "source", "family"), names),
            "tags": pa.array([[] for _ in nouns], pa.list_(pa.string())),
            "size": pa.array([None for _ in nouns], pa.list_(pa.float32())),
            "label": pa.array([None for _ in nouns], pa.string()),
            "noun": pa.array(list(nouns)),
        }
        write_clouds(path, columns, list(clouds))
        return path

    return write


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer`."""
    return make_tokenizer


@pytest.fixture
def model() -> PointAlignForConditionalGeneration:
    """A new tiny Q-Former model over a tiny random Llama."""
    return make_model()


@pytest.fixture
def tokenizer() -> Any:
    """A new byte-level tokenizer with a chat template and `<point>`."""
    return make_tokenizer()


@pytest.fixture
def processor(tokenizer: Any) -> PointAlignProcessor:
    """The processor that fits `model`."""
    return PointAlignProcessor(tokenizer, num_points=NUM_POINTS, num_point_tokens=5, min_points=6)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `processor`, as `pointalign` commands take it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model().save_pretrained(folder)
    PointAlignProcessor(make_tokenizer(), num_points=NUM_POINTS, num_point_tokens=5, min_points=6).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def clouds() -> Tensor:
    """Four coloured clouds (4, N, 6) as the processor gives them."""
    generator = torch.Generator().manual_seed(11)
    xyz = torch.randn(4, NUM_POINTS, 3, generator=generator)
    xyz = xyz - xyz.mean(dim=1, keepdim=True)
    xyz = xyz / xyz.norm(dim=-1).amax(dim=1)[:, None, None]
    return torch.cat([xyz, torch.rand(4, NUM_POINTS, 3, generator=generator)], dim=-1)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the golden outputs of the released code."""
    if not REFERENCE.is_dir():
        pytest.skip(
            f"golden outputs of the released code are not here: {REFERENCE.name}/ is missing beside the checkout"
        )
    return REFERENCE


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder, in force for the whole session, that holds the embedded SmolLM2, converted once."""
    embedded = EMBEDDED["smollm2-135m"]
    if importlib.util.find_spec(embedded.package) is None:
        pytest.skip(f"the {embedded.package} wheel is not installed: {embedded.install}")
    folder = tmp_path_factory.mktemp("pointalign-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTALIGN_CACHE", str(folder))
        resolve_language_model("smollm2-135m")
        yield folder
