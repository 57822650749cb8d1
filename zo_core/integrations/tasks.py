"""Classification by prompting: read examples of (text, label), divide and batch them, and score the labels' words.

An example becomes a prompt, which is the template with the text in it. Each label value has a word, and the model's
prediction is the label whose word begins with the token of the largest next-token logit. The loss is the cross-entropy
over these tokens alone, with biases and at a temperature (zo_core/losses.py).
"""

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

BATCHES = 32  # whose examples are divided among them by length


class TaskError(ValueError):
    """The data, the template or the label words cannot be used; the message says what to do."""


class Example(NamedTuple):
    """A text and its label value, as in the data."""

    text: str
    label: str


class Encoded(NamedTuple):
    """A prompt as token ids, and the index of its label."""

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
    """Read a CSV, TSV or JSON-lines file (by its suffix) in UTF-8, one example a row, and strip the texts.

    Raises:
        TaskError: the file cannot be read or is not UTF-8; or, with the number of the line: it is malformed, a column is
            missing or occurs twice, a row has more cells than there are columns, or a text or label is empty.
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


Row = tuple[int, list[tuple[str, Any]]]  # the number of its line, and the column and value of each cell


def _read_csv(file: Any) -> Iterator[Row]:
    before = csv.field_size_limit(2**31 - 1)  # a global limit of Python's csv, which is 131,072 characters by default
    reader = csv.reader(file, delimiter="\t" if file.name.lower().endswith(".tsv") else ",", strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if any(cells[len(header) :]):
                raise TaskError(
                    f"data {file.name!r}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}; "
                    "put a text that contains the separator in double quotes"
                )
            if cells:  # skip empty lines
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
            yield number, json.loads(line, object_pairs_hook=list)  # a dict would hide columns that occur twice
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
            raise TaskError(f"data {file.name!r}, line {number}: malformed JSON, {what}") from error


def _plain(value: Any, where: str, column: str) -> str:
    """The text of a cell; numbers and booleans as in JSON. TaskError if it is empty or no text."""
    if isinstance(value, list):
        raise TaskError(f"{where}: column {column!r} holds a list or an object; expected text or a number")
    text = value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
    if not text.isascii() and text != text.encode(errors="ignore").decode():
        raise TaskError(f"{where}: column {column!r} is no text that UTF-8 can write: it has half of a surrogate pair")
    if not text:
        raise TaskError(f"{where}: column {column!r} is empty; fill it in or remove the line")
    return text


def split_examples(examples: Sequence[Example], *, validation: float, test: float, seed: int) -> Split:
    """Divide examples at random into a training, a validation and a test part; one seed always gives one division.

    Of texts that differ in nothing but white space and case the first one is used. The test part depends on the data,
    `test` and `seed` alone.

    Args:
        examples: the examples to divide.
        validation: size of the validation part: a number of examples, or a fraction if it is below 1.
        test: size of the test part, likewise.
        seed: seed of the division.

    Raises:
        TaskError: a part would be empty, or the training part would have no example of some label.
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
    """The word of each label value, sorted by value.

    Args:
        examples: the data.
        words: value -> word, or texts "VALUE=WORD"; None: the word is a space and the value. If a text has several `=`,
            VALUE is the longest value of the data that fits.
        all_occur: refuse a word for a value that does not occur in the data.

    Raises:
        TaskError: there are fewer than two values, a value has no word or two, or it does not occur.
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
    """Turns examples into token ids.

    Each prompt begins with the special tokens that the tokenizer puts before a text (a BOS token, BERT's [CLS]). Those that
    it puts after a text (EOS, [SEP]) are left out, as the label word follows the prompt.

    Args:
        tokenizer: a transformers tokenizer.
        template: the prompt, with `{text}` in place of the text.
        words: label value -> the word that follows the prompt.
        max_length: longest prompt in tokens; longer ones lose their beginning.

    Raises:
        TaskError: the template has no `{text}`, or the first tokens of the label words are unknown or not distinct.
    """

    def __init__(self, tokenizer: Any, template: str, words: Mapping[str, str], max_length: int = 256) -> None:
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
        """The first token of `word` where it follows the prompt, which may differ from its first token alone."""
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
        """The prompts of examples, at most `max_length` tokens each; `truncated` counts those that were longer."""
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
    """A batch, padded to the longest prompt on the left or right with token 0, which the attention mask hides."""
    length = max(len(example.tokens) for example in examples)

    def padded(values: list[int]) -> list[int]:
        fill = [0] * (length - len(values))
        return fill + values if left else values + fill

    columns = (
        [padded(e.tokens) for e in examples], [padded([1] * len(e.tokens)) for e in examples], [e.label for e in examples]
    )  # fmt: skip
    return Batch(*(torch.tensor(column, device=device) for column in columns))


def batch_indices(
    n: int,
    batch_size: int,
    *,
    step: int,
    seed: int,
    length: Callable[[int], int] | None = None,
    labels: Sequence[int] | None = None,
) -> list[int]:
    """Numbers of the training examples, of `n`, that a step uses; they depend on the arguments alone.

    Each epoch has a permutation of its own, and a batch at the end of an epoch continues with the next one.

    Args:
        n: how many examples there are.
        batch_size: how many a step uses.
        step: number of the step, from 0.
        seed: of the order.
        length: tokens of the prompt of an example. With it the examples of 32 batches of an epoch are divided anew among these
            batches, by length, so that they need little padding.
        labels: the label of each example. With them each batch has, as nearly as its size allows, each label's share of the data.
    """
    start, chosen = step * batch_size, list[int]()
    given = None if labels is None else torch.tensor(labels)
    while len(chosen) < batch_size:
        epoch, offset = divmod(start + len(chosen), n)
        order = permutation(n, seed=seed, stream=1 + epoch)
        if given is not None:
            order = order[_interleave(given[order])]
        head = -epoch * n % batch_size  # as many complete the batch in which the epoch before ended
        if length is not None and offset >= head:
            place = (offset - head) % (BATCHES * batch_size)
            window = order[offset - place :][: BATCHES * batch_size].tolist()
            found = _by_length(window, batch_size, length, given)[place:]
        else:
            found = order[offset : offset + batch_size].tolist()
        chosen += found[: batch_size - len(chosen)]
    return chosen


def _interleave(labels: torch.Tensor) -> torch.Tensor:
    """An order (int64) in which the examples of each label are spread evenly; those of one label stay in theirs."""
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in set(labels.tolist()):
        those = (labels == label).nonzero()[:, 0]
        place[those] = (torch.arange(len(those), dtype=torch.float64) + 0.5) / len(those)
    return place.argsort(stable=True)


def _by_length(
    examples: list[int], batch_size: int, length: Callable[[int], int], labels: torch.Tensor | None
) -> list[int]:
    """The examples divided into batches by length, with `labels` so that each has labels in their shares.

    A batch comes as early as the first of its examples was drawn; one that is not full is last.
    """
    drawn = {example: place for place, example in enumerate(examples)}
    ordered = sorted(examples, key=length)
    if labels is not None:
        ordered = [ordered[i] for i in _interleave(labels[ordered]).tolist()]
    batches = [ordered[k : k + batch_size] for k in range(0, len(ordered), batch_size)]
    batches.sort(key=lambda batch: (len(batch) < batch_size, min(drawn[i] for i in batch)))
    return [i for batch in batches for i in batch]


# ---- scoring ---------------------------------------------------------------------------------------------


class Scorer:
    """Computes a causal language model's logits of the label tokens after each prompt, in one forward.

    Args:
        model: a transformers causal language model, on its device.
        label_tokens: the token of each label.
        autocast: compute the forward in bfloat16 by autocast.
        left: pad prompts on the left. Their last tokens are then in one column, and the head is computed for that alone.
            It needs a model whose mask and positions leave padding out, which ``pads_left`` finds out.

    Attributes:
        biases: float32 (labels,), added to the logits: those of the model's generation config (``sequence_bias``), or 0.
    """

    def __init__(
        self, model: torch.nn.Module, label_tokens: Sequence[int], autocast: bool = False, left: bool = True
    ) -> None:
        self.model, self.autocast, self.left = model, autocast, left
        self.device = next(model.parameters()).device
        self.label_tokens = torch.tensor(label_tokens, device=self.device)
        known = getattr(getattr(model, "generation_config", None), "sequence_bias", None) or []
        known = {tuple(tokens): bias for tokens, bias in (known.items() if isinstance(known, dict) else known)}
        self.biases = torch.tensor(
            [known.get((token,), 0.0) for token in label_tokens], dtype=torch.float32, device=self.device
        )
        accepted = inspect.signature(model.forward).parameters
        wanted: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
        self.options = {name: value for name, value in wanted.items() if name in accepted}
        self.positions = "position_ids" in accepted

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context. Around several forwards with the same weights, it casts each weight once."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def batch(self, examples: Sequence[Encoded]) -> Batch:
        """A batch of these examples, padded as this scorer expects."""
        return collate(examples, self.device, left=self.left)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The logits of the label tokens with their biases, float32 (batch, labels)."""
        return self.logits(batch) + self.biases

    def logits(self, batch: Batch) -> torch.Tensor:
        """The model's logits of the label tokens, float32 (batch, labels)."""
        options, last = dict(self.options), batch.attention_mask.sum(-1) - 1
        if not self.left:
            options.pop("logits_to_keep", None)
        elif self.positions:  # positions count from the first token that is no padding
            options["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with self.precision():
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        logits: torch.Tensor = output.logits
        chosen = logits[:, -1] if self.left else logits[torch.arange(len(last), device=self.device), last]
        return chosen[:, self.label_tokens].float()

    @torch.no_grad()
    def pads_left(self, tokens: list[int]) -> bool:
        """Whether padding on the left of these tokens leaves the model's logits as they are, except for rounding."""
        padded = self.logits(collate([Encoded(tokens, 0), Encoded(tokens * 2, 0)], self.device))[0]
        alone = self.model(input_ids=torch.tensor([tokens], device=self.device)).logits[0, -1]
        return _agree(padded, alone[self.label_tokens].float(), alone)

    @torch.no_grad()
    def is_causal(self, tokens: list[int]) -> bool:
        """Whether a token that follows leaves the logits after these tokens as they are, except for rounding."""
        rows = torch.tensor([[*tokens, int(token)] for token in self.label_tokens[:2]], device=self.device)
        one, other = self.model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, len(tokens) - 1]
        return _agree(one, other, one)

    def loss(self, batch: Batch, *, temperature: float = 1.0, fit_biases: bool = False) -> torch.Tensor:
        """``losses.label_loss`` over the label tokens, a float32 scalar; with biases that are fitted to the batch, or the scorer's own."""
        biases = None if fit_biases else self.biases
        return losses.label_loss(self.logits(batch), batch.labels, temperature=temperature, biases=biases)


def _agree(a: torch.Tensor, b: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether a and b differ by no more than the rounding errors of logits of this size and dtype."""
    rounding = max(1e-3, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
    return not bool(((a - b).abs() > rounding).any())  # true for NaN too, which the steps report


@dataclass(frozen=True)
class Evaluation:
    """The results of n examples, in their order."""

    logits: torch.Tensor  # float32 (n, labels)
    labels: torch.Tensor  # int64 (n,)

    @property
    def correct(self) -> torch.Tensor:
        """Whether each prediction is right, bool (n,)."""
        return self.logits.argmax(-1) == self.labels

    @property
    def losses(self) -> torch.Tensor:
        """Of each example, float32 (n,)."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return int(self.correct.sum()) / self.n

    def report(self) -> dict[str, Any]:
        """A dict of n, accuracy, its 95% Wilson interval and the mean loss, for JSON."""
        interval = wilson_interval(int(self.correct.sum()), self.n)
        return {"n": self.n, "accuracy": self.accuracy, "interval": list(interval), "loss": self.loss}


def evaluate(
    scorer: Scorer,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda n: None,
) -> Evaluation:
    """Score all examples without dropout, in batches of similar lengths, which need little padding.

    Args:
        scorer: the model and its label tokens.
        examples: the examples, at least one.
        batch_size: examples per forward.
        progress: called after each batch with its number of examples; it may raise an error to stop.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    logits = torch.empty(len(examples), len(scorer.label_tokens), dtype=torch.float32)
    labels = torch.tensor([example.label for example in examples])
    training = scorer.model.training
    scorer.model.eval()
    try:
        with torch.no_grad(), scorer.precision():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                logits[torch.tensor(chosen)] = scorer(scorer.batch([examples[i] for i in chosen])).cpu()
                progress(len(chosen))
    finally:
        scorer.model.train(training)
    return Evaluation(logits, labels)


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95% by default), which is always inside [0, 1]."""
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: torch.Tensor, after: torch.Tensor, z: float = 1.959964) -> dict[str, Any]:
    """The change of accuracy on the same examples, with a 95% Wald interval for paired proportions.

    Args:
        before: bool (n,), whether each prediction was right before.
        after: likewise, afterwards.
        z: normal quantile of the interval.
    """
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    difference = (gained - lost) / n
    half = z * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / n)) / n
    interval = [difference - half, difference + half]
    return {"difference": difference, "interval": interval, "gained": gained, "lost": lost}
