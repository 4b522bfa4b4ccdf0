from __future__ import annotations

import time

import pytest

from rankwise.redact import REDACTED, contains_secret, redact, remember_secrets


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
        ("the secret: 0123456789ab is old", f"the secret: {REDACTED} is old"),
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
        "http://127.0.0.1:5000/#/models/pricer@best and http://[::1]:5000/x@y",
        "task-1234567890-abcdefghijklmnop",
    ],
)
def test_ordinary_code_stays_as_it_is(code):
    assert redact(code) == code


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("https://host/x.csv?token=abc&rows=3", f"https://host/x.csv?token={REDACTED}&rows=3"),
        ("s3://b/k?X-Amz-Signature=0af&x=1", f"s3://b/k?X-Amz-Signature={REDACTED}&x=1"),
        ("https://ann:p@ss@host/x", f"https://{REDACTED}@host/x"),
        ("host=db password=abc dbname=q", f"host=db password={REDACTED} dbname=q"),
        ("PGPASSWORD=abc psql", f"PGPASSWORD={REDACTED} psql"),
        ("postgresql://u:aB/c+9@db:5432/mlflow", f"postgresql://{REDACTED}@db:5432/mlflow"),
        ("AccountName=a;AccountKey=abcd1234abcd1234==;", f"AccountName=a;AccountKey={REDACTED};"),
        ("pypi-" + "AgEIcHlwaS5vcmc" * 4, REDACTED),
    ],
)
def test_secrets_of_urls_and_connection_strings_are_found(text, cleaned):
    assert redact(text) == cleaned


def test_a_secret_that_begins_with_another_one_is_taken_out_whole(monkeypatch):
    names = [f"{letter}_TOKEN" for letter in "ABCDEFGH"]
    for longest in range(9, 17):
        monkeypatch.setattr("rankwise.redact._known", set())
        remember_secrets({name: "0123456789abcdef"[: longest - number] for number, name in enumerate(names)})
        assert redact("0123456789abcdef"[:longest]) == REDACTED


def test_a_password_with_a_slash_is_known_wherever_it_stands(monkeypatch):
    monkeypatch.setattr("rankwise.redact._known", set())
    remember_secrets({"RANKWISE_DATABASE_URL": "postgresql://ann:pass/word@db/queue"})
    assert redact("FATAL: pass/word is wrong") == f"FATAL: {REDACTED} is wrong"
    assert contains_secret("data: postgresql://ann:a/b@db/queue")


@pytest.fixture
def remembered(monkeypatch):
    monkeypatch.setattr("rankwise.redact._known", set())
    remember_secrets(
        {
            "HF_TOKEN": "plainlooking",
            "MLFLOW_TRACKING_PASSWORD": "correct horse",
            "RANKWISE_DATABASE_URL": "postgresql://ann:pa%40ssword@db/queue",
            "AWS_SECRET_ACCESS_KEY": "AbCdEfGhIj",
            "TOKENIZERS_PARALLELISM": "false-but-long",
            "PGPASSWORD": "8letters",
            "SHORT_TOKEN": "letters",
            "HTTPS_PROXY": "http://proxyuser@proxy:3128",
            "GOOGLE_APPLICATION_CREDENTIALS": "/etc/google/key.json",
        }
    )


def test_the_environments_secrets_are_taken_out_wherever_they_stand(remembered):
    text = "server said: plainlooking / correct horse / pa@ssword / pa%40ssword / AbCdEfGhIj / 8letters"
    assert redact(text) == "server said: " + " / ".join([REDACTED] * 6)


def test_what_only_sounds_like_a_secret_stays(remembered):
    text = "false-but-long letters /etc/google/key.json proxyuser"
    assert redact(text) == text


def test_redacting_twice_is_redacting_once(remembered):
    text = "password=abc token: 'x' https://u:p@h/?token=a PGPASSWORD=plainlooking"
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "part",
    ["a://", "password", "token=", "?key=", "-----BEGIN PRIVATE KEY-----", "a-", "eyJ-", "token='", "basic ", "A.b"],
)
def test_a_long_text_is_cleaned_in_no_time_whatever_it_repeats(part):
    began = time.perf_counter()
    redact(part * (300_000 // len(part)))
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("https://ann:pa55@host/x.csv", True),
        ("https://host/x.csv?access_token=abc", True),
        ("hf_" + "aBcD" * 8, True),
        ("-----BEGIN PRIVATE KEY-----\nMII", True),
        ("ssh://git@host/x", False),
        ("pypi:plotnine==0.15.9#plotnine/data/diamonds.csv", False),
        ("the token: {token}, the password: {password}", False),
    ],
)
def test_what_can_only_be_a_secret_is_known(text, held):
    assert contains_secret(text) is held
