"""Rounds to a Markdown table."""

from statistics import fmean, median

OURS, FLOOR = "ours", "floor"


def rates(measured: dict, system: str) -> list[float]:
    """Tokens per second in every round of one configuration; empty if the system was left out."""
    rounds = measured["systems"].get(system, {}).get("rounds", ())
    return [measured["config"]["batch"] / fmean(turn["seconds"]) for turn in rounds]


def spread(values: list[float], form: str) -> str:
    """Median and, in brackets, smallest and largest."""
    if not values:
        return "not run"
    shown = format(median(values), form)
    return f"{shown} ({min(values):{form}}–{max(values):{form}})"


def fastest(measured: dict) -> str | None:
    """The peer with the largest median rate."""
    peers = [name for name in measured["systems"] if name != FLOOR and not name.startswith(OURS)]
    return max(peers, key=lambda name: median(rates(measured, name)), default=None)


def ratios(measured: dict, other: str | None, own: str = OURS) -> list[float]:
    """Our rate over another's, round by round: what slows a round down slows both."""
    return [ours / theirs for ours, theirs in zip(rates(measured, own), rates(measured, other), strict=False)]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(result: dict) -> str:
    """Tokens per second, and our rate over that of the fastest peer and of the floor."""
    columns = result["configurations"]
    rows = [[title, *(spread(rates(c, name), ",.0f") for c in columns.values())] for name, title in titles(result)]
    rows.append(["ours / fastest peer", *(spread(ratios(c, fastest(c)), ".2f") for c in columns.values())])
    rows.append(["ours / floor", *(spread(ratios(c, FLOOR), ".0%") for c in columns.values())])
    return table(["tokens/s", *columns], rows)


def memory(result: dict) -> str:
    """Peak resident memory, imports included."""
    columns = result["configurations"]

    def peak(measured, name):
        rounds = measured["systems"].get(name, {}).get("rounds")
        return f"{rounds[-1]['peak_mb']:,.0f}" if rounds else "not run"

    rows = [[title, *(peak(c, name) for c in columns.values())] for name, title in titles(result) if name != FLOOR]
    return table(["peak memory, MB", *columns], rows)


def titles(result: dict) -> list[tuple[str, str]]:
    """Systems that ran in at least one configuration, and what the table calls them."""
    found = {name: s["title"] for c in result["configurations"].values() for name, s in c["systems"].items()}
    return list(found.items())


def versions(result: dict) -> str:
    """Packages and versions, torch for each system."""
    found = {}
    for measured in result["configurations"].values():
        for system in measured["systems"].values():
            *own, torch = sorted(system["versions"].items(), key=lambda item: item[0] == "torch")
            found |= {f"{name} {number}": f" (torch {torch[1]})" for name, number in own}
    return ", ".join(name + torch for name, torch in found.items())


def markdown(result: dict) -> str:
    """The page that `training.py` writes."""
    hardware = result["hardware"]
    sizes = "; ".join(
        f"{name}: d {c['config']['d']}, n {c['config']['n']:,}, k {c['config']['k']}, batch {c['config']['batch']:,}"
        for name, c in result["configurations"].items()
        if not c["config"]["dead"]
    )
    notes = [
        f"- {label}: {name} left out: {why}"
        for label, c in result["configurations"].items()
        for name, why in c["notes"].items()
    ]
    return f"""# One training step, side by side

{result["date"]}, commit {result["commit"]}, float32, {hardware["threads"]} threads.
{hardware["cpu"]}, {hardware["cores"]} cores.
{versions(result)}.
{sizes}.
Median of the rounds (smallest–largest). Ratios are taken round by round. The floor is the model in `worker_floor.py`.

{speed(result)}

{memory(result)}
""" + "".join(f"\n{note}" for note in notes)


def evaluation(result: dict) -> str:
    """The page that `evaluation.py` writes."""
    hardware, variants, peer = result["hardware"], result["variants"], fastest(result)
    whole = {"configurations": {"": result}}
    rows = []
    for name, title in titles(whole):
        rate, over = rates(result, name), ratios(result, peer, name)
        each = [ratio * variants[name] / variants[peer] for ratio in over]
        per_variant = spread([variants[name] * value for value in rate], ",.0f")
        rows.append(
            [title, str(variants[name]), spread(rate, ",.0f"), spread(over, ".2f"), per_variant, spread(each, ".2f")]
        )
    head = ["", "variants", "tokens/s", "over the fastest peer", "tokens/s times variants", "over the fastest peer"]
    facts = {name: system["rounds"][-1]["facts"] for name, system in result["systems"].items()}
    numbers = [
        [title, *(f"{facts[name][key]:.5f}" for key in ("ce", "delta_ce", "kl"))] for name, title in titles(whole)
    ]
    return f"""# Downstream loss, side by side

{result["date"]}, commit {result["commit"]}, float32, {hardware["threads"]} threads.
{hardware["cpu"]}, {hardware["cores"]} cores.
{versions(whole)}.
{result["config"]["profile"]}, its small SAE, {result["config"]["batch"]:,} tokens. Median of the rounds
(smallest–largest); ratios are taken round by round, against the peer with the highest rate.

{table(head, rows)}

{table(["nats", "cross-entropy", "rise with the SAE", "KL divergence"], numbers)}
""" + "".join(f"\n- {name} left out: {why}" for name, why in result["notes"].items())
