from __future__ import annotations

import pytest

from rankwise.redact import REDACTED, redact


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aBcD" * 8,
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 20,
        "glpat-" + "a1" * 10,
        "sk-" + "ab12" * 8,
        "xoxb-1234567890-abcdef",
        "AKIA" + "ABCDEFGH12345678",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    ],
)
def test_tokens_with_a_known_shape_are_taken_out(secret):
    cleaned = redact(f"before {secret} after")
    assert cleaned == f"before {REDACTED} after"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('password = "hunter2"', f'password = "{REDACTED}"'),
        ("+MLFLOW_TRACKING_PASSWORD=correcthorse99battery", f"+MLFLOW_TRACKING_PASSWORD={REDACTED}"),
        ("api_key: 'abc'", f"api_key: '{REDACTED}'"),
        ('{"client_secret": "s3cr3t"}', f'{{"client_secret": "{REDACTED}"}}'),
        ("Authorization: Bearer abcdefghijkl.mnop", f"Authorization: Bearer {REDACTED}"),
        ("https://ann:pa55@host.example/x", f"https://{REDACTED}@host.example/x"),
        ("postgresql://u:p@db:5432/mlflow", f"postgresql://{REDACTED}@db:5432/mlflow"),
    ],
)
def test_secrets_are_found_by_what_stands_before_them(text, cleaned):
    assert redact(text) == cleaned


def test_a_private_key_is_taken_out_whole_even_when_it_is_cut_off():
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----"
    assert redact(f"a\n{key}\nb") == f"a\n{REDACTED}\nb"
    assert redact(f"a\n{key[:50]}") == f"a\n{REDACTED}"


@pytest.mark.parametrize(
    "code",
    [
        "token = next(tokens)",
        "pad_token_id = tokenizer.pad_token_id",
        "tokens: int = 0",
        "max_new_tokens=64",
        "eos_token = special_tokens[0]",
        "https://host.example/path?x=1",
        "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "git@github.com:org/name.git",
        "task-1234567890-abcdefghijklmnop",
    ],
)
def test_ordinary_code_stays_as_it_is(code):
    assert redact(code) == code
