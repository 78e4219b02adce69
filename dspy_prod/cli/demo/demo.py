"""`dspy-prod demo`: a support-triage program meets load, repetition, an outage, recovery and an empty purse.

At the end an experiment meets a version that fails.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from typing import Final

import dspy
from rich.console import Console
from tqdm.auto import tqdm

import dspy_prod
from dspy_prod.cli.demo.providers import LocalProviders, RealProvider
from dspy_prod.cli.demo.running import Run
from dspy_prod.cli.demo.triage import Message, Triage, messages, published, similar_examples
from dspy_prod.records import REFUSED

NAMESPACE: Final = "demo"
RECOVERY: Final = 5.0
STATIC_REPLY: Final = "Thank you for your message. A colleague will answer you shortly."


def demo(
    *, model: str | None = None, simulate: bool = False, as_json: bool = False, tracking_uri: str | None = None
) -> int:
    """Run the demo.

    Args:
        model: a real model to run against instead of the local one.
        simulate: use the simulated provider.
        as_json: print the result as JSON instead of tables.
        tracking_uri: write traces to this MLflow, None for no traces.

    Returns:
        0 when the ledger agrees with the providers' bill (beyond what is marked unconfirmed) and with MLflow (if every
        trace arrived there), else 1.

    Raises:
        ConfigError: a tracking URI that MLflow cannot write traces to.
    """
    from dspy_prod.cli.demo import experiment
    from dspy_prod.cli.demo import traces as demo_mlflow
    from dspy_prod.cli.demo.report import Report, show, show_json
    from dspy_prod.stores.addresses import default_store_url

    console = Console(stderr=as_json, emoji=False)
    if not console.is_terminal:
        console.width = 110
    console.print("[bold]dspy_prod demo[/]: support triage under load, outage and an empty budget")
    tracked = tracking_uri if demo_mlflow.begin(console, tracking_uri) else None
    program, prompt = published(console, tracked) if tracked else (Triage(), None)
    console.print("Starting the model ...")
    providers = RealProvider(model) if model else LocalProviders(simulate)
    store = default_store_url()
    try:
        about = f"Answers come from {providers.description}. State: {store}, namespace {NAMESPACE!r}.\n"
        console.print(about, markup=False)
        lm = providers.lm(
            store=store,
            namespace=NAMESPACE,
            retry=dspy_prod.Retry(attempts=2, backoff=0.2),
            breaker=dspy_prod.CircuitBreaker(failure_threshold=3, recovery_timeout=RECOVERY, success_threshold=2),
            limit=dspy_prod.RateLimit(rpm=600, concurrency=2, max_wait=600),
            budget=dspy_prod.Budget(usd=1.00, per="day"),
        )
        lm.cache_clear()  # an earlier demo's answers would make this one short
        with tqdm(total=_TOTAL, unit="request", file=sys.stderr, leave=False) as progress:
            served = dspy_prod.Production(program, name="triage", fallback_response=STATIC_REPLY)
            run = Run(providers, lm, served, progress)
            remove = dspy_prod.add_listener(partial(_notice, run))
            try:
                _scenario(run)
            finally:
                remove()
        lm.close()
        records = [record for record in lm.ledger.records(since=run.began) if record.outcome != REFUSED]
        written = demo_mlflow.written(console, tracked, records, run.began) if tracked else None
        report = Report(run, records, lm.health(), written)
        show_json(report) if as_json else show(console, report)
    finally:
        if tracked:
            demo_mlflow.end()
        providers.close()
    if not as_json:
        console.print()
        for line in experiment.lines(experiment.act()):
            console.print(line, markup=False, soft_wrap=True)
        where = f"--namespace {NAMESPACE}"
        console.print(f"\nLook around: [bold]dspy-prod costs {where} --by user[/], [bold]dspy-prod calls {where}[/]")
        if written is not None:
            console.print(demo_mlflow.invitation(written, prompt), soft_wrap=True)
    return 0 if report.verdict.agrees and (written is None or written.agrees) else 1


_TOTAL: Final = 10 + 3 + 5 + 6 + 2 + 4 + 5


def _scenario(run: Run) -> None:
    texts = messages()
    normal, urgent, outage, rest = texts[:10], texts[10:13], texts[13:19], texts[19:]
    mixed = [(message, "normal") for message in normal] + [(message, "high") for message in urgent]
    run.ask_all("load", mixed)
    run.ask_all("repeats", [(message, "normal") for message in normal[:5]])

    run.providers.outage()
    for message in outage:
        run.ask("outage", message)
    run.providers.outage(total=True)
    for message in rest[:2]:
        run.ask("total outage", message)

    run.providers.recover()
    _wait_for_recovery(run.lm)
    for message in rest[2:6]:
        run.ask("recovery", message)

    capped = _capped(run.lm, rest[6])
    for message in rest[6:11]:
        run.ask("budget", message, lm=capped)


def _wait_for_recovery(lm: dspy_prod.LM) -> None:
    deadline = time.monotonic() + 4 * RECOVERY
    while time.monotonic() < deadline:
        waits = [breaker.retry_after or 0.0 for breaker in lm.health().breakers]
        if not any(waits):
            return
        time.sleep(min(max(waits), 0.5))


def _capped(lm: dspy_prod.LM, message: Message) -> dspy_prod.LM:
    """The same LM with a budget that covers a few calls: a call reserves its bound and uses about a third of it."""
    sort = Triage().sort
    examples = similar_examples(message.message, 2)
    prompt = dspy.JSONAdapter().format(sort.signature, examples, {"message": message.message})
    bound = lm.preview("\n".join(str(part["content"]) for part in prompt)).bound_usd or 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the budget is coarse is the point here
        return lm.copy(budget=dspy_prod.Budget(usd=round(2.2 * bound, 9), per="run", name="demo-purse"))


def _notice(run: Run, event: dspy_prod.Event) -> None:
    if event.name.startswith("breaker_"):
        run.transitions.append(f"{event.data.get('route')}: {event.name.removeprefix('breaker_').replace('_', '-')}")
