"""The protocol of a run, which a reader needs to compare its figures with others.

Model, precision, prompt, template, truncation, decoding, samples, seed, intervals, metric, sources, cost, machine and the
command; what the records do not contain is reported as not recorded.
"""

from __future__ import annotations

from typing import Any

from longspan.compare.report.results import Results, TaskFacts
from longspan.compare.statistics import FEW_WINDOWS, RESAMPLES
from longspan.util.units import duration, size

UNKNOWN = "not recorded"

Facts = list[tuple[str, str]]
"""Terms with their descriptions."""


def environment(results: Results) -> Facts:
    """Terms about the model, the machine and the command."""
    manifest, machine = results.manifest, results.manifest["environment"]
    facts = manifest["facts"]
    memory = machine.get("device_memory")
    versions = [
        f"{name} {machine[name]}" for name in ("longspan", "torch", "transformers", "python") if name in machine
    ]
    said = {
        "Model": results.model,
        "Architecture": f"{facts.get('architecture', UNKNOWN)}, {facts.get('parameters', 0):,} parameters",
        "Fingerprint": f"sha256 {manifest['fingerprint']} of weights, configuration and tokenizer",
        "Native window": f"{results.native:,} tokens",
        "Tokenizer": "the model's own; lengths are counted in its tokens",
        "Precision": machine.get("dtype", UNKNOWN),
        "Attention implementation": machine.get("attention", UNKNOWN),
        "Device": ", ".join(
            filter(None, [machine.get("device_name"), machine["device"], size(memory) if memory else ""])
        ),
        "Processor cores": f"{machine.get('cores', UNKNOWN)} (threads of torch: {machine.get('threads', UNKNOWN)})",
        "Host": f"{machine.get('platform', UNKNOWN)}, {size(machine['host_memory'])} of memory"
        if machine.get("host_memory")
        else machine.get("platform", UNKNOWN),
        "Versions": ", ".join(versions),
        "Seed": str(manifest["seed"]),
        "Lengths": f"{', '.join(f'{n:,}' for n in results.lengths)} ({manifest['why']})",
        "Spent": _spent(results),
        "Command": machine.get("command", UNKNOWN),
    }
    return list(said.items())


def task_protocol(results: Results, task: TaskFacts) -> Facts:
    """Terms about how a task was run and scored."""
    done = [c for c in results.cells() if c["task_spec"] == task.spec and c["status"] == "ok"]
    said = results.protocol(task)
    counts = sorted({c["n"] for c in done})
    failed = sum(bool(s["failed"]) for c in done for s in c["samples"])
    better = "higher" if task.higher_is_better else "lower"
    settings = ", ".join(f"{k}: {v}" for k, v in said.items() if k not in ("template", "begins_with"))
    return [
        ("Measures", task.measures),
        ("Data", task.source or UNKNOWN),
        ("Metric", f"{task.metric}, {better} is better; version {task.version} of the task"),
        ("Settings", ", ".join(filter(None, [task.spec, settings]))),
        ("Chat template", said.get("template", "see the prompt below")),
        ("Begins with", said.get("begins_with", "see the prompt below")),
        ("Truncated", "none of the samples: they are drawn to fit their length, and a longer one ends the cell"),
        ("Decoding", _decoding(done)),
        ("Samples in a cell", " or ".join(f"{n:,}" for n in counts) or "none finished"),
        ("Failed samples", f"{failed:,}, each counted as {task.number(task.worst)}, the worst score"),
        ("Intervals", _interval_kind(results, task, done)),
        ("Published figures", "none beside these: a paper's figure compares only where all of the lines above agree"),
    ]


def first_prompt(results: Results, task: TaskFacts) -> dict[str, Any] | None:
    """The beginning and end of the first sample's prompt, at the longest length that finished."""
    done = (c for n in reversed(results.lengths) for m in results.methods if (c := results.ok(m, task, n)))
    return next((c["first_prompt"] for c in done if c["first_prompt"]), None)


def methods_requested(results: Results) -> list[dict[str, str]]:
    """Each method as requested, with the spec that was measured, its title, reach and exportability."""
    return [
        {
            "requested": str(m["asked"]),
            "spec": str(m["spec"]),
            "title": str(m.get("title") or ""),
            "reach": f"{m['reach']:,} tokens" if m.get("reach") else "unlimited",
            "exportable": "yes" if m.get("exportable") else "no",
        }
        for m in results.manifest["methods"]
    ]


def _decoding(done: list[dict[str, Any]]) -> str:
    if any("answer" in (s["detail"] or {}) for c in done for s in c["samples"]):
        return "greedy, with the budget and the stop rule that this version of the task fixes"
    return "none: the tokens of the text itself are scored"


def _interval_kind(results: Results, task: TaskFacts, done: list[dict[str, Any]]) -> str:
    """The kind of a task's intervals in words; `compare.statistics` explains why."""
    scores = {s["score"] for c in done for s in c["samples"]}
    paired = "differences are to the plain model on the same samples"
    if task.higher_is_better and scores <= {0, 1, None}:
        return f"95 %, Wilson's of a share; {paired}, with Newcombe's interval for paired shares"
    known = [
        results.estimate(c["method"], task, c["length"]).independent
        for c in done
        if (c["samples"][0]["detail"] or {}).get("nll_by_position")
    ]
    few, many = any(n < FEW_WINDOWS for n in known), any(n >= FEW_WINDOWS for n in known) or not known
    over = " or ".join(["samples"] * many + ["positions within eight strata, where independent windows are few"] * few)
    drawn = ", each of as many draws as windows are independent" if results.overlaps(task) else ""
    return f"95 %, bootstrap over {over}, {RESAMPLES:,} resamples with a fixed seed{drawn}; {paired}"


def _spent(results: Results) -> str:
    """Time of all cells, tokens read, and the highest peak of memory."""
    costs = [c["cost"] for c in results.cells() if c["cost"]]
    read = sum(int((c["cost"].get("prefill_tokens") or 0) * c["n"]) for c in results.cells())
    peaks = [p for c in costs for p in (c.get("peak_prefill_bytes"), c.get("peak_decode_bytes")) if p]
    parts = [
        f"{duration(sum(c.get('wall_s') or 0.0 for c in costs))} in {len(costs):,} cells",
        f"about {read:,} tokens read",
    ]
    return ", ".join(parts + ([f"{size(max(peaks))} at the highest peak"] if peaks else []))
