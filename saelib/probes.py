"""Probe loss (section 4.2): does any one latent know what a document is about, as well as a logistic probe can read it?

A sample is one context of one document, its features are latents averaged over the context. For every task and every
latent at once Newton's method fits the two numbers of a logistic probe; the best latent is chosen on the same training
documents, and its cross-entropy measured on others.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from saelib import UserError
from saelib.metrics import Estimate, in_unit_space, mean, pieces
from saelib.profile import BUILD, ROOT, Docstrings, HuggingFace, Profile
from saelib.report import read, stored
from saelib.sae import SAE
from saelib.text import Document, documents

RIDGE = 1e-3
"""Half of it times w squared is added to the mean cross-entropy; w is per standard deviation of the latent."""
FEWEST = 20
"""A task needs that many documents of either kind, in training and in test."""
ENTRIES = 2**17
"""Tasks times latents times documents that are fitted together: what stays in a processor's cache."""


# --- tasks ------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """The context that is read, and what is not: the text around it, and where it is from."""

    document: Document
    before: str
    text: str
    after: str


HEADING = re.compile(
    r"^[ \t]*(?:([A-Z]\w+)[ \w]*\n[ \t]*[-=]{3,}|(Args|Arguments|Returns|Examples?|Raises|Yields):)[ \t]*$", re.M
)
"""A section's heading, underlined (numpydoc) or closed by a colon (Google)."""


def section(text: str) -> str:
    """The last section's heading in a text, or nothing."""
    found = [first or second for first, second in HEADING.findall(text)]
    return found[-1] if found else ""


def _package(name: str) -> Callable[[Window], bool]:
    return lambda window: window.document.package == name


def _holds(pattern: str, part: str = "text") -> Callable[[Window], bool]:
    compiled = re.compile(pattern, re.M)
    return lambda window: bool(compiled.search(getattr(window, part)))


OBJECT = {f"from {name}": _package(name) for name in (
    "sympy", "transformers", "pandas", "sklearn", "scipy", "matplotlib", "networkx", "numpy"
)} | {
    "of a class": lambda window: window.document.kind == "class",
    "of a method": lambda window: bool(re.search(r"\.[A-Z]\w*\.\w+$", window.document.name)),
    "of something private": lambda window: bool(re.search(r"\._[a-z]", window.document.name)),
}  # fmt: skip
INSIDE = {name: _holds(pattern) for name, pattern in {
    "example prompt": r">>>", "URL": r"https?://", "two digits": r"\d\d", "decimal number": r"\d\.\d",
    "acronym": r"\b[A-Z]{2,}\b", "parameter line": r"^\s*\*{0,2}\w+ : \S|^\s*\*{0,2}\w+ \(.+\):",
    "the word optional": r"\boptional\b", "type word": r"\b(int|float|str|bool|dict|list|tuple)\b",
    "True, False, None": r"\b(True|False|None)\b", "bullet": r"^\s*[-*] \w", "assignment": r"^\s*>>> \w+ = ",
    "underlined heading": r"^\s*[-=~]{3,}\s*$", "quoted string": r"(['\"])\w[^'\"\n]*\1", "citation": r"\[\d+\]",
    "capitalised words": r"\b[A-Z][a-z]+ [A-Z][a-z]+\b",
}.items()}  # fmt: skip
OUTSIDE = {
    "starts among parameters": lambda window: section(window.before) in {"Parameters", "Args", "Arguments"},
    "starts among examples": lambda window: section(window.before) in {"Example", "Examples"},
    "deprecation in the document": lambda window: "deprecat" in window.document.text.lower(),
    "first word a verb in -s": lambda window: bool(re.match(r"[A-Z][a-z]+[^s\W]s\b", window.document.text)),
    "prompt after it": _holds(r">>>", "after"),
    "returns after it": _holds(r"^\s*(Returns|Yields)\b", "after"),
    "then a new line": _holds(r"\A[ \t]*\n", "after"),
    "then a capital": _holds(r"\A\s*[A-Z]", "after"),
    "a hundred characters left": lambda window: len(window.after) > 100,
}
TASKS: dict[str, dict[str, Callable[[Window], bool]]] = {"object": OBJECT, "inside": INSIDE, "outside": OUTSIDE}
"""What is asked of docstrings: about the object that the text is about, the window itself, the text around it."""


class Hub(NamedTuple):
    """A labelled data set of the Hugging Face hub, one task for each class."""

    name: str
    text: str
    """Column of the text; `translation.fr` is a key within a column."""
    classes: Mapping[str, object]
    """Task: the value that its positive rows have in the column `label`."""
    label: str = ""
    """Empty: a row's class is the configuration that it is from."""
    configs: Mapping[object, str] = {None: None}
    """Configurations to read, by class; `{}` in `text` stands for the class."""
    revision: str | None = None


_LANGUAGES = {"de": "de-en", "es": "en-es", "fr": "en-fr", "it": "en-it", "nl": "en-nl", "pt": "en-pt", "sv": "en-sv"}
_CODE = {name: f"{name}-apache-2.0" for name in ("C", "Java", "JavaScript", "PHP", "Python")}
HUB = (
    Hub("fancyzhx/amazon_polarity", "content", {"positive review": 1}, "label"),
    Hub("fancyzhx/ag_news", "text", {"world": 0, "sports": 1, "business": 2, "technology": 3}, "label"),
    Hub("Helsinki-NLP/europarl", "translation.{}", {name: name for name in _LANGUAGES}, configs=_LANGUAGES),
    Hub("codeparrot/github-code-clean", "code", {name: name for name in _CODE}, configs=_CODE,
        revision="refs/convert/parquet"),
    Hub("LabHC/bias_in_bios", "hard_text", {"professor": 21, "nurse": 13, "teacher": 26, "surgeon": 25}, "profession"),
    Hub("LabHC/bias_in_bios", "hard_text", {"woman": 1}, "gender"),
)  # fmt: skip
"""Tasks of the paper's kind, for models of web text."""


class Sample(NamedTuple):
    """One context of each of n documents, and what holds for it."""

    tokens: Int[Tensor, "n context"]
    labels: Bool[Tensor, "n tasks"]


class Source(NamedTuple):
    """Tasks that share their documents."""

    tasks: list[str]
    train: Sample
    test: Sample


def sources(profile: Profile, tokenizer, n_train: int, n_test: int, seed: int) -> list[Source]:
    """The tasks that suit a profile's text: our own for docstrings and local text, those of `HUB` for web text.

    Raises:
        UserError: the text holds too few documents that are as long as a context, or a data set cannot be read.
    """
    if isinstance(profile.text, HuggingFace):
        return [labelled(profile, tokenizer, entry, n_train, n_test, seed) for entry in HUB]
    test = list(_windows(profile, tokenizer, documents(profile, "test"), seed))
    test = [test[i] for i in torch.linspace(0, len(test) - 1, min(n_test, len(test))).long().tolist()]
    known = {window.document.package for window, _ in test}
    kept = known if isinstance(profile.text, Docstrings) else {d.package for d in documents(profile, "train")} | known
    texts = (document for document in documents(profile, "train", seed) if document.package in kept)
    train = list(itertools.islice(_windows(profile, tokenizer, texts, seed), n_train))
    named = {name: holds for group in TASKS.values() for name, holds in group.items()}
    samples = [
        Sample(_stack(part), torch.tensor([[holds(w) for holds in named.values()] for w, _ in part]))
        for part in (train, test)
    ]
    return [_usable(list(named), *samples)]


def _windows(profile: Profile, tokenizer, texts: Iterable[Document], seed: int) -> Iterator[tuple[Window, list[int]]]:
    """A context from a random place of every document that is as long as one, and its token ids."""
    draw, texts = torch.Generator().manual_seed(seed), iter(texts)
    bos = [tokenizer.bos_token_id] if profile.prepend_bos else []
    length = profile.context_length - len(bos)
    while chunk := list(itertools.islice(texts, 256)):
        encoded = tokenizer([document.text for document in chunk], add_special_tokens=False)["input_ids"]
        for document, ids in zip(chunk, encoded, strict=True):
            if len(ids) >= length:
                start = int(torch.randint(len(ids) - length + 1, (), generator=draw))
                parts = ids[:start], ids[start : start + length], ids[start + length :]
                yield Window(document, *map(tokenizer.decode, parts)), bos + parts[1]


def _stack(part: Sequence[tuple[Window, list[int]]]) -> Int[Tensor, "n context"]:
    if not part:
        raise UserError("no document is as long as a context: shorten context_length, or add text")
    return torch.tensor([ids for _, ids in part])


def _usable(tasks: list[str], train: Sample, test: Sample) -> Source:
    """Without the tasks that have under `FEWEST` documents of a kind in either sample."""
    common = [torch.minimum(part.labels.sum(0), (~part.labels).sum(0)) for part in (train, test)]
    kept = (torch.minimum(*common) >= FEWEST).nonzero()[:, 0]
    names = [tasks[i] for i in kept.tolist()]
    return Source(names, *(part._replace(labels=part.labels[:, kept]) for part in (train, test)))


def labelled(profile: Profile, tokenizer, entry: Hub, n_train: int, n_test: int, seed: int) -> Source:
    """Documents of one data set of the hub (or a folder in its place), streamed and shuffled; every class a task.

    Raises:
        UserError: the data set cannot be opened, or holds too few documents that are as long as a context.
    """
    each = -(-(n_train + n_test) // len(entry.configs))
    found = [
        pair
        for value, config in entry.configs.items()
        for pair in itertools.islice(_windows(profile, tokenizer, _rows(entry, value, config, seed), seed), each)
    ]
    if len(found) < n_train + n_test:
        raise UserError(f"data set {entry.name!r} holds {len(found)} documents as long as a context: ask for fewer")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [[found[i] for i in order[cut]] for cut in (slice(n_train), slice(n_train, n_train + n_test))]
    wanted = [str(value) for value in entry.classes.values()]
    samples = [
        Sample(_stack(part), torch.tensor([[w.document.kind == value for value in wanted] for w, _ in part]))
        for part in parts
    ]
    return _usable(list(entry.classes), *samples)


def _rows(entry: Hub, value: object, config: str | None, seed: int) -> Iterator[Document]:
    """Rows of one configuration as documents; the class stands where other documents say what kind they are."""
    import datasets

    try:
        rows = datasets.load_dataset(entry.name, config, split="train", revision=entry.revision, streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=10_000):
            text = row
            for key in entry.text.format(value).split("."):
                text = text[key]
            yield Document(text, entry.name, entry.name, str(value if not entry.label else row[entry.label]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read data set {entry.name!r}: {' '.join(str(error).split())}") from error


# --- features ---------------------------------------------------------------------------------------------------------

Columns = Float[Tensor, "n features"]
"""A sparse matrix by columns (CSC), float64: one feature after the other, zeros left out."""


def columns(parts: Iterable[Float[Tensor, "few features"]]) -> Columns:
    """Features of contexts that come a few at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these matrices a beta
        return torch.cat([part.to_sparse() for part in parts]).coalesce().to_sparse_csc().double()


@torch.no_grad()
def of_sae(sae: SAE, batches: Iterable[Float[Tensor, "few pos d_model"]]) -> Columns:
    """Every latent's mean over the context."""
    return columns(_averaged(sae, x).cpu() for batch in batches for x in pieces(batch, sae))


def _averaged(sae: SAE, x: Float[Tensor, "few pos d_model"]) -> Float[Tensor, "few n_latents"]:
    codes = sae.encode(x)
    if codes.indices is None:
        return codes.values.mean(1)
    total = codes.values.new_zeros(len(x), sae.n_latents)
    return total.scatter_add_(1, codes.indices.flatten(1), codes.values.flatten(1)) / x.shape[1]


def residual(batches: Iterable[Float[Tensor, "few pos d_model"]]) -> Float[Tensor, "n d_model"]:
    """The activation as the SAE sees it (centred, norm 1), averaged over the context."""
    return torch.cat([in_unit_space(x, x)[0].double().mean(1).cpu() for x in batches])


def principal(x: Float[Tensor, "n d_model"]) -> Float[Tensor, "d_model d_model"]:
    """Directions of largest variance between contexts, one a column."""
    return torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh.mT


def drawn(d_model: int, n: int, seed: int) -> Float[Tensor, "d_model n"]:
    """Random directions, one a column."""
    rows = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(rows).mT


def counts(tokens: Int[Tensor, "n pos"], d_vocab: int) -> Columns:
    """How often every token of the vocabulary stands in the context: what one token alone gives away."""
    return columns(nn.functional.one_hot(part, d_vocab).sum(1) for part in tokens.split(64))


# --- probes -----------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A logistic probe for every feature and task: sigmoid(weight z + bias)."""

    weight: Float[Tensor, "features tasks"]
    bias: Float[Tensor, "features tasks"]
    ce: Float[Tensor, "features tasks"]
    """Cross-entropy on the documents of the fit, nats."""

    def best(self) -> Int[Tensor, "tasks"]:
        """For every task the feature with the lowest cross-entropy."""
        return self.ce.argmin(0)


def fit(x: Columns, labels: Bool[Tensor, "n tasks"], ridge: float = RIDGE) -> Fit:
    """All probes at once by Newton's method: minimal mean cross-entropy + ridge / 2 (w std(z))^2 (section 4.2).

    Features that are 0 in most documents cost little: documents with z = 0 are counted, not computed.
    """
    n, y = len(x), labels.double()
    start, value = x.ccol_indices(), x.values()
    size = start.diff()
    total, squares = (value.new_zeros(x.shape[1]).index_add_(0, _owner(size), v) for v in (value, value.square()))
    spread = (squares / n - (total / n).square()).clamp_min(0).sqrt()
    spread[spread <= 1e-9 * (squares / n).sqrt()] = torch.inf  # constant: it says nothing, and gets no weight
    by_label = (x.mT @ y) / spread[:, None]
    weight, bias, ce = (value.new_empty(x.shape[1], y.shape[1]) for _ in range(3))
    order, at = size.argsort(descending=True, stable=True), 0
    while at < len(order):
        longest = max(1, int(size[order[at]]))
        some = order[at : at + max(1, ENTRIES // (longest * y.shape[1]))]
        place = torch.arange(longest)
        there = place < size[some, None]
        z = value[(start[some, None] + place).clamp_max(len(value) - 1)] * there / spread[some, None]
        weight[some], bias[some], ce[some] = _newton(z, n, by_label[some], y.sum(0), ridge)
        at += len(some)
    return Fit(weight / spread[:, None], bias, ce)


def _owner(size: Int[Tensor, "features"]) -> Int[Tensor, "entries"]:
    return torch.arange(len(size)).repeat_interleave(size)


def _newton(
    z: Float[Tensor, "few m"], n: int, by_label: Float[Tensor, "few tasks"], positive: Float[Tensor, "tasks"],
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights, biases and cross-entropies. The n - m documents that are not in `z` have z = 0, and so may some in it.

    Labels enter by their sums alone: `by_label` is that of z over positive documents, `positive` their number.
    """
    moments = torch.stack([torch.ones_like(z), z, z * z], -1)

    def value(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        logit = torch.addcmul(b[:, :, None], w[:, :, None], z[:, None])
        loss = _softplus(logit).sum(-1) + (n - z.shape[1]) * _softplus(b) - w * by_label - b * positive
        return loss / n + ridge / 2 * w * w, logit

    w = torch.zeros_like(by_label)
    b = (positive / n).logit().expand_as(w).clone()
    loss, logit = value(w, b)
    for _ in range(100):
        p, p0 = logit.sigmoid(), b.sigmoid()
        first, second = p @ moments[..., :2], (p - p * p) @ moments
        slope_b = (first[..., 0] + (n - z.shape[1]) * p0 - positive) / n
        slope_w = (first[..., 1] - by_label) / n + ridge * w
        done = max(slope_b.abs().max(), slope_w.abs().max()) < 1e-6  # one step more squares that
        bb = (second[..., 0] + (n - z.shape[1]) * p0 * (1 - p0)) / n
        wb, ww = second[..., 1] / n, second[..., 2] / n + ridge
        step_w, step_b = (bb * slope_w - wb * slope_b), (ww * slope_b - wb * slope_w)
        scale = (bb * ww - wb * wb).clamp_min(1e-300)
        while True:  # a step that would lose is halved
            tried, logit = value(w - step_w / scale, b - step_b / scale)
            worse = tried > loss + 1e-14
            if not worse.any():
                break
            scale = torch.where(worse, 2 * scale, scale)
        w, b, loss = w - step_w / scale, b - step_b / scale, tried
        if done:
            break
    return w, b, loss - ridge / 2 * w * w


def _softplus(x: Tensor) -> Tensor:
    return nn.functional.softplus(x, threshold=40)  # the default gives up digits


def losses(
    found: Fit, x: Columns, labels: Bool[Tensor, "n tasks"], best: Int[Tensor, "tasks"] | None = None
) -> Float[Tensor, "n tasks"]:
    """Cross-entropy of every document (held-out ones, if `x` is) under each task's best probe, nats."""
    best = found.best() if best is None else best
    start = x.ccol_indices()
    z = x.values().new_zeros(len(best), len(x))
    for task, feature in enumerate(best.tolist()):
        own = slice(int(start[feature]), int(start[feature + 1]))
        z[task, x.row_indices()[own]] = x.values()[own]
    tasks = torch.arange(len(best))
    return cross_entropy(z.mT * found.weight[best, tasks] + found.bias[best, tasks], labels)


def cross_entropy(logit: Float[Tensor, "n tasks"], labels: Bool[Tensor, "n tasks"]) -> Float[Tensor, "n tasks"]:
    """Of binary labels, nats."""
    return _softplus(logit) - labels * logit


def entropy(labels: Bool[Tensor, "n tasks"]) -> Float[Tensor, "tasks"]:
    """Of each task's labels, nats: what a probe pays that knows how common they are and nothing else."""
    share = labels.double().mean(0)
    return -torch.special.xlogy(share, share) - torch.special.xlogy(1 - share, 1 - share)


class Scores(NamedTuple):
    """Cross-entropies of held-out documents under the best probe of each task; a list has one entry for each source."""

    ce: list[Float[Tensor, "n tasks"]]
    labels: list[Bool[Tensor, "n tasks"]]
    luck: float = math.nan
    """Mean over tasks of cross-entropy over entropy on the documents that the probes were fitted to and chosen on."""

    def relative(self) -> list[Float[Tensor, "n tasks"]]:
        """Over the entropy of the task's labels: 1 is what it costs to know nothing but how common they are."""
        return [ce / entropy(labels) for ce, labels in zip(self.ce, self.labels, strict=True)]

    def result(self) -> Estimate:
        """Mean over tasks, with its standard error over documents."""
        return overall(self.relative())

    def tasks(self) -> list[Estimate]:
        """Every task's, with its standard error over documents."""
        return [mean(column) for part in self.relative() for column in part.mT]


def overall(values: Sequence[Float[Tensor, "n tasks"]]) -> Estimate:
    """Mean over the tasks of all sources of what documents have on average; standard error over documents."""
    tasks, each = sum(part.shape[1] for part in values), [mean(part.sum(1)) for part in values]
    return Estimate(sum(e.value for e in each) / tasks, sum(e.se**2 for e in each) ** 0.5 / tasks)


def judged(tasks: Sequence[Source], features: Iterable[tuple[Columns, Columns]], shuffled: int | None = None) -> Scores:
    """For every task the best of some features: fitted and chosen in training, scored on the held-out sample.

    Args:
        features: for each source those of its training documents and those of its test documents.
        shuffled: seed of an order that labels are put into first, so that nothing is left to be found.
    """
    ces, labels, luck = [], [], 0.0
    for source, (seen, held_out) in zip(tasks, features, strict=True):
        y = [_shuffled(part.labels, shuffled) for part in (source.train, source.test)]
        found = fit(seen, y[0])
        ces.append(losses(found, held_out, y[1]))
        labels.append(y[1])
        luck += (found.ce.amin(0) / entropy(y[0])).sum().item()
    return Scores(ces, labels, luck / sum(len(source.tasks) for source in tasks))


def _shuffled(labels: Bool[Tensor, "n tasks"], seed: int | None) -> Bool[Tensor, "n tasks"]:
    if seed is None:
        return labels
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


RIDGES = (0.1, 0.01, 0.001)
"""Of the probe on the whole residual stream; the best on a quarter of the training documents is taken."""


def whole(
    x: Float[Tensor, "n d_model"], labels: Bool[Tensor, "n tasks"], held_out: Float[Tensor, "m d_model"]
) -> Float[Tensor, "m tasks"]:
    """Logits of a logistic probe on all channels together, one a task: the ceiling of what is linear in them."""
    spread = x.std(0).clamp_min(1e-9)
    x, held_out = (nn.functional.pad((part - x.mean(0)) / spread, (0, 1), value=1.0) for part in (x, held_out))
    own = torch.arange(len(x)) % 4 != 3
    found = []
    for y in tqdm(labels.double().mT, desc="whole residual", unit="task", leave=False):
        tried = {r: cross_entropy(x[~own] @ whole_fit(x[own], y[own], r), y[~own]).mean() for r in RIDGES}
        found.append(held_out @ whole_fit(x, y, min(tried, key=tried.get)))
    return torch.stack(found, 1)


def whole_fit(x: Float[Tensor, "n d"], y: Float[Tensor, "n"], ridge: float) -> Float[Tensor, "d"]:
    """Weights of one logistic probe by Newton's method; the last column of x is 1, and its weight has no ridge."""
    penalty = torch.full_like(x[0], ridge)
    penalty[-1] = 0

    def value(w: Tensor) -> Tensor:
        return cross_entropy(x @ w, y).mean() + (penalty * w * w).sum() / 2

    w = torch.zeros_like(x[0])
    loss = value(w)
    for _ in range(100):
        p = (x @ w).sigmoid()
        slope = x.mT @ (p - y) / len(x) + penalty * w
        if slope.abs().max() < 1e-9:
            break
        step = torch.linalg.solve((x.mT * (p - p * p)) @ x / len(x) + penalty.diag(), slope)
        while (tried := value(w - step)) > loss + 1e-14:
            step = step / 2
        w, loss = w - step, tried
    return w


# --- the stored sweep -------------------------------------------------------------------------------------------------


def sweep(profile_name: str) -> pd.DataFrame:
    """Probe loss of chapter 07's autoencoders, a row for each that was probed: loss over label entropy, and its se.

    `end`: at the end of its run; `alone`: the only point of that run. Empty where nothing is stored.
    """
    found = []
    for path in sorted((ROOT / "results" / profile_name / "08_sweep").glob("*.json")):
        one = {name: entry["value"] for name, entry in read(path)["values"].items()}
        for seed, points in enumerate(zip(one["value"], one["se"], strict=True)):
            for tokens, value, se in zip(one["tokens"], *points, strict=True):
                ends = tokens == one["tokens"][-1], len(one["tokens"]) == 1
                found.append((one["n_latents"], one["k"], seed, tokens, value, se, *ends))
    columns = ["n", "k", "seed", "tokens", "value", "se", "end", "alone"]
    return pd.DataFrame(found, columns=columns).astype({"end": bool, "alone": bool})


def folders(profile_name: str, variant: str, seed: int, every: bool) -> dict[int, Path]:
    """Where chapter 07's sweep left an autoencoder, by the tokens it had seen; only the last, or `every` one.

    Raises:
        UserError: the sweep was not run on this machine: its autoencoders are not kept with the book.
    """
    whole = stored(profile_name, f"07_sweep/{variant}").get("tokens", {}).get("value") or []
    place = BUILD / "sweep" / profile_name / variant / str(seed)
    found = {tokens: place / str(tokens) for tokens in (whole if every else whole[-1:])}
    if not found or not all(path.exists() for path in found.values()):
        raise UserError(
            f"the autoencoders of {variant} are not there: run `saelib run 07 --sweep -p variant={variant}`"
        )
    return found
