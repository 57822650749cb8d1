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
    """Padded prompts: `input_ids` and `attention_mask` (batch, time), `labels` (batch,), all int64."""

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
        TaskError: no such file, not UTF-8, malformed, a column that is missing or there twice, cells that no column
            holds, or an empty text or label. All but the first two name the line.

    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    if path.suffix.lower() not in readers:
        known = f"a name ({', '.join(names('dataset'))}) or a file ending in {', '.join(readers)}"
        raise TaskError(f"--data {str(path)!r}: expected {known}")
    if text_column == label_column:
        raise TaskError(f"--text-column and --label-column: expected two columns, got {text_column!r} for both")
    examples = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in readers[path.suffix.lower()](file):
                where = f"data {str(path)!r}, line {number}"
                columns = [name for name, _ in row]
                for column in (text_column, label_column):
                    if columns.count(column) != 1:
                        raise TaskError(
                            f"{where}: expected one column {column!r}, found {', '.join(map(repr, columns)) or 'none'}; "
                            "name the columns with --text-column and --label-column"
                        )
                cells = dict(row)
                text, label = (_plain(cells[column], where, column) for column in (text_column, label_column))
                examples.append(Example(text, label))
    except UnicodeDecodeError as error:
        raise TaskError(f"data {str(path)!r} is not UTF-8 ({error}); convert it, as with iconv") from error
    except OSError as error:
        raise TaskError(f"data {str(path)!r} cannot be read: {error.strerror}") from error
    if not examples:
        raise TaskError(f"data {str(path)!r} has no examples")
    return examples


Row = tuple[int, list[tuple[str, Any]]]  # the number of a line, and its cells with their columns


def _read_csv(file: Any) -> Iterator[Row]:
    before = csv.field_size_limit(2**31 - 1)  # of all of Python's csv: 131,072 characters unless it is raised
    reader = csv.reader(file, delimiter="\t" if file.name.lower().endswith(".tsv") else ",", strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if any(cells[len(header) :]):
                raise TaskError(
                    f"data {file.name!r}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}; "
                    "put a text that contains the separator in double quotes"
                )
            if cells:  # an empty line has none
                yield reader.line_num, list(zip(header, cells + [""] * len(header), strict=False))
    except csv.Error as error:
        raise TaskError(f"data {file.name!r}, line {reader.line_num}: malformed, {error}") from error
    finally:
        csv.field_size_limit(before)


def _read_jsonl(file: Any) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            raise TaskError(f"data {file.name!r}, line {number}: expected a JSON object, got {line[:40]!r}")
        try:
            yield number, json.loads(line, object_pairs_hook=list)  # a dict would keep the last of equal names only
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
            raise TaskError(f"data {file.name!r}, line {number}: malformed JSON, {what}") from error


def _plain(value: Any, where: str, column: str) -> str:
    """A cell as text, not empty; numbers and booleans as JSON writes them."""
    if isinstance(value, list):
        raise TaskError(f"{where}: column {column!r} holds a list or an object; expected text or a number")
    text = value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
    if not text.isascii() and text != text.encode(errors="ignore").decode():
        raise TaskError(f"{where}: column {column!r} is no text that UTF-8 can write: it has half of a surrogate pair")
    if not text:
        raise TaskError(f"{where}: column {column!r} is empty; fill it in or remove the line")
    return text


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
    examples: Iterable[Example], words: Mapping[str, str] | Sequence[str] | None = None, *, all_occur: bool = True
) -> dict[str, str]:
    """Label value -> word, in sorted order of the values; without `words`, the value itself after a space.

    Args:
        examples: the data.
        words: value -> word, or texts "VALUE=WORD". In a text with several `=`, VALUE is the longest one of the data.
        all_occur: refuse a word for a value that never occurs.

    Raises:
        TaskError: fewer than two values, a value without a word or with two, or one that never occurs.

    """
    counts = Counter(example.label for example in examples)
    shown = ", ".join(f"{value!r} ({count})" for value, count in counts.most_common(10))
    if words is None:
        words = {value: f" {value}" for value in counts}
    elif not isinstance(words, Mapping):
        pairs = []
        for given in words:
            splits = [(given[:i], given[i + 1 :]) for i, character in enumerate(given) if character == "="]
            pairs.append(
                max([pair for pair in splits if pair[0] in counts] or splits[:1], key=lambda pair: len(pair[0]))
            )
        words = dict(pairs)
        if twice := [value for value, count in Counter(value for value, _ in pairs).items() if count > 1]:
            raise TaskError(
                f"--label: expected one word for {twice[0]!r}, got {[w for v, w in pairs if v == twice[0]]}"
            )
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

    What the tokenizer puts before a text (a BOS token, BERT's [CLS]) begins each prompt. What it puts after one (EOS,
    [SEP]) is left off: the label word follows the prompt.

    Raises:
        TaskError: a template without `{text}`, or label words whose first tokens are unknown or not distinct.

    """

    def __init__(self, tokenizer: Any, template: str, words: Mapping[str, str], max_length: int = 256) -> None:
        """Find the label tokens, and check that they can be told apart."""
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.index = {value: i for i, value in enumerate(words)}
        self.truncated = 0
        if "{text}" not in template:
            raise TaskError(f"--template: expected {{text}} where the text goes, got {template!r}")
        self.label_tokens = [self._first_token(word) for word in words.values()]
        self.prefix = self._prefix()
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
        token = int(after[len(before)])
        if token == self.tokenizer.unk_token_id:
            raise TaskError(f"--label: the tokenizer does not know the beginning of {word!r}; choose another word")
        return token

    def _prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        prompt = self.template.replace("{text}", "text")
        plain = self.tokenizer([prompt], add_special_tokens=False).input_ids[0]
        whole = self.tokenizer([prompt]).input_ids[0]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return list(whole[:start])
        raise TaskError("--model: its tokenizer splits a text otherwise beside special tokens; use another tokenizer")

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids of each example's prompt, at most `max_length`; `truncated` counts the longer ones."""
        if not examples:
            return []
        encoded, most = [], self.max_length - len(self.prefix)
        texts = [self.template.replace("{text}", example.text) for example in examples]
        for example, tokens in zip(examples, self.tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
            if not tokens:
                raise TaskError(f"--model: its tokenizer makes no token of the text {example.text[:40]!r}")
            self.truncated += len(tokens) > most
            encoded.append(Encoded(self.prefix + tokens[-most:], self.index[example.label]))
        return encoded


def collate(examples: Sequence[Encoded], device: torch.device | str = "cpu", *, left: bool = True) -> Batch:
    """Pad to the longest prompt, on the left or right. Padding is token 0 and masked, so no pad token is needed."""
    length = max(len(example.tokens) for example in examples)

    def padded(values: list[int]) -> list[int]:
        fill = [0] * (length - len(values))
        return fill + values if left else values + fill

    columns = (
        [padded(e.tokens) for e in examples], [padded([1] * len(e.tokens)) for e in examples], [e.label for e in examples]
    )  # fmt: skip
    return Batch(*(torch.tensor(column, device=device) for column in columns))


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
    """Label logits of a causal language model: one forward, the last token of each prompt, the label tokens only.

    Args:
        model: a transformers causal LM, on its device.
        label_tokens: the token of each label.
        autocast: run the forward in bfloat16 autocast over the model's own weights.
        left: pad on the left. The last tokens are then one column, for which alone the head is computed; but a
            model must leave padding out by mask and position, and not all do (``pads_left``).

    """

    def __init__(
        self, model: torch.nn.Module, label_tokens: Sequence[int], autocast: bool = False, left: bool = True
    ) -> None:
        """Look up what the model's forward accepts."""
        self.model, self.autocast, self.left = model, autocast, left
        self.device = next(model.parameters()).device
        self.label_tokens = torch.tensor(label_tokens, device=self.device)
        accepted = inspect.signature(model.forward).parameters
        wanted: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
        self.options = {name: value for name, value in wanted.items() if name in accepted}
        self.positions = "position_ids" in accepted

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context. Held around many forwards of unchanged weights it casts each weight once."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def batch(self, examples: Sequence[Encoded]) -> Batch:
        """These examples as a batch that this scorer takes."""
        return collate(examples, self.device, left=self.left)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Float32 logits (batch, labels)."""
        options, last = dict(self.options), batch.attention_mask.sum(-1) - 1
        if not self.left:
            options.pop("logits_to_keep", None)
        elif self.positions:  # absolute position embeddings count from the first real token
            options["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with self.precision():
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        logits: torch.Tensor = output.logits
        chosen = logits[:, -1] if self.left else logits[torch.arange(len(last), device=self.device), last]
        return chosen[:, self.label_tokens].float()

    @torch.no_grad()
    def pads_left(self, tokens: list[int]) -> bool:
        """Whether the model gives these tokens the same logits, but for rounding, with padding on their left."""
        padded = self(collate([Encoded(tokens, 0), Encoded(tokens * 2, 0)], self.device))[0]
        alone = self.model(input_ids=torch.tensor([tokens], device=self.device)).logits[0, -1]
        return _agree(padded, alone[self.label_tokens].float(), alone)

    @torch.no_grad()
    def is_causal(self, tokens: list[int]) -> bool:
        """Whether the model's logits after these tokens stay as they are, but for rounding, when another one follows."""
        rows = torch.tensor([[*tokens, int(token)] for token in self.label_tokens[:2]], device=self.device)
        one, other = self.model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, len(tokens) - 1]
        return _agree(one, other, one)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the label words, a float32 scalar."""
        return losses.cross_entropy(self(batch), batch.labels)


def _agree(a: torch.Tensor, b: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether a and b differ by no more than what rounding makes of logits of this size and dtype."""
    rounding = max(1e-3, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
    return not bool(((a - b).abs() > rounding).any())  # NaN is for the steps to find


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
                batch = scorer.batch([examples[i] for i in chosen])
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
