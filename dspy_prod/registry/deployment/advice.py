"""How to go on after a deployment, or back: as commands."""

from __future__ import annotations

from dspy_prod.registry.deployment.report import Deployment


def advice(found: Deployment) -> tuple[str, ...]:
    """What a person may do next, a sentence each."""
    moved = [alias for alias in found.stages if found.version is not None and found.after.get(alias) == found.version]
    back = _back(found, moved)
    if found.outcome == "deployed":
        return back
    if found.outcome == "unchanged":
        return (f"There was nothing to do: {', '.join(moved)} {_has(moved)} version {found.version}.",)
    if found.outcome == "inconclusive":
        return (
            "No alias was moved. Look at the checks of the gate. If you take responsibility, run the same command with "
            '--force --reason "..." (in Python: force=True, reason="..."); else measure more and run it again.',
        )
    if found.outcome == "failed":
        return ("No alias was moved. A gate that fails cannot be overruled: deploy a better candidate.",)
    if found.outcome == "error":
        return ("No alias was moved. Mend the evaluation and run the same command again.",)
    stand = (f"{', '.join(moved)} {_has(moved)} version {found.version}; that stays.",) if moved else ()
    if found.outcome == "conflict":
        again = (
            f"See who moved it: dspy-prod prompts {found.name} --history. To deploy all the same, from what the "
            "aliases have now and with a new evaluation, run the same command with --recheck (in Python: "
            "recheck=True).",
        )
        return (*stand, *again, *back)
    return (*stand, "To continue where it stopped, run the same command again.", *back)


def _back(found: Deployment, moved: list[str]) -> tuple[str, ...]:
    names = [alias for alias in moved if found.before.get(alias) not in (None, found.version)]
    if not names:
        return ()
    commands = "; ".join(
        f"dspy-prod rollback {found.name}" + ("" if alias == "production" else f" --alias {alias}") for alias in names
    )
    return (f"To take it back: {commands}",)


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"
