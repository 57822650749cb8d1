"""Classification as prompting: read (text, label) data, split it, batch it, score the label words.

An example becomes the prompt `template.format(text=...)`; each label value has a word, and the model's
prediction is the label whose word's first token has the largest next-token logit. The loss is the
cross-entropy over these label tokens only.
"""

from __future__ import annotations

import csv
import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from zo_core import losses
from zo_core.integrations.assets import names
from zo_core.noise import permutation


class TaskError(ValueError):
    """Data, template or label words that cannot be used; the message says what to do."""


class Example(NamedTuple):
    """One text and its label value, as they stand in the data."""

    text: str
    label: str


class Encoded(NamedTuple):
    """One prompt as token ids, and the index of its label."""

    tokens: list[int]
    label: int


class Batch(NamedTuple):
    """Left-padded prompts: `input_ids` and `attention_mask` (batch, time), `labels` (batch,), all int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


class Split(NamedTuple):
    """The three parts of a dataset; no text is in two of them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


# ---- reading ---------------------------------------------------------------------------------------------


def read_examples(path: Path, text_column: str = "text", label_column: str = "label") -> list[Example]:
    """Read a CSV, TSV or JSON-lines file (by its suffix), UTF-8, one example a row; texts are stripped.

    Raises:
        TaskError: no such file, not UTF-8, malformed, a missing column, or an empty text or label.

    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    if path.suffix.lower() not in readers:
        known = f"a name ({', '.join(names('dataset'))}) or a file ending in {', '.join(readers)}"
        raise TaskError(f"--data {str(path)!r}: expected {known}")
    examples = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in readers[path.suffix.lower()](file):
                where = f"data {str(path)!r}, line {number}"
                for column in (text_column, label_column):
                    if column not in row:
                        raise TaskError(
                            f"{where}: no column {column!r}, found {', '.join(map(repr, row)) or 'none'}; "
                            "name them with --text-column and --label-column"
                        )
                text, label = (_plain(row[column]) for column in (text_column, label_column))
                if not text or not label:
                    empty = label_column if text else text_column
                    raise TaskError(f"{where}: column {empty!r} is empty; fill it in or remove the line")
                examples.append(Example(text, label))
    except UnicodeDecodeError as error:
        raise TaskError(f"data {str(path)!r} is not UTF-8 ({error}); convert it, as with iconv") from error
    except OSError as error:
        raise TaskError(f"data {str(path)!r} cannot be read: {error.strerror}") from error
    except (csv.Error, json.JSONDecodeError) as error:
        raise TaskError(f"data {str(path)!r} is malformed after {len(examples)} examples: {error}") from error
    if not examples:
        raise TaskError(f"data {str(path)!r} has no examples")
    return examples


def _read_csv(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, delimiter="\t" if file.name.lower().endswith(".tsv") else ",", strict=True)
    for row in reader:
        row.pop(None, None)  # cells beyond the header
        yield reader.line_num, row


def _read_jsonl(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TaskError(f"data {file.name!r}, line {number}: expected a JSON object, got {line[:40]!r}")
            yield number, row


def _plain(value: Any) -> str:
    """A cell as text; numbers and booleans as JSON writes them, a missing value as the empty string."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def split_examples(examples: Sequence[Example], *, validation: float, test: float, seed: int) -> Split:
    """Divide examples at random into train, validation and test, the same way for the same seed.

    Repeated texts (up to white space and case) count once, with their first label. The test part depends
    only on the data, `test` and `seed`.

    Args:
        examples: what to divide.
        validation: size of the validation part: a number of examples, or a fraction when under 1.
        test: size of the test part, likewise.
        seed: of the division.

    Raises:
        TaskError: a part would be empty, or the training part would lack a label.

    """
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(" ".join(example.text.lower().split()), example)
    unique = list(first.values())
    sizes = [math.ceil(size * len(unique)) if size < 1 else int(size) for size in (test, validation)]
    order = [unique[i] for i in permutation(len(unique), seed=seed, stream=0).tolist()]
    parts = order[: sizes[0]], order[sizes[0] : sum(sizes)], order[sum(sizes) :]
    if min(sizes) < 1 or not parts[2]:
        raise TaskError(
            f"--test-size {test:g} and --validation-size {validation:g}: expected no empty part, got "
            f"{sizes[0]} test, {sizes[1]} validation and {len(parts[2])} training examples of {len(unique)} "
            "different texts; choose other sizes or add data"
        )
    if missing := {e.label for e in unique} - {e.label for e in parts[2]}:
        raise TaskError(
            f"no training example has the label {', '.join(map(repr, sorted(missing)))}; add examples of it, "
            "or make --test-size and --validation-size smaller"
        )
    return Split(train=parts[2], validation=parts[1], test=parts[0])


def label_words(
    examples: Iterable[Example], words: Mapping[str, str] | None = None, *, all_occur: bool = True
) -> dict[str, str]:
    """Label value -> word, in sorted order of the values; without `words`, the value itself after a space.

    Raises:
        TaskError: fewer than two values, a value without a word, or (unless `all_occur` is False) a word
            for a value that never occurs.

    """
    counts = Counter(example.label for example in examples)
    shown = ", ".join(f"{value!r} ({count})" for value, count in counts.most_common(10))
    if words is None:
        words = {value: f" {value}" for value in counts}
    if all_occur and len(counts) < 2:
        raise TaskError(f"labels: expected at least two different values, the data has {shown}")
    if lacking := sorted(set(counts) - set(words)):
        raise TaskError(f"--label: no word for {lacking[0]!r}; the data has {shown}; add --label '{lacking[0]}= word'")
    if all_occur and (extra := sorted(set(words) - set(counts))):
        raise TaskError(f"--label: {extra[0]!r} never occurs as a label; the data has {shown}")
    if len(words) < 2:
        raise TaskError(f"--label: expected words for at least two values, got one; the data has {shown}")
    return {value: words[value] for value in sorted(words)}


# ---- prompts ---------------------------------------------------------------------------------------------


class Prompter:
    """Turns examples into token ids for one tokenizer, template and set of label words.

    Args:
        tokenizer: a transformers tokenizer.
        template: the prompt, with `{text}` where the text goes.
        words: label value -> word that follows the prompt.
        max_length: longest prompt in tokens; of a longer one the end is kept.

    Raises:
        TaskError: a template without `{text}`, or label words whose first tokens are not distinct.

    """

    def __init__(self, tokenizer: Any, template: str, words: Mapping[str, str], max_length: int = 256) -> None:
        """Find the label tokens, and check that they can be told apart."""
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.index = {value: i for i, value in enumerate(words)}
        self.truncated = 0
        if "{text}" not in template:
            raise TaskError(f"--template: expected {{text}} where the text goes, got {template!r}")
        self.label_tokens = [self._first_token(word) for word in words.values()]
        for i, token in enumerate(self.label_tokens):
            if token in self.label_tokens[:i]:
                one, two = list(words.values())[self.label_tokens.index(token)], list(words.values())[i]
                raise TaskError(
                    f"--label: the words {one!r} and {two!r} start with the same token "
                    f"{tokenizer.convert_ids_to_tokens(token)!r}; choose words that differ there"
                )

    def _first_token(self, word: str) -> int:
        """The token that follows the prompt when `word` does, as the tokenizer splits the whole text."""
        prompt = self.template.replace("{text}", "text")
        before, after = self.tokenizer([prompt, prompt + word], add_special_tokens=False).input_ids
        if after[: len(before)] != before or len(after) == len(before):
            raise TaskError(
                f"--template and --label: {word!r} does not start a new token after {prompt[-20:]!r}; let "
                "the template end without a space and the words begin with one"
            )
        return int(after[len(before)])

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids of each example's prompt, at most `max_length`; `truncated` counts the longer ones."""
        if not examples:
            return []
        encoded = []
        texts = [self.template.replace("{text}", example.text) for example in examples]
        for example, tokens in zip(examples, self.tokenizer(texts).input_ids, strict=True):
            if len(tokens) > self.max_length:
                self.truncated += 1
                first = tokens[:1] if tokens[0] == self.tokenizer.bos_token_id else []
                tokens = first + tokens[len(tokens) - self.max_length + len(first) :]
            encoded.append(Encoded(tokens, self.index[example.label]))
        return encoded


def collate(examples: Sequence[Encoded], device: torch.device | str = "cpu") -> Batch:
    """Pad on the left to the longest prompt. Padding is token 0 and masked, so no pad token is needed."""
    length = max(len(example.tokens) for example in examples)
    rows = [[0] * (length - len(e.tokens)) + e.tokens for e in examples]
    masks = [[0] * (length - len(e.tokens)) + [1] * len(e.tokens) for e in examples]
    labels = [e.label for e in examples]
    return Batch(*(torch.tensor(values, device=device) for values in (rows, masks, labels)))


def batch_indices(n: int, batch_size: int, *, step: int, seed: int) -> list[int]:
    """Which of `n` training examples step number `step` uses; a pure function, so a run can start anywhere.

    Each epoch is its own permutation; a batch at the end of one goes on into the next.
    """
    start = step * batch_size
    chosen: list[int] = []
    while len(chosen) < batch_size:
        epoch, offset = divmod(start + len(chosen), n)
        order = permutation(n, seed=seed, stream=1 + epoch)
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return chosen


# ---- scoring ---------------------------------------------------------------------------------------------


class Scorer:
    """Label logits of a causal language model: one forward, the last position, the label tokens only.

    Args:
        model: a transformers causal LM, on its device.
        label_tokens: the token of each label.
        autocast: run the forward in bfloat16 autocast over the model's own weights.

    """

    def __init__(self, model: torch.nn.Module, label_tokens: Sequence[int], autocast: bool = False) -> None:
        """Look up what the model's forward accepts."""
        self.model, self.autocast = model, autocast
        self.device = next(model.parameters()).device
        self.label_tokens = torch.tensor(label_tokens, device=self.device)
        accepted = inspect.signature(model.forward).parameters
        wanted: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
        self.options = {name: value for name, value in wanted.items() if name in accepted}
        self.positions = "position_ids" in accepted

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context. Held around many forwards of unchanged weights it casts each weight once."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Float32 logits (batch, labels)."""
        options = dict(self.options)
        if self.positions:  # absolute position embeddings count from the first real token
            options["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with self.precision():
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        logits: torch.Tensor = output.logits
        return logits[:, -1, self.label_tokens].float()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the label words, a float32 scalar."""
        return losses.cross_entropy(self(batch), batch.labels)


@dataclass(frozen=True)
class Evaluation:
    """What a set of examples gave, in their order: `correct` (n,) bool, `losses` (n,) float32."""

    correct: torch.Tensor
    losses: torch.Tensor

    @property
    def n(self) -> int:
        """How many examples."""
        return len(self.correct)

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Fraction predicted right."""
        return int(self.correct.sum()) / self.n

    def report(self) -> dict[str, Any]:
        """Numbers for JSON: n, accuracy, its Wilson 95% interval, loss."""
        interval = wilson_interval(int(self.correct.sum()), self.n)
        return {"n": self.n, "accuracy": self.accuracy, "interval": list(interval), "loss": self.loss}


def evaluate(
    scorer: Scorer,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda n: None,
) -> Evaluation:
    """Score all examples without dropout, sorted by length so that little is padded.

    Args:
        scorer: the model and its label tokens.
        examples: at least one.
        batch_size: examples a forward.
        progress: called with the number of examples of each batch when it is done; may raise to stop.

    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    correct, losses = torch.empty(len(examples), dtype=torch.bool), torch.empty(len(examples))
    training = scorer.model.training
    scorer.model.eval()
    try:
        with torch.no_grad(), scorer.precision():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = collate([examples[i] for i in chosen], scorer.device)
                logits = scorer(batch)
                correct[torch.tensor(chosen)] = (logits.argmax(-1) == batch.labels).cpu()
                losses[torch.tensor(chosen)] = F.cross_entropy(logits, batch.labels, reduction="none").cpu()
                progress(len(chosen))
    finally:
        scorer.model.train(training)
    return Evaluation(correct, losses)


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (95% by default), which stays inside [0, 1]."""
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: torch.Tensor, after: torch.Tensor, z: float = 1.959964) -> dict[str, Any]:
    """Change of accuracy on the same examples, with its Wald 95% interval for paired proportions.

    Args:
        before: (n,) bool, right or wrong before.
        after: likewise, after.
        z: normal quantile of the interval.

    """
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    difference = (gained - lost) / n
    half = z * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / n)) / n
    return {
        "difference": difference,
        "interval": [difference - half, difference + half],
        "gained": gained,
        "lost": lost,
    }
