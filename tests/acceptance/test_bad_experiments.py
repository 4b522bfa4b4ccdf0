"""Wrong experiment files, each with the exact message that the real command must give, and exit code 2."""

# Messages stay whole where they fit nearly into a line, so that a search finds them.
# ruff: noqa: E501

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.definitions import COMMIT, DEFINITION, DIGEST, changed

from rankwise.cli.main import main

KEYS = (
    "version, name, description, base_model, base_model_revision, base_model_config, attn_implementation, quantization, "
    "lora, dataset, training, seed, init_from, sweep, evaluation, answer, register, promotion, tracking"
)
LORA = "r, lora_alpha, lora_dropout, target_modules, use_rslora"
TRAINING = (
    "max_steps, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, learning_rate, "
    "lr_scheduler_type, lr_scheduler_kwargs, warmup_steps, weight_decay, adam_beta1, adam_beta2, adam_epsilon, "
    "max_grad_norm, max_length, save_steps, eval_steps, early_stopping_patience, early_stopping_threshold, "
    "logging_steps, gradient_checkpointing, optim, train_sampling_strategy"
)
SWEPT = (
    "lora.*, training.*, quantization.*, dataset.limit.train, dataset.train, dataset.train[N].weight, "
    "dataset.train[N].rows, dataset.train[N].source, seed"
)
FORMS = "org/name on the hub, a path such as ./dir or rows.jsonl, or pypi:DIST==VERSION#MEMBER"
ARITHMETIC = "numbers, names of fields, + - * / // % **, min max round abs sqrt"
GRID = "    lora.r: [4, 8]"
SPLIT = "  eval: {split_from: train, rows: 20}"

# What is wrong, the change that makes it so, and the message after "FILE:".
WRONG: dict[str, tuple[tuple[str, str], str]] = {
    # Keys.
    "a misspelt key": (
        ("lora_dropout", "lora_droput"),
        f"8: lora.lora_droput: is not a key here; did you mean 'lora_dropout'?; allowed: {LORA}",
    ),
    "another tool's name": (
        ("  r: 8", "  rank: 8\n  r: 8"),
        f"6: lora.rank: is not a key here; did you mean 'r'?; allowed: {LORA}",
    ),
    "a key of another section": (
        ("  r: 8", "  r: 8\n  learning_rate: 1e-3"),
        f"7: lora.learning_rate: is not a key here; did you mean training.learning_rate?; allowed: {LORA}",
    ),
    "an unknown section": (
        ("version: 1", "version: 1\nhardware: {}"),
        f"2: hardware: is not a key here; allowed: {KEYS}",
    ),
    "a duplicate key": (
        ("  r: 8", "  r: 8\n  r: 16"),
        "7: lora.r: is given twice, first on line 6; remove one",
    ),
    "a missing section": (
        ("training:\n  max_steps: 20\n  learning_rate: 2e-3\n  warmup_steps: 5\n", ""),
        f"1: training: is missing; must be a mapping with the keys {TRAINING}",
    ),
    "a missing key": (
        ("  target_modules: [q_proj, v_proj]\n", ""),
        "5: lora.target_modules: is missing; must be a list of module names, or all-linear",
    ),
    "another version": (("version: 1", "version: 2"), "1: version: must be 1, got 2"),
    # Types.
    "a section that is no mapping": (
        ("training:\n", "quantization: nf4\ntraining:\n"),
        "16: quantization: must be a mapping with the keys load_in_4bit, load_in_8bit, bnb_4bit_quant_type, "
        "bnb_4bit_use_double_quant, bnb_4bit_compute_dtype, got 'nf4'",
    ),
    "a YAML 1.1 boolean": (
        ("lora:\n", "lora:\n  use_rslora: yes\n"),
        "6: lora.use_rslora: must be true or false, got 'yes'; did you mean true? (in YAML 1.2 yes is text)",
    ),
    "a quoted number": (
        ("  r: 8", "  r: '8'"),
        "6: lora.r: must be a whole number of at least 1, or an expression, got '8': a number is written without quotes",
    ),
    "a fraction for a whole number": (
        ("max_steps: 20", "max_steps: 20.5"),
        "17: training.max_steps: must be a whole number of at least 1, or null, got 20.5",
    ),
    "a truth value for a number": (
        ("  r: 8", "  r: true"),
        "6: lora.r: must be a whole number of at least 1, got true",
    ),
    "an infinite number": (
        ("2e-3", ".inf"),
        "18: training.learning_rate: must be a number greater than 0, got Infinity",
    ),
    "a word that is none of the choices": (
        ("  warmup_steps: 5", "  lr_scheduler_type: cosin"),
        "19: training.lr_scheduler_type: must be constant, constant_with_warmup, linear, cosine, "
        "cosine_with_min_lr or warmup_stable_decay, got 'cosin'; "
        "did you mean 'cosine'?",
    ),
    "one module as text": (
        ("[q_proj, v_proj]", "q_proj"),
        "9: lora.target_modules: must be a list of module names, or all-linear, got 'q_proj'; did you mean [q_proj]?",
    ),
    # Ranges.
    "a rank of 0": (("  r: 8", "  r: 0"), "6: lora.r: must be a whole number of at least 1, got 0"),
    "dropout of 1": (
        ("0.05", "1.0"),
        "8: lora.lora_dropout: must be a number of at least 0 and less than 1, got 1.0",
    ),
    "an alpha of 0": (("2*r", "0"), "7: lora.lora_alpha: must be a number greater than 0, got 0"),
    "a negative learning rate": (
        ("2e-3", "-2e-3"),
        "18: training.learning_rate: must be a number greater than 0, got -0.002",
    ),
    "no target modules": (
        ("[q_proj, v_proj]", "[]"),
        "9: lora.target_modules: must be a list of module names, or all-linear, got []",
    ),
    "save_steps of 0": (
        ("  warmup_steps: 5", "  save_steps: 0"),
        "19: training.save_steps: must be a whole number of at least 1, got 0",
    ),
    "negative eval_steps": (
        ("  warmup_steps: 5", "  eval_steps: -5"),
        "19: training.eval_steps: must be a whole number of at least 1, or null, got -5",
    ),
    "warm-up of one and a half steps": (
        ("warmup_steps: 5", "warmup_steps: 1.5"),
        "19: training.warmup_steps: must be a whole number of steps, or a share of all steps of at least 0 and less "
        "than 1, got 1.5",
    ),
    "an empty evaluation split": (
        ("rows: 20", "rows: 0"),
        "13: dataset.eval.rows: must be a whole number of at least 1, got 0",
    ),
    "a split from nowhere": (
        ("split_from: train", "split_from: test"),
        "13: dataset.eval.split_from: must be train, got 'test'",
    ),
    "a name that MLflow's paths cannot hold": (
        ("name: small", "name: a/b"),
        "2: name: must be text of letters, digits, spaces, '.', '_' and '-' (at most 120), got 'a/b'",
    ),
    # Combinations.
    "the output layer as a target": (
        ("[q_proj, v_proj]", "[q_proj, lm_head]"),
        "9: lora.target_modules: must not have embeddings or the output layer, got 'lm_head'; use linear layers inside "
        "the blocks",
    ),
    "embeddings as a target": (
        ("[q_proj, v_proj]", "[embed_tokens]"),
        "9: lora.target_modules: must not have embeddings or the output layer, got 'embed_tokens'; use linear layers "
        "inside the blocks",
    ),
    "an alias without a name": (
        ("  name: pricer\n", ""),
        "26: register.name: is missing; must be text without '/', ':' and quotes (at most 256)",
    ),
    "an alias of MLflow's own": (
        ("alias: best", "alias: v2"),
        "28: register.alias: must not be latest or v1, v2, ..., which MLflow reserves, got 'v2'",
    ),
    "an alias without evaluation rows": (
        (SPLIT, "  eval: null"),
        "28: register.alias: goes to the best arm, which needs evaluation rows: give dataset.eval",
    ),
    "steps and epochs": (
        ("max_steps: 20", "max_steps: 20\n  num_train_epochs: 2"),
        "18: training.num_train_epochs: is 2, but max_steps is 20; give one of the two",
    ),
    "neither steps nor epochs": (
        ("  max_steps: 20\n", ""),
        "16: training: must have max_steps or num_train_epochs, has neither",
    ),
    "a prompt without a completion": (
        ('  completion: "${price}"\n', ""),
        "10: dataset.completion: is missing; prompt needs it",
    ),
    "messages beside a prompt": (
        ('  completion: "${price}"', "  messages: chat"),
        "14: dataset.prompt: cannot be combined with messages ('chat'); give messages, or both templates",
    ),
    "an unknown encoding": (
        ('  prompt: "How', '  encoding: utf8x\n  prompt: "How'),
        "14: dataset.encoding: must be a text encoding that Python knows (utf-8, cp1252, utf-16, ...), got 'utf8x'; "
        "did you mean 'utf-8'?",
    ),
    "a delimiter of two characters": (
        ('  prompt: "How', '  delimiter: ";;"\n  prompt: "How'),
        "14: dataset.delimiter: must be one character, or null, got ';;'",
    ),
    "a delimiter that cannot separate": (
        ('  prompt: "How', "  delimiter: '\"'\n  prompt: \"How"),
        "14: dataset.delimiter: must not be a quote or a line break, got '\"'",
    ),
    "a template with an open brace": (
        ("{carat}", "{carat"),
        "14: dataset.prompt: is not a template (expected '}' before end of string), got 'How much is {carat?'; write a "
        "literal brace twice",
    ),
    "a template without a column's name": (
        ("{price}", "{}"),
        "15: dataset.completion: must have fields such as {column} or {column:.2f} only, got '${}'",
    ),
    "more warm-up than steps": (
        ("warmup_steps: 5", "warmup_steps: 21"),
        "19: training.warmup_steps: must be at most max_steps (20), got 21; below 1 it is a share of all steps",
    ),
    "a primary metric that is not produced": (
        ("primary_metric: eval.loss", "primary_metric: eval.exact_match"),
        "25: evaluation.primary_metric: must be a key that evaluation.metrics produce (eval.loss, eval.perplexity, "
        "eval.mean_absolute_error, eval.mean_relative_error, eval.within_20_percent, eval.parse_failures), got "
        "'eval.exact_match'",
    ),
    "a misspelt primary metric": (
        ("primary_metric: eval.loss", "primary_metric: eval_loss"),
        "25: evaluation.primary_metric: must be a key that evaluation.metrics produce (eval.loss, eval.perplexity, "
        "eval.mean_absolute_error, eval.mean_relative_error, eval.within_20_percent, eval.parse_failures), got "
        "'eval_loss'; did you mean 'eval.loss'?",
    ),
    "an unknown metric": (
        ("[loss, number]", "[loss, numbers]"),
        "24: evaluation.metrics[1]: must be loss, token_accuracy, exact_match or number, got 'numbers'; did you mean "
        "'number'?",
    ),
    "the best checkpoint without evaluations": (
        ("  alias: best", "  checkpoint: best"),
        "28: register.checkpoint: is best, which needs evaluations during training: give training.eval_steps",
    ),
    "4 and 8 bits": (
        ("version: 1", "version: 1\nquantization: {load_in_4bit: true, load_in_8bit: true}"),
        "2: quantization.load_in_8bit: is true, but load_in_4bit is true too (its default); set one to false",
    ),
    "a pin of rows that have no source": (
        (SPLIT, f"{SPLIT}\n  eval_revision: {COMMIT}"),
        "14: dataset.eval_revision: has no source to pin: dataset.eval is split from train, which has its own pin; "
        "remove it",
    ),
    # Sources and pins.
    "a base without an owner": (("org/base", "gpt2"), f"3: base_model: must be {FORMS}, got 'gpt2'"),
    "a wheel without a version": (
        ("  train: org/rows", "  train: pypi:plotnine#diamonds.csv"),
        "11: dataset.train: must be pypi:DIST==VERSION#MEMBER with an exact version, got 'pypi:plotnine#diamonds.csv'",
    ),
    "a base that is a table": (
        (f"org/base\nbase_model_revision: {COMMIT}", "pypi:plotnine==0.15.9#plotnine/data/diamonds.csv"),
        "3: base_model: must name a .gguf file of the wheel, got 'plotnine/data/diamonds.csv'",
    ),
    "a shortened commit": (
        (f"base_model_revision: {COMMIT}", "base_model_revision: 0123abc"),
        "4: base_model_revision: must be a full commit of 40 lowercase hex digits, got '0123abc' with 7 digits",
    ),
    "a digest for the hub": (
        (f"  train_revision: {COMMIT}", f"  train_revision: {DIGEST}"),
        f"12: dataset.train_revision: must be a commit (40 hex digits) or a branch for a hub source, got '{DIGEST}'",
    ),
    "an adapter that is no model version": (
        ("version: 1", "version: 1\ninit_from: champion"),
        "2: init_from: must be models:/NAME/VERSION or models:/NAME@ALIAS, got 'champion'",
    ),
    "a template that is nowhere": (
        ("dataset:\n", "dataset:\n  chat_template: /nowhere/chatm\n"),
        "11: dataset.chat_template: must be chatml, plain, or a Jinja file; there is no file /nowhere/chatm; did you mean "
        "'chatml'?",
    ),
    "a missing data file": (
        (f"  train: org/rows\n  train_revision: {COMMIT}", "  train: /nowhere/rows.csv"),
        "11: dataset.train: there is no file or directory /nowhere/rows.csv",
    ),
    "a missing configuration": (
        ("version: 1", "version: 1\nbase_model_config: /nowhere/config.json"),
        "2: base_model_config: must be a config.json; there is no file /nowhere/config.json",
    ),
    # Sweeps.
    "an axis that is no field": (
        (GRID, "    lora.rank: [4, 8]"),
        f"22: sweep.parameters.lora.rank: cannot be swept; did you mean 'lora.r'?; allowed: {SWEPT}",
    ),
    "an axis without its section": (
        (GRID, "    r: [4, 8]"),
        f"22: sweep.parameters.r: cannot be swept; did you mean lora.r?; allowed: {SWEPT}",
    ),
    "an axis that changes nothing": (
        (GRID, "    training.save_steps: [4, 8]"),
        f"22: sweep.parameters.training.save_steps: cannot differ between arms; allowed: {SWEPT}",
    ),
    "an axis that is no list": (
        (GRID, "    lora.r: 8"),
        "22: sweep.parameters.lora.r: must be a list of values, got 8; did you mean [8]?",
    ),
    "an empty axis": ((GRID, "    lora.r: []"), "22: sweep.parameters.lora.r: must have at least one value, got []"),
    "a value twice": ((GRID, "    lora.r: [4, 8, 4]"), "22: sweep.parameters.lora.r[2]: 4 is listed twice; remove one"),
    "a wrong value in an axis": (
        (GRID, "    lora.r: [4, -8]"),
        "22: sweep.parameters.lora.r[1]: must be a whole number of at least 1, got -8",
    ),
    "a grid and a list": (
        (GRID, f"{GRID}\n  arms: [{{seed: 1}}]"),
        "23: sweep.arms: cannot be combined with parameters; give a grid (parameters) or a list (arms)",
    ),
    "arms that are no mappings": (
        (f"  parameters:\n{GRID}", "  arms: [8]"),
        "21: sweep.arms[0]: must be a mapping, got 8",
    ),
    "a condition that is none": (
        (GRID, f"{GRID}\n  where: r >"),
        f"23: sweep.where: must be a condition over fields, got 'r >': syntax; allowed are {ARITHMETIC}, comparisons, "
        "and, or, not, in",
    ),
    "a condition that leaves no arm": (
        (GRID, f"{GRID}\n  where: r > 8"),
        "23: sweep.where: excludes all 2 arms, got 'r > 8'",
    ),
    "a condition that is a number": (
        (GRID, f"{GRID}\n  where: 2*r"),
        "23: sweep.where: must be a condition over fields, got '2*r': must give true or false, gives 8",
    ),
    "an arm twice": (
        (f"  parameters:\n{GRID}", "  arms:\n    - {lora.r: 4}\n    - {lora.r: 4, seed: 0}"),
        "23: sweep.arms[1]: (lora.r=4) and (lora.r=4, seed=0) are the same arm: they differ in nothing that influences the result; "
        "remove one, or exclude it with where",
    ),
    "an arm that cannot work": (
        (GRID, "    training.max_steps: [4, 20]"),
        "19: training.warmup_steps: must be at most max_steps (4), got 5; below 1 it is a share of all steps (in the arm "
        "training.max_steps=4)",
    ),
    # Searches.
    "a misspelt method": (
        (GRID, f"{GRID}\n  method: ranom"),
        "23: sweep.method: must be grid, random or tpe, got 'ranom'; did you mean 'random'?",
    ),
    "a range in a grid": (
        (GRID, "    lora.r: {int: [2, 64]}"),
        '22: sweep.parameters.lora.r: is a range, got {"int": [2, 64]}; a grid needs a list of values, a range needs '
        "method: random or tpe",
    ),
    "a search without the number of arms": (
        (GRID, f"{GRID}\n  method: random"),
        "20: sweep.trials: is missing; method random needs the number of arms",
    ),
    "a number of arms for a grid": (
        (GRID, f"{GRID}\n  trials: 4"),
        "23: sweep.trials: is allowed only with method random or tpe, got 4 with method grid; remove it",
    ),
    "rounds without results": (
        (GRID, f"{GRID}\n  method: random\n  trials: 2\n  round_size: 1"),
        "25: sweep.round_size: is allowed only with method tpe, got 1 with method random; remove it",
    ),
    "a search in nothing": (
        (f"  parameters:\n{GRID}", "  method: random\n  trials: 4"),
        "21: sweep.method: is random, which needs parameters to draw from",
    ),
    "a search in a list": (
        (f"  parameters:\n{GRID}", "  method: tpe\n  trials: 4\n  arms: [{seed: 1}]"),
        "23: sweep.arms: is a list, which method tpe cannot draw from; give parameters, or method: grid",
    ),
    "more arms than there are": (
        (GRID, f"{GRID}\n  method: random\n  trials: 3"),
        "24: sweep.trials: must be at most 2, the number of points of the parameters, got 3",
    ),
    "more arms than where admits": (
        (GRID, "    lora.r: {int: [1, 9]}\n  method: random\n  trials: 4\n  where: r > 6"),
        "24: sweep.trials: is 4, but only 3 different arms were found; reduce it, or widen the ranges or where",
    ),
    "a search that where leaves nothing of": (
        (GRID, "    lora.r: {int: [1, 9]}\n  method: random\n  trials: 4\n  where: r > 9"),
        "25: sweep.where: excludes all 1,000 points tried, got 'r > 9'",
    ),
    "a misspelt range": (
        (GRID, "    training.learning_rate: {loguniform: [1e-4, 1e-2]}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.training.learning_rate.loguniform: is not a kind of range; did you mean 'log_uniform'?; allowed: "
        "uniform, log_uniform, int, choice",
    ),
    "two ranges in one": (
        (GRID, "    lora.r: {int: [2, 64], choice: [8]}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.lora.r: must have one of uniform, log_uniform, int, choice, has int and choice",
    ),
    "a range that is neither": (
        (GRID, "    lora.r: 8\n  method: random\n  trials: 4"),
        "22: sweep.parameters.lora.r: must be a list of values, or {uniform: [low, high]}, {log_uniform: [low, high]}, "
        "{int: [low, high], log: true} or {choice: [...]}, got 8",
    ),
    "a range upside down": (
        (GRID, "    lora.r: {int: [64, 2]}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.lora.r.int: must be [low, high] with low less than high, got [64, 2]",
    ),
    "a range with three ends": (
        (GRID, "    lora.lora_dropout: {uniform: [0, 0.1, 0.2]}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.lora.lora_dropout.uniform: must be [low, high], two numbers, got [0, 0.1, 0.2]",
    ),
    "a logarithm of nothing": (
        (GRID, "    training.learning_rate: {log_uniform: [0, 0.1]}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.training.learning_rate.log_uniform: must have low greater than 0, since values are "
        "drawn by order of magnitude, got [0, 0.1]",
    ),
    "fractions of a rank": (
        (GRID, "    lora.r: {log_uniform: [2, 64]}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.lora.r.log_uniform: draws fractions, but lora.r must be a whole number; did you mean "
        "{int: [low, high], log: true}?",
    ),
    "a range of modules": (
        (GRID, "    lora.target_modules: {uniform: [0, 1]}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.lora.target_modules.uniform: is not a number, so it cannot have a range; give a list "
        "of values, not uniform",
    ),
    "a range beyond what the field allows": (
        (GRID, "    lora.lora_dropout: {uniform: [0, 1.5]}\n  method: tpe\n  trials: 4"),
        "22: sweep.parameters.lora.lora_dropout.uniform[1]: must be a number of at least 0 and less than 1, got 1.5",
    ),
    "a logarithm where there is none": (
        (GRID, "    training.learning_rate: {uniform: [1e-4, 1e-2], log: true}\n  method: random\n  trials: 4"),
        "22: sweep.parameters.training.learning_rate.log: is allowed with int only, not with uniform; use log_uniform",
    ),
    # Early stopping.
    "rungs behind the end": (
        (GRID, f"{GRID}\n  early_stopping: {{min_steps: 20}}"),
        "23: sweep.early_stopping.min_steps: must be less than max_steps (20), or no arm reaches a rung, got 20",
    ),
    "rungs at which all go on": (
        (GRID, f"{GRID}\n  early_stopping: {{min_steps: 4, finalists: 2}}"),
        "23: sweep.early_stopping.finalists: must be less than the number of configurations (2), or no arm is pruned, "
        "got 2",
    ),
    "rungs for seeds only": (
        (GRID, "    seed: [0, 1]\n  early_stopping: {min_steps: 4}"),
        "23: sweep.early_stopping: compares means over seeds, but the arms differ only in the seed; remove it, or "
        "sweep another field",
    ),
    "rungs without steps": (
        (GRID, f"{GRID}\n  early_stopping: {{eta: 4}}"),
        "23: sweep.early_stopping.min_steps: is missing; must be a whole number of at least 1",
    ),
    "an eta of 1": (
        (GRID, f"{GRID}\n  early_stopping: {{min_steps: 4, eta: 1}}"),
        "23: sweep.early_stopping.eta: must be a whole number of at least 2, got 1",
    ),
    "a metric that needs generated text": (
        (GRID, f"{GRID}\n  early_stopping: {{min_steps: 4, metric: eval_loss}}"),
        "23: sweep.early_stopping.metric: must be eval.loss, eval.perplexity or eval.token_accuracy, got 'eval_loss'; did you "
        "mean 'eval.loss'?",
    ),
    "another way to stop early": (
        (GRID, f"{GRID}\n  early_stopping: {{method: hyperband, min_steps: 4}}"),
        "23: sweep.early_stopping.method: must be successive_halving, got 'hyperband'",
    ),
    # Expressions.
    "an expression with a misspelt name": (
        ("2*r", "2*lora_dropuot"),
        "7: lora.lora_alpha: must be a number greater than 0, or an expression, got '2*lora_dropuot': there is no field "
        "'lora_dropuot'; did you mean 'lora_dropout'?",
    ),
    "an expression that runs code": (
        ("2*r", "__import__('os').getpid()"),
        "7: lora.lora_alpha: must be a number greater than 0, or an expression, got \"__import__('os').getpid()\": "
        f"\"__import__('os').getpid()\" is not allowed; allowed are {ARITHMETIC}",
    ),
    "an expression that takes all memory": (
        ("2*r", "9**9**9"),
        "7: lora.lora_alpha: must be a number greater than 0, or an expression, got '9**9**9': the result is out of range",
    ),
    "an expression of itself": (
        ("2*r", "lora_alpha * 2"),
        "7: lora.lora_alpha: must be a number greater than 0, or an expression, got 'lora_alpha * 2': it depends on "
        "itself: lora.lora_alpha -> lora.lora_alpha",
    ),
    # YAML.
    "a tab": (
        ("  r: 8", "\tr: 8"),
        "6: is not YAML: while scanning for the next token found character '\\t' that cannot start any token",
    ),
    "a tag": (
        ("name: small", "name: !!python/name:os.system x"),
        "2: name: has the tag tag:yaml.org,2002:python/name:os.system; tags are not allowed",
    ),
    "an unknown alias": (("name: small", "name: *x"), "2: name: the alias *x has no complete value before it"),
}


def refused(capsys, *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("bad.yaml").write_text(text)
        return "bad.yaml"

    return write


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_gets_its_message_and_no_other(what, write, capsys):
    change, message = WRONG[what]
    (line,) = refused(capsys, "validate", write(changed(change)))
    assert line.removeprefix("error: ") == f"bad.yaml:{message}"


NO_ROWS = ((SPLIT, "  eval: null"), ("  alias: best\n", ""))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (
            "  method: tpe\n  trials: 2",
            "23: sweep.method: is tpe, which proposes arms from results on evaluation rows: give dataset.eval",
        ),
        (
            "  early_stopping: {min_steps: 4}",
            "23: sweep.early_stopping: compares arms on evaluation rows: give dataset.eval",
        ),
    ],
)
def test_what_compares_arms_needs_evaluation_rows(sweep, message, write, capsys):
    (line,) = refused(capsys, "validate", write(changed(*NO_ROWS, (GRID, f"{GRID}\n{sweep}"))))
    assert line.removeprefix("error: ") == f"bad.yaml:{message}"


def test_a_rung_is_no_further_state_to_choose_from(write, capsys):
    changes = (
        ("  warmup_steps: 5", "  warmup_steps: 5\n  eval_steps: 4"),
        (GRID, f"{GRID}\n  early_stopping: {{min_steps: 6}}"),
        ("  alias: best", "  checkpoint: best"),
    )
    (line,) = refused(capsys, "validate", write(changed(*changes)))
    assert line.removeprefix("error: ") == (
        "bad.yaml:24: sweep.early_stopping.min_steps: must be a multiple of training.eval_steps (4) with "
        "register.checkpoint: best, got 6; otherwise the rung would be an additional candidate for the best checkpoint"
    )


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_all_problems_come_at_once_in_the_order_of_the_file(command, write, capsys):
    text = changed(
        ("name: small", "name: a/b"),
        ("  r: 8", "  r: 0\n  rank: 8"),
        ("0.05", "1.5"),
        ("  max_steps: 20\n", ""),
        ("    lora.r: [4, 8]", "    lora.r: [4, x]"),
        ("primary_metric: eval.loss", "primary_metric: eval.los"),
        ("alias: best", "alias: latest"),
    )
    assert [line.split(":")[1:3] for line in refused(capsys, command, write(text))] == [
        ["2", " name"],
        ["6", " lora.r"],
        ["7", " lora.rank"],
        ["9", " lora.lora_dropout"],
        ["17", " training"],
        ["22", " sweep.parameters.lora.r[1]"],
        ["25", " evaluation.primary_metric"],
        ["28", " register.alias"],
    ]


def test_an_override_is_checked_as_the_file_is(write, capsys):
    (line,) = refused(capsys, "validate", write(DEFINITION), "--set", "lora.r=no")
    assert line.removeprefix("error: ") == (
        "--set: lora.r: must be a whole number of at least 1, or an expression, got 'no': there is no field 'no'"
    )


def test_unknown_modules_of_a_known_architecture_are_refused(write, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    text = changed(("version: 1", "version: 1\nbase_model_config: config.json"), ("v_proj]", "v_prj]"))
    (line,) = refused(capsys, "validate", write(text))
    assert line.removeprefix("error: ") == (
        "bad.yaml:10: lora.target_modules: has the unknown module 'v_prj'; did you mean 'v_proj'?; the model type llama "
        "has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )


def test_a_split_as_large_as_the_table_is_refused(write, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("carat,price\n" + "1,2\n" * 20)
    text = changed((f"  train: org/rows\n  train_revision: {COMMIT}", "  train: rows.csv"))
    (line,) = refused(capsys, "plan", "--no-estimates", write(text))
    assert line.removeprefix("error: ") == (
        f"dataset.eval.rows: must be less than the 20 rows of {tmp_path}/rows.csv, got 20"
    )


def test_a_missing_file_is_said_in_one_line_by_the_command_itself(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "rankwise", "validate", "missing.yaml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.removeprefix("error: ") == "missing.yaml: file not found\n"
    assert list(tmp_path.iterdir()) == []
