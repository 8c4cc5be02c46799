"""Probe loss (section 4.2): does any one latent know what a document is about, as well as a logistic probe can read it?

A sample is one context of one document, its features are latents averaged over the context. For every task and every
latent at once Newton's method fits the two numbers of a logistic probe; the best latent is chosen on the same training
documents, and its cross-entropy measured on others.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import yaml
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from saelib import UserError
from saelib.metrics import Estimate, in_unit_space, mean, pieces
from saelib.profile import BUILD, ROOT, Docstrings, HuggingFace, Profile
from saelib.report import read, stored
from saelib.sae import SAE
from saelib.text import Document, documents

RIDGE = 1e-3
"""Half of it times w squared is added to the mean cross-entropy; w is per standard deviation of the latent."""
RIDGES = (1.0, 0.1, 0.01, 0.001)
"""Of the probe on all channels; the best on a quarter of the training documents is taken."""
FEWEST = 20
"""A task needs that many documents of either kind, in training and in test."""
ENTRIES = 2**17
"""Tasks times latents times documents that are fitted together: what stays in a processor's cache."""
ASKED = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))
TASKS: dict[str, dict[str, tuple[str, str]]] = ASKED["tasks"]
"""What is asked of docstrings: about the object that the text is about, the window itself, the text around it."""
HUB: list[dict] = ASKED["hub"]
"""Labelled data sets with tasks of the paper's kind, for models of web text."""


# --- tasks ------------------------------------------------------------------------------------------------------------

Window = Mapping[str, str]
"""A context that is read (`text`) and what is not: the text `before` and `after` it, the whole `document`, the last
`section` heading before it; `package`, `name` and `kind` of the object, or of a data set (`kind`: the row's class)."""
HEADING = re.compile(
    r"^[ \t]*(?:([A-Z]\w+)[ \w]*\n[ \t]*[-=]{3,}|(Args|Arguments|Returns|Examples?|Raises|Yields):)[ \t]*$", re.M
)
"""A section's heading, underlined (numpydoc) or closed by a colon (Google)."""


class Sample(NamedTuple):
    """One context of each of n documents, and what holds for it."""

    tokens: Int[Tensor, "n context"]
    labels: Bool[Tensor, "n tasks"]


class Source(NamedTuple):
    """Tasks that share their documents."""

    tasks: list[str]
    train: Sample
    test: Sample


def window(document: Document, before: str, text: str, after: str) -> Window:
    """All that can be asked about."""
    headings = [first or second for first, second in HEADING.findall(before)]
    around = {"before": before, "text": text, "after": after, "section": headings[-1] if headings else ""}
    return document._asdict() | {"document": document.text} | around


def holds(task: tuple[str, str], of: Window) -> bool:
    """The answer to one of `TASKS`."""
    part, pattern = task
    return bool(re.search(pattern, of[part], re.M))


def sources(profile: Profile, tokenizer, n_train: int, n_test: int, seed: int) -> list[Source]:
    """The tasks that suit a profile's text: our own for docstrings and local text, those of `HUB` for web text.

    A data set of `HUB` that cannot be read, or is too small, is left out with a warning.

    Raises:
        UserError: the text holds too few documents that are as long as a context.
    """
    if isinstance(profile.text, HuggingFace):
        return list(_reachable(profile, tokenizer, n_train, n_test, seed))
    test = list(_windows(profile, tokenizer, documents(profile, "test"), seed))
    test = [test[i] for i in torch.linspace(0, len(test) - 1, min(n_test, len(test))).long().tolist()]
    texts, known = documents(profile, "train", seed), {of["package"] for of, _ in test}
    if isinstance(profile.text, Docstrings):  # some packages are in no other split
        texts = (document for document in texts if document.package in known)
    train = list(itertools.islice(_windows(profile, tokenizer, texts, seed), n_train))
    return [_source({name: task for group in TASKS.values() for name, task in group.items()}, train, test)]


def asked(profile: Profile) -> list[str]:
    """Names of all tasks that suit a profile's text, whether or not they can be run."""
    groups = (entry["tasks"] for entry in HUB) if isinstance(profile.text, HuggingFace) else TASKS.values()
    return [name for group in groups for name in group]


def _reachable(profile: Profile, *how) -> Iterator[Source]:
    for entry in HUB:
        try:
            yield labelled(profile, *how[:1], entry, *how[1:])
        except UserError as error:
            warnings.warn(str(error), stacklevel=3)


def labelled(profile: Profile, tokenizer, entry: dict, n_train: int, n_test: int, seed: int) -> Source:
    """Documents of one data set of the hub (or a folder in its place), streamed and shuffled; every class a task.

    Raises:
        UserError: the data set cannot be opened, or holds too few documents that are as long as a context.
    """
    configs = entry.get("configs", {None: None}).items()
    each = -(-(n_train + n_test) // len(configs))
    rows = [_windows(profile, tokenizer, _rows(entry, *config, seed), seed) for config in configs]
    found = [pair for part in rows for pair in itertools.islice(part, each)]
    if len(found) < n_train + n_test:
        raise UserError(f"data set {entry['name']!r} holds {len(found)} documents as long as a context: ask for fewer")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    train, test = ([found[i] for i in part] for part in (order[:n_train], order[n_train : n_train + n_test]))
    return _source({name: ("kind", rf"\A{value}\Z") for name, value in entry["tasks"].items()}, train, test)


def _rows(entry: dict, value: object, config: str | None, seed: int) -> Iterator[Document]:
    """Rows of one configuration as documents; the class stands where other documents say what kind they are."""
    import datasets

    name = entry["name"]
    try:
        rows = datasets.load_dataset(name, config, split="train", revision=entry.get("revision"), streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=10_000):
            text = row
            for key in entry["text"].format(value).split("."):
                text = text[key]
            yield Document(text, name, name, str(row[entry["label"]] if "label" in entry else value))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read data set {name!r}: {' '.join(str(error).split())}") from error


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
                yield window(document, *map(tokenizer.decode, parts)), bos + parts[1]


def _source(tasks: dict[str, tuple[str, str]], *parts: Sequence[tuple[Window, list[int]]]) -> Source:
    """Training and test documents with their labels, without the tasks that have under `FEWEST` of a kind in either."""
    if not all(parts):
        raise UserError("no document is as long as a context: shorten context_length, or add text")
    labels = [torch.tensor([[holds(task, of) for task in tasks.values()] for of, _ in part]) for part in parts]
    common = torch.stack([torch.minimum(y.sum(0), (~y).sum(0)) for y in labels]).amin(0) >= FEWEST
    samples = [Sample(torch.tensor([ids for _, ids in p]), y[:, common]) for p, y in zip(parts, labels, strict=True)]
    return Source(list(itertools.compress(tasks, common.tolist())), *samples)


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


def counts(tokens: Int[Tensor, "n pos"], d_vocab: int) -> Columns:
    """How often every token of the vocabulary stands in the context: what one token alone gives away."""
    parts = tokens.split(64)
    return columns(torch.zeros(len(p), d_vocab).scatter_add_(1, p, torch.ones(p.shape)) for p in parts)


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


# --- probes -----------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A logistic probe for every feature and task: sigmoid(weight z + bias)."""

    weight: Float[Tensor, "features tasks"]
    bias: Float[Tensor, "features tasks"]
    ce: Float[Tensor, "features tasks"]
    """Cross-entropy on the documents of the fit, nats."""


def fit(x: Columns, labels: Bool[Tensor, "n tasks"], ridge: float = RIDGE) -> Fit:
    """All probes at once by Newton's method: minimal mean cross-entropy + ridge / 2 (w std(z))^2 (section 4.2).

    Features that are 0 in most documents cost little: documents with z = 0 are counted, not computed.
    """
    n, y = len(x), labels.double()
    start, value = x.ccol_indices(), x.values()
    size = start.diff()
    owner = torch.arange(len(size)).repeat_interleave(size)
    total, squares = (value.new_zeros(x.shape[1]).index_add_(0, owner, v) for v in (value, value.square()))
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


def losses(found: Fit, x: Columns, labels: Bool[Tensor, "n tasks"]) -> Float[Tensor, "n tasks"]:
    """Cross-entropy of every document (held-out ones, if `x` is) under each task's best probe of the fit, nats."""
    best, start = found.ce.argmin(0), x.ccol_indices()
    z = x.values().new_zeros(len(best), len(x))
    for task, feature in enumerate(best.tolist()):
        own = slice(int(start[feature]), int(start[feature + 1]))
        z[task, x.row_indices()[own]] = x.values()[own]
    tasks = torch.arange(len(best))
    return cross_entropy(z.mT * found.weight[best, tasks] + found.bias[best, tasks], labels)


def cross_entropy(logit: Float[Tensor, "n tasks"], labels: Bool[Tensor, "n tasks"]) -> Float[Tensor, "n tasks"]:
    """Of binary labels, nats."""
    return _softplus(logit) - labels * logit


def whole(
    x: Float[Tensor, "n d_model"], labels: Bool[Tensor, "n tasks"], held_out: Float[Tensor, "m d_model"]
) -> Float[Tensor, "m tasks"]:
    """Logits of a logistic probe on all channels together, one a task, with the best of `RIDGES`."""
    spread = x.std(0).clamp_min(1e-9)
    seen, unseen = (((part - x.mean(0)) / spread).numpy() for part in (x, held_out))
    own = torch.arange(len(x)) % 4 != 3

    def logits(x, y: Tensor, judged, ridge: float) -> Tensor:
        found = LogisticRegression(C=1 / (ridge * len(x)), solver="newton-cholesky").fit(x, y.numpy())
        return torch.from_numpy(found.decision_function(judged))

    found = []
    for y in labels.mT:
        tried = [cross_entropy(logits(seen[own], y[own], seen[~own], r), y[~own]).mean() for r in RIDGES]
        found.append(logits(seen, y, unseen, RIDGES[int(torch.stack(tried).argmin())]))
    return torch.stack(found, 1)


# --- scores -----------------------------------------------------------------------------------------------------------


def entropy(labels: Bool[Tensor, "n tasks"]) -> Float[Tensor, "tasks"]:
    """Of each task's labels, nats: what a probe pays that knows how common they are and nothing else."""
    share = labels.double().mean(0)
    return -torch.special.xlogy(share, share) - torch.special.xlogy(1 - share, 1 - share)


class Scores(NamedTuple):
    """How well the best probe of each task does; a list has one entry for each source."""

    ce: list[Float[Tensor, "n tasks"]]
    """Cross-entropies of held-out documents, nats."""
    labels: list[Bool[Tensor, "n tasks"]]
    seen: Sequence[Float[Tensor, "tasks"]] = ()
    """Cross-entropy over entropy on the documents that the probes were fitted to and chosen on."""

    def relative(self) -> list[Float[Tensor, "n tasks"]]:
        """Loss over the entropy of the task's labels: 1 is what it costs to know nothing but how common they are.

        The mean over documents is that ratio. What a document does to the entropy is added to its own share (linear,
        mean 0), so that standard errors know that the divisor is measured too.
        """
        return [_relative(*pair) for pair in zip(self.ce, self.labels, strict=True)]

    def tasks(self) -> list[Estimate]:
        """Every task's, with its standard error over documents."""
        return [mean(column) for part in self.relative() for column in part.mT]


def _relative(ce: Float[Tensor, "n tasks"], labels: Bool[Tensor, "n tasks"]) -> Float[Tensor, "n tasks"]:
    share, h = labels.double().mean(0), entropy(labels)
    return ce / h + ce.mean(0) / h**2 * share.logit() * (labels.double() - share)


def overall(values: Sequence[Float[Tensor, "n tasks"]], where: Sequence[bool] | None = None) -> Estimate | None:
    """Mean over tasks (those `where` says, None if there are none) of the mean over documents; se over documents."""
    sizes = [part.shape[1] for part in values]
    chosen = torch.tensor([True] * sum(sizes) if where is None else list(where)).double()
    if not chosen.any():
        return None
    each = [mean(part @ own) for part, own in zip(values, chosen.split(sizes), strict=True)]
    tasks = chosen.sum().item()
    return Estimate(sum(e.value for e in each) / tasks, sum(e.se**2 for e in each) ** 0.5 / tasks)


def gain(of: Scores | None, over: Scores | None) -> list[Float[Tensor, "n tasks"]] | None:
    """Document by document, what one loses less than the other: paired, for `overall`. None where one was not run."""
    return of and over and [b - a for a, b in zip(of.relative(), over.relative(), strict=True)]


def judged(tasks: Sequence[Source], features: Iterable[tuple[Columns, Columns]], shuffled: int | None = None) -> Scores:
    """For every task the best of some features: fitted and chosen in training, scored on the held-out sample.

    Args:
        features: for each source those of its training documents and those of its test documents.
        shuffled: seed of an order that labels are put into first, so that nothing is left to be found.
    """
    ces, labels, seen = [], [], []
    for source, (x, held_out) in zip(tasks, features, strict=True):
        y, unseen = (_shuffled(part.labels, shuffled) for part in (source.train, source.test))
        found = fit(x, y)
        ces.append(losses(found, held_out, unseen))
        labels.append(unseen)
        seen.append(found.ce.amin(0) / entropy(y))
    return Scores(ces, labels, seen)


def _shuffled(labels: Bool[Tensor, "n tasks"], seed: int | None) -> Bool[Tensor, "n tasks"]:
    if seed is None:
        return labels
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def along(
    tasks: Sequence[Source], means: Sequence[tuple[Float[Tensor, "n d_model"], Float[Tensor, "m d_model"]]],
    turns: Sequence[Float[Tensor, "d_model directions"]], most: int = 2048,
) -> Scores:  # fmt: skip
    """`judged`, of an averaged activation's components along directions (for each source); `most` at a time."""
    best = None
    for some in zip(*(turn.split(most, 1) for turn in turns), strict=True):
        pairs = zip(means, some, strict=True)
        found = judged(tasks, [[columns([x @ turn]) for x in pair] for pair, turn in pairs])
        best = found if best is None else _better(best, found)
    return best


def _better(one: Scores, other: Scores) -> Scores:
    """For each task the one that is better in training."""
    lower = [b < a for a, b in zip(one.seen, other.seen, strict=True)]
    ce, seen = (
        [torch.where(at, b, a) for at, a, b in zip(lower, *pair, strict=True)]
        for pair in ((one.ce, other.ce), (one.seen, other.seen))
    )
    return Scores(ce, one.labels, seen)


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
    names = ["n", "k", "seed", "tokens", "value", "se", "end", "alone"]
    return pd.DataFrame(found, columns=names).astype({"end": bool, "alone": bool})


def folders(profile_name: str, variant: str, seed: int, every: bool) -> dict[int, Path]:
    """Where chapter 07's sweep left an autoencoder, by the tokens it had seen; only the last, or `every` one.

    Raises:
        UserError: the sweep was not run on this machine: its autoencoders are not kept with the book.
    """
    points = stored(profile_name, f"07_sweep/{variant}").get("tokens", {}).get("value") or []
    place = BUILD / "sweep" / profile_name / variant / str(seed)
    found = {tokens: place / str(tokens) for tokens in (points if every else points[-1:])}
    if not found or not all(path.exists() for path in found.values()):
        cure = f"run `saelib run 07 --sweep -p variant={variant}`"
        raise UserError(f"the autoencoders of {variant} are not there: {cure}")
    return found
