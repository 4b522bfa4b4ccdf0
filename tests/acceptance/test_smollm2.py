"""The real thing, shortened: SmolLM2 out of its wheel, diamonds out of theirs, a few steps, the whole way."""

import json
from pathlib import Path

from helpers.project import Project

from rankwise.settings import Settings

ROOT = Path(__file__).parents[2]


def test_the_main_job_in_a_few_steps(tmp_path):
    project = Project(tmp_path)
    # The cache of this user: the base is fetched and converted once on a machine, as for any user.
    cache = str(Settings.load({}).cache)
    comparison = json.loads(
        project.succeed(
            "run", str(ROOT / "experiments" / "diamonds-rank.yaml"), "--json",
            "--set", "sweep.parameters={lora.r: [2, 8]}",
            "--set", "training.max_steps=3", "--set", "training.warmup_steps=1",
            "--set", "dataset.limit={train: 64, eval: 6}",
            env={"RANKWISE_CACHE": cache, "OMP_NUM_THREADS": "2"},
        )
    )  # fmt: skip
    base = comparison["base"]["metrics"]
    for arm in comparison["arms"]:
        assert arm["metrics"]["eval.loss"]["value"] < base["eval.loss"]["value"]
        assert arm["metrics"]["eval.mean_absolute_error"]["n"] <= 6
        # Per layer: q 576 -> 576, k and v 576 -> 192, o 576 -> 576; 30 layers.
        assert arm["adapter"]["parameters"] == 30 * arm["params"]["lora.r"] * 2 * ((576 + 576) + (576 + 192))
    text = project.succeed("inspect", "models:/diamonds-pricer@best", "--json", env={"RANKWISE_CACHE": cache})
    checks = json.loads(text)["checks"]
    assert checks
    assert all(check["ok"] for check in checks)
