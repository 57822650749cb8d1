"""Reading, splitting, prompting and scoring, each against a plain computation of the same thing."""

import csv
import math
from pathlib import Path

import pytest
import tiny_lm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RwkvConfig,
    XLNetConfig,
)

from zo_core import losses
from zo_core.integrations import tasks
from zo_core.integrations.tasks import Example, Prompter, Scorer, TaskError

TEMPLATE = "Review: {text}\nSentiment:"
LABELS = {"negative": " negative", "positive": " positive"}
EXAMPLES = [Example(*row) for row in tiny_lm.rows(120)]


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


# ---- reading


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffid,body,stars\r\n1,"a, ""b""\nc",5\r\n2, d ,1\r\n')
    assert tasks.read_examples(path, "body", "stars") == [Example('a, "b"\nc', "5"), Example("d", "1")]


def test_tsv_and_jsonl(tmp_path: Path) -> None:
    tsv = write(tmp_path / "a.tsv", "text\tlabel\na, b\tx\n")
    assert tasks.read_examples(tsv) == [Example("a, b", "x")]
    lines = '{"text": "a", "label": 1}\n\n{"text": "b", "label": true}\n{"text": "c", "label": "x"}'
    assert [e.label for e in tasks.read_examples(write(tmp_path / "a.jsonl", lines))] == ["1", "true", "x"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "text,label\na,b\n", "ending in .csv, .tsv, .jsonl"),
        ("a.csv", "text,lable\na,b\n", "line 2: expected one column 'label', found 'text', 'lable'; name"),
        ("a.csv", "text,label\na,b\nc\n", "line 3: column 'label' is empty"),
        ("a.csv", "text,label\n  ,b\n", "line 2: column 'text' is empty"),
        ("a.csv", "text,label\n", "no examples"),
        ("a.csv", "", "no examples"),
        ("a.csv", 'text,label\na,b\n"a"b,c\n', "line 3: malformed"),
        ("a.csv", "label,text\na,b\nc,d, e\n", "line 3: 3 cells, the header has 2; put a text that contains"),
        ("a.tsv", "label\ttext\na\tb\tc\n", "line 2: 3 cells, the header has 2"),
        ("a.csv", "text,label,text\na,b,c\n", "line 2: expected one column 'text', found 'text', 'label', 'text'"),
        ("a.jsonl", '{"text": "a", "label": "b", "text": "c"}\n', "line 1: expected one column 'text', found"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n\n{"text": ', "line 3: malformed JSON, Expecting value (column 10)"),
        ("a.jsonl", '{"text": "a", "label": ' + "1" * 5000 + "}", "line 1: malformed JSON, Exceeds the limit"),
        ("a.jsonl", '{"text": "a", "label": ' + "[" * 9**6, "line 1: malformed JSON"),
        ("a.jsonl", '{"text": "a", "label": ["b"]}', "line 1: column 'label' holds a list or an object"),
        ("a.jsonl", '{"text": {"a": "b"}, "label": "b"}', "line 1: column 'text' holds a list or an object"),
        ("a.jsonl", '{"text": "\\ud800", "label": "b"}', "line 1: column 'text' is no text that UTF-8 can write"),
        ("a.jsonl", '["a", "b"]\n', "line 1: expected a JSON object"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "line 1: column 'label' is empty"),
    ],
)
def test_unusable_files_say_what_is_wrong(tmp_path: Path, name: str, content: str, expected: str) -> None:
    with pytest.raises(TaskError) as caught:
        tasks.read_examples(write(tmp_path / name, content))
    assert expected in str(caught.value)


def test_cells_of_any_length_and_empty_ones_beyond_the_header(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f"text,label\n{'long ' * 30000},a,,\n\nshort,b\n")
    assert tasks.read_examples(path) == [Example(("long " * 30000).strip(), "a"), Example("short", "b")]
    assert csv.field_size_limit() == limit
    with pytest.raises(TaskError, match="--text-column and --label-column: expected two columns, got 'text' for both"):
        tasks.read_examples(path, "text", "text")


def test_other_encodings_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is not UTF-8"):
        tasks.read_examples(write(tmp_path / "a.csv", "text,label\ncafé,b\n", "latin-1"))
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        tasks.read_examples(tmp_path / "b.csv")


# ---- splitting


def test_split_is_fixed_disjoint_and_complete() -> None:
    split = tasks.split_examples(EXAMPLES, validation=0.1, test=30, seed=3)
    assert [len(part) for part in split] == [78, 12, 30]
    assert sorted(e.text for part in split for e in part) == sorted(e.text for e in EXAMPLES)
    assert split == tasks.split_examples(EXAMPLES, validation=0.1, test=30, seed=3)
    assert split.test != tasks.split_examples(EXAMPLES, validation=0.1, test=30, seed=4).test
    assert split.test == tasks.split_examples(EXAMPLES, validation=40, test=30, seed=3).test


def test_repeated_texts_are_in_one_part_only() -> None:
    copies = [Example(e.text.upper().replace(" ", "  "), "other") for e in EXAMPLES]
    split = tasks.split_examples(EXAMPLES + copies, validation=20, test=30, seed=0)
    assert split == tasks.split_examples(EXAMPLES, validation=20, test=30, seed=0)


def test_splits_that_cannot_be_made() -> None:
    with pytest.raises(TaskError, match="got 100 test, 20 validation and 0 training examples of 120"):
        tasks.split_examples(EXAMPLES, validation=20, test=100, seed=0)
    one = [*EXAMPLES, Example("odd", "odd")]
    with pytest.raises(TaskError, match="no training example has the label 'odd'"):
        for seed in range(10):
            tasks.split_examples(one, validation=40, test=70, seed=seed)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (7, 16)])
def test_batches_visit_every_example_once_an_epoch(n: int, batch_size: int) -> None:
    drawn = [i for step in range(2 * n) for i in tasks.batch_indices(n, batch_size, step=step, seed=5)]
    epochs = [drawn[i * n : (i + 1) * n] for i in range(2 * batch_size)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert drawn[:batch_size] != tasks.batch_indices(n, batch_size, step=0, seed=6)


@given(st.integers(2, 120), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_stratified_batches_have_each_label_in_its_share(
    per: int, kinds: int, batch_size: int, grouped: bool, seed: int
) -> None:
    counts = [per * (1 + k) for k in range(kinds)]  # shares of 1 to 4 in their sum
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    n, lengths = len(labels), [13 * i % 71 for i in range(len(labels))]
    length = lengths.__getitem__ if grouped else None
    steps = range(-(-2 * n // batch_size))
    batches = [tasks.batch_indices(n, batch_size, step=s, seed=seed, length=length, labels=labels) for s in steps]
    drawn = [i for batch in batches for i in batch]
    assert all(sorted(drawn[k : k + n]) == list(range(n)) for k in (0, n))  # every example once an epoch
    for batch in batches[: n // batch_size]:
        for k, count in enumerate(counts):
            away = abs([labels[i] for i in batch].count(k) - batch_size * count / n)
            assert away < (1 + grouped) * (1 + kinds * count / n)
    assert n < 20 or drawn[:n] != drawn[n : 2 * n]


def test_stratified_batches_of_two_labels_alike_have_as_many_of_each() -> None:
    labels, lengths = [0] * 80 + [1] * 80, [13 * i % 71 for i in range(160)]
    for length in (None, lengths.__getitem__):
        batches = [tasks.batch_indices(160, 4, step=s, seed=1, length=length, labels=labels) for s in range(80)]
        assert all(sum(labels[i] for i in batch) == 2 for batch in batches)
    assert sum(max(lengths[i] for i in batch) for batch in batches) / 80 < 42  # of 35 on average


@given(n=st.integers(1, 300), batch_size=st.integers(1, 20), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_batches_by_length_visit_every_example_once_an_epoch(n: int, batch_size: int, seed: int) -> None:
    lengths = [13 * i % 71 for i in range(n)]
    steps = range(-(-2 * n // batch_size))
    batches = [tasks.batch_indices(n, batch_size, step=s, seed=seed, length=lengths.__getitem__) for s in steps]
    drawn = [i for batch in batches for i in batch]
    assert all(sorted(drawn[k : k + n]) == list(range(n)) for k in (0, n))
    assert all(len(batch) == batch_size for batch in batches)


def test_batches_by_length_need_little_padding_and_come_in_any_order() -> None:
    lengths = [13 * i % 71 for i in range(500)]
    padded = []
    for length in (None, lengths.__getitem__):
        batches = [tasks.batch_indices(500, 8, step=step, seed=5, length=length) for step in range(200)]
        padded.append([max(lengths[i] for i in batch) for batch in batches])
    plain, grouped = (sum(tokens) / 200 for tokens in padded)
    assert grouped < 40 < 60 < plain  # of 35 on average
    assert padded[1] != sorted(padded[1]) and padded[1][:62] != padded[1][62:124]


# ---- labels and prompts


def test_label_words() -> None:
    assert tasks.label_words(EXAMPLES) == LABELS
    assert tasks.label_words(EXAMPLES, {"positive": " a", "negative": " b"}) == {
        "negative": " b",
        "positive": " a",
    }
    with pytest.raises(TaskError, match=r"no word for 'negative'; the data has 'positive' \(60\), 'negative' \(60\)"):
        tasks.label_words(EXAMPLES, {"positive": " a", "neg": " b"})
    with pytest.raises(TaskError, match="'neutral' never occurs"):
        tasks.label_words(EXAMPLES, {**LABELS, "neutral": " c"})
    assert len(tasks.label_words(EXAMPLES[:1], LABELS, all_occur=False)) == 2
    with pytest.raises(TaskError, match="at least two different values, the data has 'positive'"):
        tasks.label_words(EXAMPLES[:1])


def test_label_values_that_contain_equals_signs() -> None:
    data = [Example("x", value) for value in ("a", "a=b", "c==")]
    given = ["a=b= good", "a== bad", "c=== odd"]
    assert tasks.label_words(data, given) == {"a": "= bad", "a=b": " good", "c==": " odd"}
    assert tasks.label_words(data[1:2], ["a=b= good", "c= bad"], all_occur=False) == {"a=b": " good", "c": " bad"}
    with pytest.raises(TaskError, match=r"--label: expected one word for 'a', got \[' x', ' y'\]"):
        tasks.label_words(data, ["a= x", "a= y", "a=b= z", "c=== w"])


def test_label_tokens_are_what_follows_the_prompt() -> None:
    tokenizer = tiny_lm.tokenizer()
    prompter = Prompter(tokenizer, TEMPLATE, LABELS)
    assert tokenizer.convert_ids_to_tokens(prompter.label_tokens) == ["Ġnegative", "Ġpositive"]
    with pytest.raises(TaskError, match="'x one' and 'x two' start with the same token"):
        Prompter(tokenizer, TEMPLATE, {"1": "x one", "2": "x two"})
    with pytest.raises(TaskError, match="does not start a new token after"):
        Prompter(tokenizer, TEMPLATE + " ", {"1": "negative", "2": "positive"})
    with pytest.raises(TaskError, match="does not start a new token after"):
        Prompter(tokenizer, TEMPLATE, {"1": "", "2": " positive"})
    with pytest.raises(TaskError, match="expected {text} where the text goes"):
        Prompter(tokenizer, "Review: {}", LABELS)


def test_long_prompts_keep_their_end() -> None:
    tokenizer = tiny_lm.tokenizer()
    prompter = Prompter(tokenizer, TEMPLATE, LABELS, max_length=12)
    long, short = prompter.encode([Example("awful {text} " * 30, "negative"), Example("good", "positive")])
    assert prompter.truncated == 1
    assert len(long.tokens) == 12
    assert tokenizer.decode(long.tokens).endswith("\nSentiment:")
    assert tokenizer.decode(short.tokens) == "Review: good\nSentiment:"
    assert (long.label, short.label) == (0, 1)


def with_specials(single: str, **options: object) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that puts special tokens around a text."""
    words = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "<unk>", "Review", ":", "Sentiment", *"a b c d good bad".split()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(word, i) for i, word in enumerate(words[:5])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **options)


@pytest.mark.parametrize(
    ("single", "prefix", "options"),
    [
        ("$A", [], {}),
        ("$A </s>", [], {"eos_token": "</s>", "pad_token": "<pad>"}),
        ("<s> $A", ["<s>"], {"bos_token": "<s>", "padding_side": "right"}),
        ("<s> $A </s>", ["<s>"], {"bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}),
        ("[CLS] $A [SEP]", ["[CLS]"], {"cls_token": "[CLS]", "sep_token": "[SEP]"}),
        ("<s> [CLS] $A [SEP] </s>", ["<s>", "[CLS]"], {}),
    ],
)
def test_what_a_tokenizer_puts_around_a_text(single: str, prefix: list[str], options: dict[str, str]) -> None:
    """What it puts before stays, for long texts too; what it puts after is left off: the label word comes there."""
    tokenizer = with_specials(single, **options)
    prompter = Prompter(tokenizer, TEMPLATE, {"0": " bad", "1": " good"}, max_length=8)
    short, long = prompter.encode([Example("a", "1"), Example("a b c d " * 3, "0")])
    tail = ["Sentiment", ":"]
    assert tokenizer.convert_ids_to_tokens(short.tokens) == [*prefix, "Review", ":", "a", *tail]
    words = [":", *"abcd" * 3][-6 + len(prefix) :]
    assert tokenizer.convert_ids_to_tokens(long.tokens) == [*prefix, *words, *tail] and len(long.tokens) == 8
    assert tokenizer.convert_ids_to_tokens(prompter.label_tokens) == ["bad", "good"]
    assert prompter.truncated == 1


def test_tokenizers_that_lose_what_counts_are_refused() -> None:
    tokenizer = with_specials("$A")
    with pytest.raises(TaskError, match="does not know the beginning of ' awful'; choose another word"):
        Prompter(tokenizer, TEMPLATE, {"0": " awful", "1": " good"})
    lossy = with_specials("$A")
    lossy.backend_tokenizer.model = models.WordLevel({"good": 0, "bad": 1, "text": 2}, unk_token="good")
    lossy.backend_tokenizer.normalizer = normalizers.Replace("empty", "")
    lossy = PreTrainedTokenizerFast(tokenizer_object=lossy.backend_tokenizer)
    with pytest.raises(TaskError, match="makes no token of the text 'empty'"):
        Prompter(lossy, "{text}", {"0": " bad", "1": " good"}).encode([Example("empty", "1")])


# ---- scoring


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tiny_lm.save(tmp_path_factory.mktemp("model"), request.param)
    prompter = Prompter(AutoTokenizer.from_pretrained(folder), TEMPLATE, LABELS)
    found = Scorer(AutoModelForCausalLM.from_pretrained(folder).eval(), prompter.label_tokens)
    found.encoded = prompter.encode([Example(e.text * (1 + i % 4), e.label) for i, e in enumerate(EXAMPLES[:21])])
    return found


@torch.no_grad()
def test_padding_changes_nothing(scorer: Scorer) -> None:
    """Each row of a padded batch scores as the prompt alone does, read from the model's plain output."""
    together = scorer(tasks.collate(scorer.encoded))
    for row, example in zip(together, scorer.encoded, strict=True):
        alone = scorer.model(input_ids=torch.tensor([example.tokens])).logits[0, -1, scorer.label_tokens]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    assert together.dtype == torch.float32


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BART = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "is_encoder_decoder": False,
}
PADDED = {  # model: whether it can be padded on the left
    "llama": (LlamaConfig(**SMALL), True),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), True),
    "bert": (BertConfig(**SMALL, is_decoder=True), True),
    "roberta": (RobertaConfig(**SMALL, is_decoder=True), False),  # its first position is pad_token_id + 1
    "bart": (BartConfig(vocab_size=64, **BART, is_decoder=True, max_position_embeddings=64), False),
    "rwkv": (RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), False),  # has no mask
}


def random_model(config: object, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else None
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_models_are_padded_where_it_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Each row of a padded batch scores as the prompt alone, without mask or positions, in the model's plain forward."""
    config, left = PADDED[name]
    scorer = Scorer(random_model(config, dtype), [5, 9, 11])
    assert scorer.is_causal([7, 8, 9, 10])
    scorer.left = scorer.pads_left([7, 8, 9, 10])
    assert scorer.left == left
    examples = [tasks.Encoded([3 + (7 * i + j * j) % 50 for j in range(4 + 3 * i)], 0) for i in range(5)]
    alone = [scorer.model(input_ids=torch.tensor([e.tokens])).logits[0, -1, [5, 9, 11]].float() for e in examples]
    tolerance = (1e-5 if dtype is torch.float32 else 0.03) * float(torch.stack(alone).abs().max())
    assert (scorer(scorer.batch(examples)) - torch.stack(alone)).abs().max() < tolerance


@pytest.mark.parametrize("config", [BertConfig(**SMALL), RobertaConfig(**SMALL), XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_see_what_follows_are_found(config: object, dtype: torch.dtype) -> None:
    assert not Scorer(random_model(config, dtype), [5, 9]).is_causal([7, 8, 9])


@torch.no_grad()
def test_loss_is_the_cross_entropy_over_the_label_words(scorer: Scorer) -> None:
    batch = tasks.collate(scorer.encoded)
    p = scorer(batch).double().softmax(-1)[range(len(batch.labels)), batch.labels]
    assert scorer.loss(batch).item() == pytest.approx(-p.log().mean().item(), rel=1e-5)


@torch.no_grad()
def test_a_loss_with_fitted_biases_does_not_depend_on_the_labels_that_the_model_prefers(scorer: Scorer) -> None:
    batch = tasks.collate(scorer.encoded)
    logits, plain = scorer.logits(batch), scorer.loss(batch)
    shares = losses.label_shares(batch.labels, 2)
    expected = torch.nn.functional.cross_entropy(logits + losses.label_biases(logits, shares), batch.labels)
    scorer.biases = torch.tensor([0.5, -3.0])  # those of evaluations
    try:
        assert float(scorer.loss(batch, fit_biases=True)) == float(expected) < float(plain)
        warm = logits / 4
        warm = 4 * torch.nn.functional.cross_entropy(warm + losses.label_biases(warm, shares), batch.labels)
        torch.testing.assert_close(scorer.loss(batch, temperature=4.0, fit_biases=True), warm)
        preferring = losses.label_biases(logits + torch.tensor([0.0, 2.0]), shares) + torch.tensor([-1.0, 1.0])
        torch.testing.assert_close(preferring, losses.label_biases(logits, shares), atol=2e-3, rtol=0)
        found = tasks.evaluate(scorer, scorer.encoded)
        torch.testing.assert_close(found.logits, logits + scorer.biases, rtol=1e-4, atol=1e-5)
    finally:
        scorer.biases = torch.zeros(2)


@torch.no_grad()
def test_a_loss_at_a_high_temperature_is_linear_in_the_margins(scorer: Scorer) -> None:
    batch = tasks.collate(scorer.encoded)
    logits = scorer.logits(batch)
    margins = logits[range(len(batch.labels)), batch.labels] - logits.mean(-1)
    found = scorer.loss(batch, temperature=1e3)
    assert float(found) == pytest.approx(1e3 * math.log(2) - float(margins.mean()), abs=2e-3)


@torch.no_grad()
def test_evaluate_agrees_with_one_batch_and_restores_the_mode(scorer: Scorer) -> None:
    batch, seen = tasks.collate(scorer.encoded), []
    scorer.model.train()
    found = tasks.evaluate(scorer, scorer.encoded, batch_size=4, progress=seen.append)
    assert scorer.model.training
    scorer.model.eval()
    assert seen == [4, 4, 4, 4, 4, 1]
    assert found.correct.tolist() == (scorer(batch).argmax(-1) == batch.labels).tolist()
    assert found.loss == pytest.approx(scorer.loss(batch).item(), rel=1e-4)
    assert found.report()["accuracy"] == pytest.approx(found.correct.float().mean().item())


@torch.no_grad()
def test_autocast_is_bfloat16_over_float32_weights(scorer: Scorer) -> None:
    batch, plain = tasks.collate(scorer.encoded), scorer(tasks.collate(scorer.encoded))
    scorer.autocast = True
    cast = scorer(batch)
    scorer.autocast = False
    assert cast.dtype == torch.float32
    assert 0 < (cast - plain).abs().max() < 0.05 * plain.abs().max()


def test_intervals() -> None:
    assert tasks.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert tasks.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    before = torch.tensor([True] * 60 + [False] * 40)
    after = before.clone()
    after[[0, 1]], after[60:72] = False, True
    found = tasks.paired_difference(before, after)
    sd = math.sqrt((14 - 100 * 0.1**2) / 100**2)  # of the mean of the paired differences
    assert (found["difference"], found["gained"], found["lost"]) == (0.1, 12, 2)
    assert found["interval"] == pytest.approx([0.1 - 1.96 * sd, 0.1 + 1.96 * sd], abs=1e-5)
