"""The queue's database: reachable, of this release's revision, whole; its clock; and its workers."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.jobs.health import Glance, glance, is_there
from rankwise.settings import Settings
from rankwise.tasks.doctor.finding import Finding, ok, problem, skipped, warning

# A worker announces itself more often than this.
_SILENT_S = 120.0
# MLflow's points carry the worker's time; S3 refuses requests that are a quarter of an hour off.
_SKEW_S, _WRONG_S = 2.0, 300.0


def queue(settings: Settings) -> Sequence[Finding]:
    """All about the queue."""
    if not is_there(settings.database_url):
        seen = f"there is no queue at {settings.database_url.partition(':///')[2]} yet"
        return [skipped("queue.database", seen, "the first `rankwise run` or `submit` makes it")]
    look = glance(settings.database_url)
    health = look.health
    if health.problems:
        return [problem("queue.database", f"{health.url}: {'; '.join(health.problems)}", "see `rankwise db check`")]
    seen = f"{health.url}: revision {health.revision}, {health.jobs} jobs, answers in {look.seconds * 1000:.0f} ms"
    return [ok("queue.database", seen), _clock(look), *_workers(look)]


def _clock(look: Glance) -> Finding:
    # The database's answer is as old as half of the time that it took.
    seen = f"this machine's clock is {look.ahead:+.2f} s (±{look.seconds / 2:.2f}) from the database's"
    off = abs(look.ahead) - look.seconds / 2
    advice = "set the clock by NTP (`timedatectl set-ntp true`); MLflow's points and S3 go by it"
    if off > _WRONG_S:
        return problem("queue.clock", seen, advice)
    return warning("queue.clock", seen, advice) if off > _SKEW_S else ok("queue.clock", seen)


def _workers(look: Glance) -> list[Finding]:
    silent = [worker for worker in look.workers if worker.silent > _SILENT_S]
    there = len(look.workers) - len(silent)
    findings = []
    if silent:
        names = ", ".join(f"{worker.name} ({worker.silent / 60:.0f} min)" for worker in silent)
        advice = "they ended without a word, or hang: see their machines; their jobs go to others when the lease ends"
        findings.append(warning("queue.workers", f"silent: {names}", advice))
    if look.waiting and not there:
        advice = "start one: `rankwise worker` (on every machine with a GPU)"
        findings.append(warning("queue.workers", f"{look.waiting} jobs wait and no worker is there", advice))
    return findings or [ok("queue.workers", f"{there} workers, {look.waiting} jobs wait")]
