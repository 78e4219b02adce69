"""What providers mean by their error codes and texts.

A 400 or a 429 says little: the same status means a caller's mistake, an empty account, a retired model or a prompt that
is too long. Codes are compared whole, texts by phrases. A phrase that fits too much costs a fallback that was not
needed; one that is missing costs the answer.
"""

from __future__ import annotations

import re
from typing import Final

from dspy_prod.runtime.patterns import Pattern

_CODES: Final[dict[str, str]] = {
    **dict.fromkeys(
        (
            "insufficient_quota", "exceeded_current_quota_error", "billing_error", "billing_hard_limit_reached",
            "billing_not_active", "account_deactivated", "payment_required", "insufficient_balance",
            "insufficient_credits", "1113", "credit_balance_too_low", "arrearage", "accountoverdueerror",
            "invalid_api_key", "api_key_invalid", "invalid_authentication", "authentication_error",
            "unauthenticated", "unauthorized", "permission_error", "permission_denied", "access_denied",
            "accessdenied", "invalidapikey", "expiredtokenexception", "unrecognizedclientexception",
        ),
        "account",
    ),
    **dict.fromkeys(
        (
            "model_not_found", "deploymentnotfound", "model_decommissioned", "model_deprecated", "model_not_available",
            "model_unavailable", "model_not_supported", "unsupported_model", "invalid_model", "not_found_error",
            "resource_not_found_error", "unknown_model", "model_terms_required", "model_retired",
        ),
        "model",
    ),
    **dict.fromkeys(
        (
            "content_filter", "content_filtered", "content_policy_violation", "responsibleaipolicyviolation",
            "data_inspection_failed", "moderation_blocked", "safety", "recitation", "blocklist",
            "prohibited_content", "spii", "image_safety", "blocked", "sensitive", "guardrail_intervened", "language",
            "image_prohibited_content", "image_other", "image_recitation", "no_image",
        ),
        "filtered",
    ),
    **dict.fromkeys(
        (
            "context_length_exceeded", "context_length", "string_above_max_length", "request_too_large",
            "max_tokens_exceeded", "unsupported_parameter", "unsupported_value", "unsupported_country_region_territory",
        ),
        "unfit",
    ),
}  # fmt: skip

_STATUSES: Final[dict[str, int]] = {
    **dict.fromkeys(("rate_limit_error", "rate_limit_exceeded", "rate_limit", "resource_exhausted"), 429),
    **dict.fromkeys(("overloaded_error", "overloaded", "engine_overloaded"), 529),
    **dict.fromkeys(("service_unavailable", "unavailable"), 503),
    **dict.fromkeys(("server_error", "internal_error", "internal", "internal_server_error", "api_error"), 500),
    **dict.fromkeys(("timeout", "timeout_error", "deadline_exceeded"), 504),
    **dict.fromkeys(("invalid_request_error", "invalid_argument", "failed_precondition", "bad_request"), 400),
}

_PHRASES: Final[tuple[tuple[str, Pattern], ...]] = tuple(
    (row, Pattern("|".join(phrases), re.IGNORECASE))
    for row, phrases in (
        (
            "account",
            (
                r"credit balance is too low", r"insufficient (?:account )?(?:balance|credits?|funds|quota)",
                r"(?:out|run out) of (?:credits?|tokens|balance)", r"billing (?:hard )?limit", r"payment required",
                r"account (?:is|has been)? ?(?:not active|deactivated|disabled|suspended)",
                r"purchase (?:more )?credits", r"organi[sz]ation must be verified",
                r"API[_ ]key[_ ]?(?:not valid|invalid|expired)", r"(?:invalid|incorrect|expired) API[_ ]key",
                r"api_key_invalid",
            ),
        ),
        (
            "model",
            (
                r"decommissioned", r"model\b.{0,80}\b(?:not found|does not exist|doesn't exist|deprecated|retired|"
                r"no longer|discontinued|not available|unavailable|end.of.life)", r"model[_ ]not[_ ]found",
                r"(?:unknown|no such|invalid) model", r"does not have access to model",
            ),
        ),
        (
            "filtered",
            (
                r"content[_ ](?:management[_ ])?(?:policy|filter)", r"responsible ?ai", r"safety (?:system|filter)",
                r"flagged (?:as|by|for)", r"inappropriate content", r"violat\w+ (?:our |the )?usage polic",
                r"(?:prompt|candidate) blocked",
            ),
        ),
        (
            "unfit",
            (
                r"context (?:length|window)", r"maximum context", r"prompt (?:is )?too long", r"input (?:is )?too long",
                r"too many (?:input )?tokens", r"input token count", r"reduce the length", r"request too large",
                r"exceeds? the (?:model'?s )?(?:maximum|limit|context)",
                r"max[_ ]?(?:completion[_ ]?|output[_ ]?|new[_ ]?)?tokens\b.{0,120}?"
                r"(?:too (?:large|high|big)|at most|less than|must be|exceed|maximum|greater than|range|limit|>)",
                r"unsupported (?:parameter|value)", r"(?:does not|doesn't|not) support", r"is not supported",
            ),
        ),
    )
)  # fmt: skip


def status_meant_by(code: str | None) -> int | None:
    """The HTTP status that a code stands for, where an error came inside an answer; None when it stands for none."""
    if code is None:
        return None
    if code.isdecimal() and len(code) == 3:
        return int(code) if 300 <= int(code) < 600 else None
    return _STATUSES.get(code.lower())


def meant_by(code: str | None, text: str, *, throttled: bool) -> str | None:
    """The row of the table of outcomes that a code or a text names; None when they name none.

    Args:
        code: the provider's.
        text: the provider's.
        throttled: they came with 429, where only an account without money is another matter.
    """
    found = None if code is None else _CODES.get(code.lower())
    if throttled:
        billing = found == "account" or _PHRASES[0][1].search(text) is not None
        return "account" if billing else None
    return found or next((row for row, phrases in _PHRASES if phrases.search(text)), None)
