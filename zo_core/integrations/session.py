"""Load and check a model, a tokenizer and data: the start of every run, sweep and evaluation."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import zo_core
from zo_core import losses
from zo_core.integrations import tasks
from zo_core.integrations.assets import fetch, names
from zo_core.integrations.config import FinetuneConfig
from zo_core.integrations.errors import RunError, first_line
from zo_core.integrations.tasks import Encoded, Prompter, Scorer
from zo_core.weights import some

_BATCHES = 8  # that a calibration takes in turn


class Session(NamedTuple):
    """A model and the encoded parts of a dataset, ready to be scored."""

    config: FinetuneConfig
    model: Any
    tokenizer: Any
    scorer: Scorer
    parts: dict[str, list[Encoded]]
    facts: dict[str, Any]

    def batch_of(self, number: int) -> tasks.Batch:
        """A training batch by its number in the run; it depends on nothing but the number and the seed."""
        train, config = self.parts["train"], self.config
        length = (lambda i: len(train[i].tokens)) if config.group_by_length else None
        labels = [example.label for example in train] if config.stratify else None
        indices = tasks.batch_indices(
            len(train), config.batch_size, step=number, seed=config.seed, length=length, labels=labels
        )
        return self.scorer.batch([train[i] for i in indices])

    def loss_of(self, number: int) -> Callable[[], torch.Tensor]:
        """A closure that returns the loss of a training batch, without gradients."""
        batch, temperature, fit_biases = self.batch_of(number), self.config.temperature, self.config.label_bias > 0
        return torch.no_grad()(lambda: self.scorer.loss(batch, temperature=temperature, fit_biases=fit_biases))

    def closures_of(self, step: int) -> list[Callable[[], torch.Tensor]]:
        """A step's closures: one, or with ``spread`` one for each probe; batches follow one another in the data's order."""
        n = self.config.probes if self.config.spread else 1
        return [self.loss_of(step * n + k) for k in range(n)]

    def fit_label_biases(self, progress: Callable[[int], None] = lambda n: None) -> None:
        """Fit the biases of evaluations to training examples, unless there shall be none; ``progress`` as of ``tasks.evaluate``."""
        scorer, some_examples = self.scorer, self.parts["train"][: self.config.label_bias]
        if some_examples:
            scorer.biases = torch.zeros_like(scorer.biases)
            found = tasks.evaluate(scorer, some_examples, batch_size=self.config.eval_batch_size, progress=progress)
            finite = found.logits.isfinite().all(-1)
            if finite.any():
                shares = losses.label_shares(found.labels[finite], len(scorer.biases))
                scorer.biases = losses.label_biases(found.logits[finite], shares, rounds=200).to(scorer.device)

    def evaluate(
        self, part: str, progress: Callable[[int], None] = lambda n: None, *, fit: bool = True
    ) -> tasks.Evaluation:
        """Score one part of the data, with label biases that are fitted anew if ``fit``; ``progress`` as of ``tasks.evaluate``."""
        if fit:
            self.fit_label_biases(progress)
        size = self.config.eval_batch_size
        return tasks.evaluate(self.scorer, self.parts[part], batch_size=size, progress=progress)

    def calibrate(self, optimizer: zo_core.ZOOptimizer, evaluations: int) -> zo_core.Calibration:
        """Give an optimizer scales that are measured on the first batches. RunError if that does not work."""
        self.model.train(self.config.dropout)
        try:
            return zo_core.calibrate(optimizer, [self.loss_of(k) for k in range(_BATCHES)], evaluations)
        except ValueError as error:
            raise RunError(f"--calibrate: {error}") from error


def prepare(
    config: FinetuneConfig, status: Callable[[str], None] = lambda text: None, *, whole: bool = False
) -> Session:
    """Load and check the data, then the tokenizer, then the model, so that mistakes are found before the slow parts.

    Args:
        config: its Model and Data fields are used. The session has a copy with `labels` and `autocast` filled in.
        status: called with a short sentence at the start of each slow stage.
        whole: make one part, `all`, of the data instead of `train`, `validation` and `test`.

    Raises:
        AssetError: a named model or dataset could not be fetched.
        TaskError: the data, the template or the label words cannot be used.
        RunError: the model or the device cannot be used.
    """
    status("reading data")
    if config.data in names("dataset"):
        examples = tasks.read_examples(fetch(config.data, status) / "data.jsonl")
    else:
        examples = tasks.read_examples(Path(config.data).expanduser(), config.text_column, config.label_column)
    words = tasks.label_words(examples, config.labels, all_occur=not whole)
    if whole:
        parts = {"all": examples}
    else:
        parts = tasks.split_examples(
            examples, validation=config.validation_size, test=config.test_size, seed=config.split_seed
        )._asdict()
    source, device = model_source(config.model, status), _device(config.device)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise RunError("transformers is missing: pip install 'zo_core[train]'") from error
    status(f"loading {config.model}")
    with loading(config.model):
        tokenizer = AutoTokenizer.from_pretrained(source)
    prompter = Prompter(tokenizer, config.template, words, config.max_length)
    with loading(config.model):
        options = {"dtype": getattr(torch, config.dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model, found = loaded
    if absent := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        raise RunError(
            f"--model {config.model!r} lacks {some(absent)} in the shape that {type(model).__name__} has, which would be "
            f"random numbers: expected a causal language model, got {', '.join(model.config.architectures or ['another'])}"
        )
    model = model.to(device).eval()
    longest = getattr(model.config, "max_position_embeddings", None)
    prompter.max_length = min(config.max_length, longest or config.max_length)
    encoded = {name: prompter.encode(part) for name, part in parts.items()}
    _check_tokens(config.model, model, tokenizer, prompter, encoded)
    scorer, some_examples = Scorer(model, prompter.label_tokens), next(part for part in encoded.values() if part)
    start = some_examples[0].tokens[:4]
    if not scorer.is_causal(start):
        raise RunError(
            f"--model {config.model!r}: expected a causal language model, got {type(model).__name__} whose tokens see those "
            "that follow, as a masked language model's do: choose a model that was trained to continue a text"
        )
    scorer.left = scorer.pads_left(start)
    scorer.autocast = bool(config.autocast) and config.dtype == "float32"
    if config.autocast is None and config.dtype == "float32":
        status("timing a forward with and without autocast")
        scorer.autocast = _autocast_is_faster(scorer, scorer.batch(some_examples[: config.batch_size]))
    facts = {
        "name": config.data,
        **{name: len(part) for name, part in parts.items()},
        "repeated": len(examples) - sum(map(len, parts.values())),
        "truncated": prompter.truncated,
        "sha256": hashlib.sha256(json.dumps([encoded, prompter.label_tokens]).encode()).hexdigest(),
        "majority": {name: _majority(part) for name, part in encoded.items()},
    }
    config = config.model_copy(update={"labels": words, "autocast": scorer.autocast})
    return Session(config, model, tokenizer, scorer, encoded, facts)


def _check_tokens(name: str, model: Any, tokenizer: Any, prompter: Prompter, parts: dict[str, list[Encoded]]) -> None:
    """RunError if the data has a token that the model's embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(*prompter.label_tokens, *(max(e.tokens) for part in parts.values() for e in part))
    if largest >= rows:
        raise RunError(
            f"--model {name!r}: its tokenizer has {len(tokenizer)} tokens and gives number {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), its embedding has {rows} rows: use the tokenizer that the model "
            f"was trained with, or save the model after model.resize_token_embeddings({len(tokenizer)})"
        )


def _majority(part: list[Encoded]) -> float:
    """The accuracy of a model that always answers the most frequent label."""
    return max(Counter(example.label for example in part).values()) / len(part)


@contextmanager
def loading(name: str, what: str = "--model") -> Iterator[None]:
    """Turn any error of `from_pretrained` (a damaged folder, an unknown name, no network) into a RunError of one sentence."""
    try:
        yield
    except Exception as error:
        raise RunError(
            f"{what} {name!r} does not load: {first_line(error)}; expected a name "
            f"({', '.join(names('model'))}), a folder with a causal language model and its tokenizer, or a "
            "hub id (needs network)"
        ) from error


@torch.no_grad()
def _autocast_is_faster(scorer: Scorer, batch: tasks.Batch) -> bool:
    """Whether a forward is faster in bfloat16 (best of three runs each); it is slower where a CPU has to emulate it."""
    seconds: dict[bool, float] = {}
    for _ in range(3):
        for scorer.autocast in (False, True):
            start = time.perf_counter()
            scorer(batch).sum().item()
            took = time.perf_counter() - start
            seconds[scorer.autocast] = min(took, seconds.get(scorer.autocast, took))
    return seconds[True] < 0.9 * seconds[False]


def model_source(name: str, status: Callable[[str], None], what: str = "--model") -> str:
    """What `from_pretrained` is to load: the folder of an asset, a folder of the user, or `name` as a hub id."""
    if name in names("model"):
        return str(fetch(name, status))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        found = "a file" if path.exists() else "nothing"
        raise RunError(f"{what} {name!r}: expected a folder with a model, found {found} there")
    return name


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(1, device=device).item()  # also refuses "meta"
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name!r} cannot be used: {first_line(error)}") from error
    return device


def evaluate(
    config: FinetuneConfig, part: str = "test", status: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Evaluate a model on one part of the data: a dict of n, accuracy, interval, loss and seconds.

    Args:
        config: its Model and Data fields are used.
        part: "train", "validation", "test", or "all" for the whole data.
        status: called with a short sentence at the start of each slow stage.

    Raises:
        AssetError, TaskError, RunError: see `prepare`.
    """
    session = prepare(config, status, whole=part == "all")
    status(f"evaluating {len(session.parts[part])} examples")
    start = time.perf_counter()
    found = tasks.evaluate(session.scorer, session.parts[part], batch_size=config.eval_batch_size)
    seconds = round(time.perf_counter() - start, 3)
    return {"model": config.model, "data": config.data, "part": part, **found.report(), "seconds": seconds}
